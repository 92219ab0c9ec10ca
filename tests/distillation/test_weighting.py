"""What a token counts: by its row, by what its row has, and by what the student knows already."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from q2t.distillation import phases
from q2t.distillation.batches import collate
from q2t.distillation.weighting import LIMIT, balance, curriculum, token_weights


def by_row(values: torch.Tensor, rows: list[Any]) -> list[float]:
    """The one value that all tokens of a row share."""
    parts = values.split([row.completion_tokens for row in rows])
    assert all((part == part[0]).all() for part in parts)
    return [float(part[0]) for part in parts]


def test_terms_share_a_rows_weight(rows: Any, settings: Any) -> None:
    """Labelled rows by alpha, the others by cross-entropy in full."""
    chosen = rows(6, unlabelled_every=3)
    task, distillation = token_weights(collate(chosen), chosen, settings, 2.0, torch.float64)
    shares = [(1.0 if i % 3 == 0 else 0.4) * row.weight for i, row in enumerate(chosen)]
    assert by_row(task, chosen) == pytest.approx(shares)
    assert by_row(distillation, chosen) == pytest.approx([0.6 * 2.0 * row.weight for row in chosen])


def test_reasoning_counts_apart_from_the_answer(rows: Any, settings: Any) -> None:
    """In both terms, and only tokens before the answer."""
    chosen = [replace(row, answer_start=0) for row in rows(4)]
    chosen[1] = replace(chosen[1], answer_start=chosen[1].completion_tokens - 1)
    batch = collate(chosen)
    plain = token_weights(batch, chosen, settings, 1.0, torch.float64)
    weighted = token_weights(batch, chosen, settings.model_copy(update={"reasoning": 0.25}), 1.0, torch.float64)
    start = chosen[0].completion_tokens
    expected = torch.ones(len(batch.targets), dtype=torch.float64)
    expected[start : start + chosen[1].completion_tokens - 1] = 0.25
    for before, after in zip(plain, weighted, strict=True):
        torch.testing.assert_close(after, before * expected)


def test_rows_that_nobody_can_check_are_learnt_from_the_teacher_alone(rows: Any, settings: Any) -> None:
    chosen, settings = rows(6), settings.model_copy(update={"teacher_only": ["general"]})
    for row in chosen[::2]:
        object.__setattr__(row, "domain", "general")
    task, distillation = token_weights(collate(chosen), chosen, settings, 1.0, torch.float64)
    assert by_row(task, chosen) == pytest.approx([(0 if i % 2 == 0 else 0.4) * r.weight for i, r in enumerate(chosen)])
    assert by_row(distillation, chosen) == pytest.approx(
        [(1 if i % 2 == 0 else 0.6) * r.weight for i, r in enumerate(chosen)]
    )


def test_the_teacher_alone_needs_labels(rows: Any, settings: Any) -> None:
    with pytest.raises(ValueError, match=r"teacher_only is \['target'\], but row r3 of domain target has no labels"):
        unlabelled = rows(4)[:3] + rows(4, unlabelled_every=3)[3:]
        phases.plan(unlabelled, settings.model_copy(update={"teacher_only": ["target"]}), seed=0)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_curriculum_follows_the_rows_loss(chunk: int, rows: Any) -> None:
    chosen = rows(5)
    batch = collate(chosen)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(batch.targets), 8, generator=generator, dtype=torch.float64)
    head = 0.5 * torch.randn(300, 8, generator=generator, dtype=torch.float64)
    losses = torch.nn.functional.cross_entropy(hidden @ head.T, batch.targets, reduction="none")
    means = [float(part.mean()) for part in losses.split([row.completion_tokens for row in chosen])]
    for strength, expected in (
        (2.0, [(1 - math.exp(-loss)) ** 2 for loss in means]),
        (-0.5, [math.exp(-0.5 * loss) for loss in means]),
    ):
        factors = curriculum(hidden, head, batch.targets, chosen, strength, chunk)
        assert not factors.requires_grad
        assert by_row(factors, chosen) == pytest.approx(expected)


def test_balance_brings_distillation_to_the_size_of_cross_entropy() -> None:
    assert balance([3.0, 1.0], [0.5, 0.5]) == 4.0
    assert balance([], []) == 1.0 == balance([1.0], [0.0])
    assert (balance([1.0], [1e-9]), balance([1e-9], [1.0])) == (LIMIT, 1 / LIMIT)
