"""Contracts that public distillation code bases have broken: see each test's name."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from q2t.distillation.losses import completion_loss, cross_entropy, distillation_kl


def random_logits(tokens: int, vocabulary: int, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)


def top_and_tail(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.log_softmax(-1)
    top, ids = logprobs.topk(k, dim=1)
    return ids, top, logprobs.scatter(1, ids, -torch.inf).logsumexp(1)


def full_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum(1)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.sampled_from([0.5, 1.0, 2.0, 4.0, 20.0]),
    st.sampled_from([1.0, 8.0, 40.0]),
)
def test_equal_models_give_zero_at_any_temperature(seed: int, k: int, temperature: float, scale: float) -> None:
    logits = random_logits(6, 40, seed, scale)
    kl = distillation_kl(logits, *top_and_tail(logits, k), temperature)
    assert kl.abs().max() < 1e-9


def test_a_shift_by_one_is_seen() -> None:
    logits = random_logits(8, 40, 1)
    ids, top, tail = top_and_tail(logits, 10)
    assert distillation_kl(logits[:-1], ids[1:], top[1:], tail[1:], 1.0).min() > 0.1


def test_top_k_and_tail_rise_to_the_full_kl() -> None:
    teacher, student = random_logits(20, 64, 2), random_logits(20, 64, 3)
    full = full_kl(teacher, student, 1.0)
    previous = torch.zeros_like(full)
    for k in (1, 2, 4, 8, 16, 32, 63, 64):
        kl = distillation_kl(student, *top_and_tail(teacher, k), 1.0)
        assert (kl >= previous - 1e-12).all() and (kl <= full + 1e-9).all()
        previous = kl
    torch.testing.assert_close(previous, full)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_k_of_the_whole_vocabulary_is_the_full_kl(temperature: float) -> None:
    teacher, student = random_logits(5, 16, 4), random_logits(5, 16, 5).requires_grad_()
    kl = distillation_kl(student, *top_and_tail(teacher, 16), temperature)
    torch.testing.assert_close(kl, full_kl(teacher, student, temperature))
    kl.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_the_tail_counts() -> None:
    """Renormalised top-k would see no difference between these two students."""
    teacher = random_logits(4, 30, 6)
    ids, top, tail = top_and_tail(teacher, 5)
    student = teacher + 2.0
    student.scatter_(1, ids, teacher.gather(1, ids))
    assert distillation_kl(student, ids, top, tail, 1.0).min() > 0.01


def eager(
    hidden: Tensor, head: Tensor, targets: Tensor, labels: tuple[Tensor, ...], weights: Tensor, *terms: float
) -> tuple[Tensor, Tensor, Tensor]:
    alpha, temperature = terms
    logits = hidden @ head.T
    labelled = (labels[0] >= 0).any(1)
    ce, kl = cross_entropy(logits, targets), torch.zeros(len(targets), dtype=hidden.dtype)
    if labelled.any():
        kl[labelled] = distillation_kl(logits[labelled], *(part[labelled] for part in labels), temperature)
    task = torch.where(labelled, 1 - alpha, 1.0)
    return (weights * (task * ce + alpha * kl)).sum(), ce.sum(), kl.sum()


def problem(tokens: int, vocabulary: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens + vocabulary + k)
    ids, top, tail = top_and_tail(random_logits(tokens, vocabulary, 9), k)
    ids[::3] = -1
    return {
        "hidden": torch.randn(tokens, 12, generator=generator, dtype=dtype),
        "head": torch.randn(vocabulary, 12, generator=generator, dtype=dtype),
        "targets": torch.randint(0, vocabulary, (tokens,), generator=generator),
        "labels": (ids, top.to(dtype), tail.to(dtype)),
        "weights": torch.rand(tokens, generator=generator, dtype=dtype),
    }


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("k", [0, 1, 5, 49, 50])
def test_chunked_is_eager(k: int, chunk: int) -> None:
    p = problem(23, 50, k, torch.float32)
    gradients = []
    losses = []
    for fused in (False, True):
        hidden, head = (p[name].clone().requires_grad_() for name in ("hidden", "head"))
        if fused:
            terms = completion_loss(hidden, head, p["targets"], *p["labels"], p["weights"], 0.7, 2.5, chunk)
            total, ce, kl = terms.total, terms.cross_entropy, terms.kl
            torch.testing.assert_close(terms.weighted_cross_entropy + terms.weighted_kl, total)
        else:
            total, ce, kl = eager(hidden, head, p["targets"], p["labels"], p["weights"], 0.7, 2.5)
        total.backward()
        gradients.append((hidden.grad, head.grad))
        losses.append((total.detach(), ce.detach(), kl.detach()))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [0, 3, 19, 20])
def test_gradient_by_finite_differences(k: int) -> None:
    p = problem(5, 20, k, torch.float64)
    hidden, head = p["hidden"].requires_grad_(), p["head"].requires_grad_()

    def total(hidden: Tensor, head: Tensor) -> Tensor:
        return completion_loss(hidden, head, p["targets"], *p["labels"], p["weights"], 0.4, 3.0, 2).total

    assert torch.autograd.gradcheck(total, (hidden, head))


def test_a_sure_teacher_keeps_its_tail() -> None:
    """Tail masses of e^-50 vanish in 1 - sum, but not here: at T = 20 they weigh again."""
    teacher = random_logits(4, 30, 7)
    teacher[:, 3] += 60
    ids, top, tail = top_and_tail(teacher, 2)
    assert tail.max() < -40
    kl = completion_loss(
        teacher.float(),
        torch.eye(30),
        torch.full((4,), 3),
        ids,
        top.float(),
        tail.float(),
        torch.ones(4),
        1.0,
        20.0,
        8,
    ).kl
    assert kl.abs() < 1e-3


def test_bfloat16_products_are_near() -> None:
    p = problem(64, 50, 5, torch.float32)
    arguments = (p["hidden"], p["head"], p["targets"], *p["labels"], p["weights"], 0.5, 2.0, 32)
    exact = completion_loss(*arguments).total
    with torch.autocast("cpu", torch.bfloat16):
        rounded = completion_loss(*arguments).total
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs() / exact < 0.01
