"""The student's own answers, with what a teacher says of each of their tokens: generalised knowledge distillation (GKD,
arXiv 2306.13649), sampled once as a phase begins, so that a phase is repeatable and resumes as any other.

A student that learns from others' texts alone never sees the states that its own mistakes lead to.
"""

import copy
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from q2t.config import Compute, OnPolicy
from q2t.deployment.runtime import Answer, Request, load
from q2t.distillation.adapters import merge
from q2t.distillation.alignment import check_map
from q2t.distillation.labels import Row, encode, label
from q2t.records import Example, content_id
from q2t.sources import load_model, load_tokenizer, save_model

logger = logging.getLogger(__name__)
FEWEST = 0.5
"""Share of the questions whose answers have to be of use."""


class Sampler:
    """Asks the student, then the teacher."""

    def __init__(
        self, tokenizer: Any, to_student: Sequence[int], examples: Sequence[Example], *, seed: int, compute: Compute
    ) -> None:
        """Args:
        tokenizer: the student's.
        to_student: [teacher vocabulary], student id or -1.
        examples: of the training rows: their questions.
        """
        self.tokenizer = tokenizer
        self.to_student = torch.tensor(to_student)
        self.examples = {example.id: example for example in examples}
        self.seed = seed
        self.compute = compute

    def __call__(self, model: Any, rows: Sequence[Row], settings: OnPolicy, phase: int) -> list[Row]:
        """One labelled answer to each question of the rows, in their order.

        Left out are answers that were cut, and those with words that the teacher has other tokens for than a student
        with a trimmed vocabulary: labels would sit beside the wrong tokens.

        Args:
            phase: its number; another one draws other answers.

        Raises:
            ValueError: the teacher has another vocabulary, or fewer than half of the answers are of use; says why.
        """
        asked = list({e.problem_id: e for e in (self.examples[row.id] for row in rows)}.values())
        teacher = load_tokenizer(Path(settings.teacher))
        check_map(self.tokenizer, teacher, self.to_student.tolist(), "on_policy.teacher")
        own: list[Example] = []
        wrong: Counter[str] = Counter()
        for example, answer in zip(asked, self._answers(model, asked, settings, phase), strict=True):
            text = answer.text
            written = example.model_copy(update={"id": content_id(example.problem_id, phase, text), "text": text})
            if answer.finish_reason == "length":
                wrong[f"are cut at max_new_tokens ({settings.max_new_tokens})"] += 1
            elif not text.strip():
                wrong["are empty"] += 1
            elif not self._same_tokens(written, teacher):
                wrong["have other tokens for the teacher"] += 1
            else:
                own.append(written)
        if wrong:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(wrong.items()))
            said = f"of the student's {len(asked)} answers in phase {phase}, {reasons}"
            if len(own) < FEWEST * len(asked):
                raise ValueError(f"on_policy: {said}: let an earlier phase teach it to answer, or give more tokens")
            logger.warning("%s: they are left out", said)
        return label(
            load_model(Path(settings.teacher), self.compute.dtype).to(self.compute.device),
            teacher,
            own,
            top_k=settings.top_k,
            batch_size=settings.batch_size,
            to_student=self.to_student,
            student_tokenizer=self.tokenizer,
        )

    def _answers(self, model: Any, asked: list[Example], settings: OnPolicy, phase: int) -> list[Answer]:
        """By the runtime that evaluates it, so that it answers as it will."""
        if hasattr(model, "peft_config"):
            model = copy.deepcopy(model)  # the adapters are trained on
            merge(model)
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, self.tokenizer, Path(folder) / "student")
            student = load(Path(folder) / "student", self.compute)
            requests = [
                Request(student.prompt(e.question), int(content_id(self.seed, phase, e.problem_id), 16)) for e in asked
            ]
            batches = student.generate(
                requests,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                batch_size=settings.batch_size,
                describe=f"phase {phase}, own answers",
            )
            answers = dict(pair for batch in batches for pair in batch)
        return [answers[place] for place in range(len(asked))]

    def _same_tokens(self, example: Example, teacher: Any) -> bool:
        (theirs,), (ours,) = encode(teacher, [example]), encode(self.tokenizer, [example])
        return np.array_equal(self.to_student.numpy()[theirs.input_ids], ours.input_ids)
