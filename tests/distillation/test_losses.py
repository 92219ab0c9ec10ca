"""Contracts that public distillation code bases have broken: see each test's name."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from q2t.config import Divergence
from q2t.distillation import losses
from q2t.distillation.losses import (
    Whole,
    completion_loss,
    cross_entropy,
    distillation,
    divergence,
    whole_completion_loss,
)

KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]
every_kind = pytest.mark.parametrize(("kind", "beta"), KINDS)


def random_logits(tokens: int, vocabulary: int, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)


def top_and_tail(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.log_softmax(-1)
    top, ids = logprobs.topk(k, dim=1)
    return ids, top, logprobs.scatter(1, ids, -torch.inf).logsumexp(1)


def full(teacher: Tensor, student: Tensor, temperature: float, kind: str, beta: float) -> Tensor:
    """Over the whole vocabulary, from probabilities."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(1)

    mixture = beta * p + (1 - beta) * q
    value = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
    }[kind]
    return temperature**2 * value


def test_every_divergence_is_tested() -> None:
    assert {kind for kind, _ in KINDS} == set(get_args(Divergence))


@settings(max_examples=100)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.sampled_from([0.5, 1.0, 2.0, 4.0, 20.0]),
    st.sampled_from([1.0, 8.0, 40.0]),
)
def test_equal_models_give_zero_at_any_temperature(
    how: tuple[str, float], seed: int, k: int, temperature: float, scale: float
) -> None:
    """And no gradient either."""
    logits = random_logits(6, 40, seed, scale).requires_grad_()
    loss = distillation(logits, *top_and_tail(logits.detach(), k), temperature, *how)
    assert loss.abs().max() < 1e-9
    loss.sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-9 * max(1, temperature)


@every_kind
def test_a_shift_by_one_is_seen(kind: Any, beta: float) -> None:
    logits = random_logits(8, 40, 1)
    ids, top, tail = top_and_tail(logits, 10)
    assert distillation(logits[:-1], ids[1:], top[1:], tail[1:], 1.0, kind, beta).min() > 0.1 * beta * (1 - beta)


@every_kind
def test_top_k_and_tail_rise_to_the_full_divergence(kind: Any, beta: float) -> None:
    teacher, student = random_logits(20, 64, 2), random_logits(20, 64, 3)
    whole = full(teacher, student, 1.0, kind, beta)
    previous = torch.zeros_like(whole)
    for k in (1, 2, 4, 8, 16, 32, 63, 64):
        loss = distillation(student, *top_and_tail(teacher, k), 1.0, kind, beta)
        assert (loss >= previous - 1e-12).all() and (loss <= whole + 1e-9).all()
        previous = loss
    torch.testing.assert_close(previous, whole)


@every_kind
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_k_of_the_whole_vocabulary_is_the_full_divergence(temperature: float, kind: Any, beta: float) -> None:
    teacher, student = random_logits(5, 16, 4), random_logits(5, 16, 5).requires_grad_()
    loss = distillation(student, *top_and_tail(teacher, 16), temperature, kind, beta)
    torch.testing.assert_close(loss, full(teacher, student, temperature, kind, beta))
    loss.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_jensen_shannon_has_the_two_kls_as_limits() -> None:
    """GKD, arXiv 2306.13649: divided by beta, or by 1 - beta."""
    teacher, student = (random_logits(20, 64, seed, scale=1.0).log_softmax(1) for seed in (2, 3))
    for beta, share, kind in ((1e-6, 1e-6, "forward_kl"), (1 - 1e-6, 1e-6, "reverse_kl")):
        limit = divergence(teacher, student, kind, 0.5)  # type: ignore[arg-type]
        torch.testing.assert_close(divergence(teacher, student, "jsd", beta) / share, limit, rtol=1e-2, atol=1e-2)
    half = divergence(teacher, student, "jsd", 0.5)
    torch.testing.assert_close(half, divergence(student, teacher, "jsd", 0.5))
    assert (half < torch.tensor(2.0).log()).all()


def test_the_two_kls_are_each_others_mirror() -> None:
    teacher, student = (random_logits(20, 64, seed).log_softmax(1) for seed in (2, 3))
    forward, reverse = divergence(teacher, student, "forward_kl", 0.5), divergence(student, teacher, "reverse_kl", 0.5)
    torch.testing.assert_close(forward, reverse)
    assert not torch.allclose(forward, divergence(teacher, student, "reverse_kl", 0.5))


@every_kind
def test_the_tail_counts(kind: Any, beta: float) -> None:
    """Renormalised top-k would see no difference between these two students."""
    teacher = random_logits(4, 30, 6)
    ids, top, tail = top_and_tail(teacher, 5)
    student = teacher + 2.0
    student.scatter_(1, ids, teacher.gather(1, ids))
    assert distillation(student, ids, top, tail, 1.0, kind, beta).min() > 0.01 * beta * (1 - beta)


def eager(
    hidden: Tensor, head: Tensor, targets: Tensor, labels: tuple[Tensor, ...], weights: tuple[Tensor, Tensor], *how: Any
) -> tuple[Tensor, ...]:
    logits = hidden @ head.T
    labelled = (labels[0] >= 0).any(1)
    ce, kd = cross_entropy(logits, targets), torch.zeros(len(targets), dtype=hidden.dtype)
    if labelled.any():
        kd[labelled] = distillation(logits[labelled], *(part[labelled] for part in labels), *how)
    task, distilled = weights
    return ((task * ce + distilled * kd).sum(), ce.sum(), kd.sum(), (task * ce).sum(), (distilled * kd).sum())


def problem(tokens: int, vocabulary: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """A third of the tokens has no labels; of the weights some are 0."""
    generator = torch.Generator().manual_seed(tokens + vocabulary + k)
    ids, top, tail = top_and_tail(random_logits(tokens, vocabulary, 9), k)
    ids[::3] = -1
    task, distilled = (torch.rand(tokens, generator=generator, dtype=dtype) for _ in range(2))
    task[1::4], distilled[2::4] = 0, 0
    return {
        "hidden": torch.randn(tokens, 12, generator=generator, dtype=dtype),
        "head": torch.randn(vocabulary, 12, generator=generator, dtype=dtype),
        "targets": torch.randint(0, vocabulary, (tokens,), generator=generator),
        "labels": (ids, top.to(dtype), tail.to(dtype)),
        "weights": (task, distilled),
    }


@every_kind
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("k", [0, 1, 5, 49, 50])
def test_chunked_is_eager(k: int, chunk: int, kind: Any, beta: float) -> None:
    p = problem(23, 50, k, torch.float32)
    found = []
    for fused in (False, True):
        hidden, head = (p[name].clone().requires_grad_() for name in ("hidden", "head"))
        terms: tuple[Tensor, ...]
        if fused:
            terms = completion_loss(hidden, head, p["targets"], *p["labels"], *p["weights"], 2.5, chunk, kind, beta)
        else:
            terms = eager(hidden, head, p["targets"], p["labels"], p["weights"], 2.5, kind, beta)
        terms[0].backward()
        found.append([*(term.detach() for term in terms), hidden.grad, head.grad])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("k", [0, 3, 19, 20])
def test_gradient_by_finite_differences(k: int, kind: Any, beta: float) -> None:
    p = problem(6, 20, k, torch.float64)
    hidden, head = p["hidden"].requires_grad_(), p["head"].requires_grad_()

    def total(hidden: Tensor, head: Tensor) -> Tensor:
        return completion_loss(hidden, head, p["targets"], *p["labels"], *p["weights"], 3.0, 2, kind, beta).total

    # Not by gradcheck, which goes backward twice: the gradient is scaled in place, and good for once.
    (2.0 * total(hidden, head)).backward()
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        along = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (hidden, head)]
        with torch.no_grad():
            ends = [total(hidden + step * along[0], head + step * along[1]) for step in (1e-6, -1e-6)]
        expected = 2.0 * (ends[0] - ends[1]) / 2e-6
        found = sum((x.grad * direction).sum() for x, direction in zip((hidden, head), along, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_parts_of_the_vocabulary_give_the_heads_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(23, 50, 5, torch.float32)
    found = []
    for logits in (2**24, 7 * p["head"].shape[1]):  # whole, and 7 tokens at a time
        monkeypatch.setitem(losses.LOGITS, "cpu", logits)
        head = p["head"].clone().requires_grad_()
        completion_loss(p["hidden"], head, p["targets"], *p["labels"], *p["weights"], 2.5, 8).total.backward()
        found.append(head.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


@every_kind
def test_a_token_without_weight_or_labels_is_not_learnt(kind: Any, beta: float) -> None:
    p = problem(24, 50, 5, torch.float64)
    hidden = p["hidden"].requires_grad_()
    terms = completion_loss(hidden, p["head"], p["targets"], *p["labels"], *p["weights"], 2.0, 8, kind, beta)
    terms.total.backward()
    unlabelled, (task, distilled) = (p["labels"][0] < 0).any(1), p["weights"]
    still = (task == 0) & (unlabelled | (distilled == 0))
    assert still.sum() == 2 and hidden.grad is not None
    assert (hidden.grad.abs().sum(1) == 0).tolist() == still.tolist()


@every_kind
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_extreme_logits_stay_finite(temperature: float, kind: Any, beta: float) -> None:
    """A sure student, a sure teacher, and both sure of different tokens, in float32."""
    student, teacher = random_logits(9, 30, 7).float(), random_logits(9, 30, 8)
    student[:6, 3] += 300
    teacher[3:, 4] += 300
    labels = [part if part.dtype == torch.int64 else part.float() for part in top_and_tail(teacher, 2)]
    student.requires_grad_()
    weights = torch.ones(2, 9).unbind()
    terms = completion_loss(student, torch.eye(30), torch.full((9,), 5), *labels, *weights, temperature, 4, kind, beta)
    terms.total.backward()
    assert all(term.isfinite() for term in terms) and terms.distillation > 0
    assert student.grad is not None and student.grad.isfinite().all()


@every_kind
def test_a_sure_teacher_keeps_its_tail(kind: Any, beta: float) -> None:
    """Tail masses of e^-50 vanish in 1 - sum, but not here: at T = 20 they weigh again."""
    teacher = random_logits(4, 30, 7)
    teacher[:, 3] += 60
    ids, top, tail = top_and_tail(teacher, 2)
    assert tail.max() < -40
    labels, weights = (ids, top.float(), tail.float()), (torch.zeros(4), torch.ones(4))
    targets = torch.full((4,), 3)
    loss = completion_loss(teacher.float(), torch.eye(30), targets, *labels, *weights, 20.0, 8, kind, beta).distillation
    assert loss.abs() < 1e-3


@every_kind
def test_bfloat16_products_are_near(kind: Any, beta: float) -> None:
    p = problem(64, 50, 5, torch.float32)
    arguments = (p["hidden"], p["head"], p["targets"], *p["labels"], *p["weights"], 2.0, 32, kind, beta)
    exact = completion_loss(*arguments).total
    with torch.autocast("cpu", torch.bfloat16):
        rounded = completion_loss(*arguments).total
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs() / exact < 0.01


def whole(p: dict[str, Any]) -> Whole:
    """A teacher of another width for the tokens of `problem`."""
    generator = torch.Generator().manual_seed(1)
    tokens, vocabulary, dtype = len(p["targets"]), len(p["head"]), p["head"].dtype
    hidden = torch.randn(tokens, 7, generator=generator, dtype=dtype)
    return Whole(hidden, torch.randn(vocabulary, 7, generator=generator, dtype=dtype))


@every_kind
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_whole_distribution_is_the_full_divergence(chunk: int, kind: Any, beta: float) -> None:
    """In its values and its gradient, chunked and eager."""
    p = problem(23, 50, 5, torch.float64)
    teacher, (task, distilled) = whole(p), p["weights"]
    found = []
    for fused in (False, True):
        hidden, head = (p[name].clone().requires_grad_() for name in ("hidden", "head"))
        terms: tuple[Tensor, ...]
        if fused:
            terms = whole_completion_loss(hidden, head, p["targets"], teacher, task, distilled, 2.5, chunk, kind, beta)
        else:
            ce = cross_entropy(hidden @ head.T, p["targets"])
            kd = full(teacher.hidden @ teacher.head_weight.T, hidden @ head.T, 2.5, kind, beta)
            weighted = (task * ce).sum(), (distilled * kd).sum()
            terms = (weighted[0] + weighted[1], ce.sum(), kd.sum(), *weighted)
        terms[0].backward()
        found.append([*(term.detach() for term in terms), hidden.grad, head.grad])
    torch.testing.assert_close(found[0], found[1])


@every_kind
def test_stored_labels_of_the_whole_vocabulary_are_the_whole_distribution(kind: Any, beta: float) -> None:
    p = problem(24, 50, 5, torch.float64)
    teacher = whole(p)
    labels = top_and_tail(teacher.hidden @ teacher.head_weight.T, 50)
    given, how = (p["hidden"], p["head"], p["targets"]), (*p["weights"], 2.0, 8, kind, beta)
    torch.testing.assert_close(whole_completion_loss(*given, teacher, *how), completion_loss(*given, *labels, *how))


def test_a_teacher_that_is_the_student_teaches_nothing_and_shifted_by_one_it_does() -> None:
    p = problem(24, 50, 0, torch.float64)
    hidden = p["hidden"].clone().requires_grad_()
    how = (torch.zeros(24), torch.ones(24), 2.0, 8)
    terms = whole_completion_loss(hidden, p["head"], p["targets"], Whole(p["hidden"], p["head"]), *how)
    terms.total.backward()
    assert terms.distillation.abs() < 1e-9 and hidden.grad is not None and hidden.grad.abs().max() < 1e-9
    shifted = Whole(p["hidden"].roll(1, 0), p["head"])
    assert whole_completion_loss(p["hidden"], p["head"], p["targets"], shifted, *how).distillation > 1.0


@every_kind
def test_bfloat16_products_of_both_models_are_near(kind: Any, beta: float) -> None:
    p = problem(64, 50, 0, torch.float32)
    teacher = whole(p)
    given, how = (p["hidden"], p["head"], p["targets"]), (*p["weights"], 2.0, 32, kind, beta)
    exact = whole_completion_loss(*given, teacher, *how).total
    with torch.autocast("cpu", torch.bfloat16):
        rounded = whole_completion_loss(*given, Whole(*(part.bfloat16() for part in teacher)), *how).total
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs() / exact < 0.02
