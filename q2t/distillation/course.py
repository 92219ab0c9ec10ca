"""A training run as a section of params.yaml describes it: the loop, and the teachers that it asks for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from q2t.config import Compute, Distill
from q2t.distillation.labels import Row
from q2t.distillation.loop import train
from q2t.distillation.on_policy import Sampler
from q2t.distillation.online import OnlineTeacher
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
) -> Any:
    """`train`, with the seed of the settings and with what `online` and `on_policy` name.

    Args:
        tokenizer: the model's.
        examples: those of the rows, as text.
        to_student: [teacher vocabulary], student id or -1.
    """
    seed, teacher = settings.seed, None
    if settings.online:
        teacher = OnlineTeacher(settings.online, model, tokenizer, rows, examples, seed=seed, compute=compute)
    return train(
        model,
        rows,
        settings,
        seed=seed,
        compute=compute,
        checkpoints=checkpoints,
        curve=curve,
        teacher=teacher,
        sampler=Sampler(tokenizer, to_student, examples, seed=seed, compute=compute),
    )
