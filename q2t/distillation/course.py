"""A training run as a section of params.yaml describes it: the loop, and the teachers that it asks for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from q2t.config import Compute, Distill
from q2t.distillation import phases
from q2t.distillation.loop import train
from q2t.distillation.on_policy import Sampler
from q2t.distillation.online import OnlineTeacher
from q2t.distillation.rows import NO_SYSTEMS, Row
from q2t.records import Example


def learn(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[Example],
    to_student: Sequence[int],
    settings: Distill,
    *,
    compute: Compute,
    checkpoints: Path,
    curve: Path,
    systems: Mapping[str, str] = NO_SYSTEMS,
    told: Mapping[str, str] = NO_SYSTEMS,
) -> Any:
    """`train`, with the seed of the settings and with what `online` and `on_policy` name, which is checked first.

    Args:
        tokenizer: the model's.
        examples: those of the rows, as text.
        to_student: [teacher vocabulary], student id or -1.
        systems: the system prompt of each teacher that has one, by name.
        told: the same by model folder, of those that answer the questions.

    Raises:
        ValueError: as `train`, `OnlineTeacher` and `Sampler`.
    """
    seed, in_phases = settings.seed, settings.in_phases()
    sampler = Sampler(tokenizer, to_student, examples, seed=seed, compute=compute, told=told)
    for phase in in_phases:
        if phase.on_policy:
            sampler.teacher_map(phase.on_policy)
    teacher = None
    beside = {i for phase in in_phases if phase.online for i in phases.select(rows, phase, seed)}
    if beside:
        assert settings.online
        learnt = [rows[i] for i in sorted(beside)]
        teacher = OnlineTeacher(
            settings.online, model, tokenizer, learnt, examples, seed=seed, compute=compute, systems=systems
        )
    return train(
        model,
        rows,
        settings,
        seed=seed,
        compute=compute,
        checkpoints=checkpoints,
        curve=curve,
        teacher=teacher,
        sampler=sampler,
    )
