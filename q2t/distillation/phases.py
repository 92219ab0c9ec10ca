"""The plan of a run: its phases, each with rows, losses and learning rate of its own, and their steps in one line."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from q2t.config import Distill
from q2t.distillation import batches
from q2t.distillation.rows import Row
from q2t.records import content_id

MICRO_BATCH = 4
"""Rows of a forward pass, at most, all near in length. The fewer, the less padding; and a step of several mixes
lengths, and so families."""


@dataclass(frozen=True)
class Step:
    """One optimiser step. A function of rows, settings and seed alone, so that a resumed run needs no state of it."""

    phase: int
    """From 1."""
    place: int
    """Steps of the phase before this one."""
    settings: Distill
    """The phase's."""
    learning_rate: float
    micro_batches: list[list[Row]]


Answers = Callable[[Distill, int, list[Row]], list[Row]]
"""Rows that the student answered itself, for a phase, its number and the rows whose questions it asks."""


def plan(rows: Sequence[Row], settings: Distill, *, seed: int, answers: Answers | None = None) -> Iterator[Step]:
    """All steps of all phases. Epochs are counted through, so that no two have the same order.

    What can be wrong is found at once; the rows of a phase that is on policy are asked for as it begins.

    Raises:
        ValueError: a phase has no rows, or one that it would learn nothing from.
    """
    in_phases = settings.in_phases()
    chosen = [[rows[i] for i in select(rows, phase, seed)] for phase in in_phases]
    for phase, of_phase in zip(in_phases, chosen, strict=True):
        if not phase.on_policy and not (phase.online and phase.online.logits):
            _check_labels(of_phase, phase.teacher_only)
    return _steps(list(zip(in_phases, chosen, strict=True)), seed, answers)


def _steps(in_phases: list[tuple[Distill, list[Row]]], seed: int, answers: Answers | None) -> Iterator[Step]:
    epoch = 0
    for number, (phase, rows) in enumerate(in_phases, 1):
        if phase.on_policy:
            assert answers
            rows = answers(phase, number, rows)
            # Nobody says that its own words are right: they are learnt from by the teacher's labels alone.
            phase = phase.model_copy(update={"teacher_only": phase.domains})
        lengths = [len(row.input_ids) for row in rows]
        micro_batch = max(n for n in range(1, MICRO_BATCH + 1) if phase.batch_size % n == 0)
        steps = [
            [[rows[i] for i in micro] for micro in step]
            for e in range(epoch, epoch + phase.epochs)
            for step in batches.plan(lengths, phase.batch_size, micro_batch, seed=seed, epoch=e)
        ]
        epoch += phase.epochs
        for place, micro_batches in enumerate(steps):
            rate = phase.learning_rate * schedule(place, len(steps), phase.warmup, phase.schedule)
            yield Step(number, place, phase, rate, micro_batches)


def tokens(rows: Sequence[Row], settings: Distill, *, seed: int) -> int:
    """Tokens of all steps, prompts included; those of the student's own answers are taken to be as many as the
    rows' answers."""
    return sum(
        phase.epochs * sum(len(rows[i].input_ids) for i in select(rows, phase, seed)) for phase in settings.in_phases()
    )


def select(rows: Sequence[Row], settings: Distill, seed: int) -> list[int]:
    """Indices of the rows that are learnt from, in order: those of the domains, and of these a share.

    Ids and seed alone decide which, and a larger share contains the smaller ones.

    Raises:
        ValueError: there is no row of these domains.
    """
    chosen = [i for i, row in enumerate(rows) if row.domain in settings.domains]
    if not chosen:
        raise ValueError(
            f"domains is {settings.domains}, and no training row is of these: name a domain that "
            "filter.target_share leaves rows of"
        )
    drawn = sorted(chosen, key=lambda i: content_id(seed, rows[i].id))
    return sorted(drawn[: max(1, round(settings.share * len(drawn)))])


def _check_labels(rows: Sequence[Row], teacher_only: Sequence[str]) -> None:
    for row in rows:
        if row.domain in teacher_only and not len(row.top_ids):
            raise ValueError(
                f"teacher_only is {teacher_only}, but row {row.id} of domain {row.domain} has no labels, so that "
                "nothing would be learnt from it: let a model at hand answer these prompts, or leave the domain out"
            )


def schedule(step: int, steps: int, warmup: float, shape: Literal["linear", "cosine", "constant"] = "linear") -> float:
    """Factor on the learning rate at a step from 0: linear warm-up over a share of the steps, then the shape.

    linear and cosine (SGDR without restarts, arXiv 1608.03983) end one step before 0.
    """
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    left = (steps - step) / (steps - warm)
    return {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[shape]
