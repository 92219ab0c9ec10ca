"""The student's own answers, with what a teacher says of each of their tokens: generalised knowledge distillation (GKD,
arXiv 2306.13649), sampled once as a phase begins, so that a phase is repeatable and resumes as any other.

A student that learns from others' texts alone never sees the states that its own mistakes lead to.
"""

import copy
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from q2t.config import Compute, OnPolicy
from q2t.deployment.runtime import Request, load
from q2t.distillation.adapters import merge
from q2t.distillation.alignment import difference
from q2t.distillation.labels import cover, label
from q2t.distillation.rows import NO_SYSTEMS, Row, encode
from q2t.records import Completion, Example, content_id
from q2t.sources import load_model, load_tokenizer, save_model
from q2t.teachers.journal import Journal

logger = logging.getLogger(__name__)
FEWEST = 0.5
"""Share of the questions whose answers have to be of use."""
NO_CHARACTER = "\ufffd"
"""What bytes that are no UTF-8 are decoded to."""


class Sampler:
    """Asks the student, then the teacher."""

    def __init__(
        self,
        tokenizer: Any,
        to_student: Sequence[int],
        examples: Sequence[Example],
        *,
        seed: int,
        compute: Compute,
        told: Mapping[str, str] = NO_SYSTEMS,
    ) -> None:
        """Args:
        tokenizer: the student's.
        to_student: [teacher vocabulary], student id or -1.
        examples: of the training rows: their questions.
        told: the system prompt of each model folder that answers the questions behind one.
        """
        self.tokenizer = tokenizer
        self.to_student = torch.tensor(to_student)
        self.examples = {example.id: example for example in examples}
        self.seed = seed
        self.compute = compute
        self.told = told

    def __call__(self, model: Any, rows: Sequence[Row], settings: OnPolicy, phase: int, journal: Path) -> list[Row]:
        """One labelled answer to each question of the rows, in the order and with the weight of its first row.

        Left out are answers that were cut, empty ones, and those whose labels would sit beside tokens that the student
        did not write (bytes that are no UTF-8 are another text once decoded) or that the teacher reads otherwise (words
        that a student with a trimmed vocabulary has other tokens for). A word that the student put together otherwise
        than its tokenizer would is kept, in the tokenizer's tokens; special tokens inside an answer are passed over.

        Args:
            model: the student, with adapters or without; comes back as it was.
            phase: its number; another one draws other answers.
            journal: a file of this run and phase alone, where answers are as soon as they are given: a run that is
                killed and comes again to this phase, with the same student, does not ask for them again.

        Raises:
            ValueError: fewer than half of the answers are of use; says why. Or the teacher is no model folder, or has
                another vocabulary than the one that the student's was cut from.
        """
        teacher, to_student = self.teacher_map(settings)
        asked: dict[str, Example] = {}
        for row in rows:
            asked.setdefault(self.examples[row.id].problem_id, self.examples[row.id])
        answers = self._answers(model, list(asked.values()), settings, phase, Journal(journal))
        own = [
            example.model_copy(
                update={
                    "id": content_id(problem, phase, answer.text),
                    "text": answer.text,
                    "teacher": settings.teacher
                    if example.domain == "target"
                    else "",  # it scores, behind its own prompt
                }
            )
            for (problem, example), answer in zip(asked.items(), answers, strict=True)
        ]
        kept = self._of_use(own, answers, teacher, to_student.numpy(), settings, phase)
        return label(
            load_model(Path(settings.teacher), self.compute.dtype).to(self.compute.device),
            teacher,
            kept,
            top_k=settings.top_k,
            batch_size=settings.batch_size,
            to_student=to_student,
            student_tokenizer=self.tokenizer,
            systems=self.told,
        )

    def teacher_map(self, settings: OnPolicy) -> tuple[Any, torch.Tensor]:
        """The teacher's tokenizer, and [its vocabulary] the student's id or -1, as it may have tokens of its own.

        Raises:
            ValueError: no model folder, a vocabulary that the student's was not cut from, or too many labels.
        """
        try:
            teacher = load_tokenizer(Path(settings.teacher))
        except ValueError as error:
            raise ValueError(f"on_policy.teacher: {error}") from None
        if other := difference(self.tokenizer, teacher, self.to_student.tolist()):
            raise ValueError(
                f"on_policy.teacher: {other}. Take the model that the student's vocabulary was cut from, or one that "
                "was trained from it"
            )
        to_student = cover(self.to_student, teacher)
        if settings.top_k >= (known := int((to_student >= 0).sum())):
            raise ValueError(f"on_policy.top_k is {settings.top_k}, but the student knows {known} tokens: choose fewer")
        return teacher, to_student

    def _answers(
        self, model: Any, asked: list[Example], settings: OnPolicy, phase: int, journal: Journal
    ) -> list[Completion]:
        """By the runtime that evaluates it, so that it answers as it will."""
        if hasattr(model, "peft_config"):
            model = copy.deepcopy(model)  # the adapters are trained on
            merge(model)
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, self.tokenizer, Path(folder) / "student")
            student = load(Path(folder) / "student", self.compute)
            keys = [content_id(self.seed, phase, example.problem_id) for example in asked]
            requests = [
                Request(student.prompt(example.question), int(key, 16))
                for example, key in zip(asked, keys, strict=True)
            ]
            batches = student.generate(
                requests,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                batch_size=settings.batch_size,
                finished={place for place, key in enumerate(keys) if key in journal.rows},
                describe=f"phase {phase}, own answers",
            )
            for batch in batches:
                journal.append(
                    Completion(
                        id=keys[place],
                        problem_id=asked[place].problem_id,
                        teacher="the student",
                        sample=0,
                        settings={},
                        **vars(answer),
                    )
                    for place, answer in batch
                )
        return [journal.rows[key] for key in keys]

    def _of_use(
        self,
        own: list[Example],
        answers: list[Completion],
        teacher: Any,
        to_student: np.ndarray,
        settings: OnPolicy,
        phase: int,
    ) -> list[Example]:
        kept: list[Example] = []
        left_out: Counter[str] = Counter()
        for example, answer, theirs, ours in zip(
            own, answers, encode(teacher, own), encode(self.tokenizer, own), strict=True
        ):
            if answer.finish_reason == "length":
                left_out[f"cut at max_new_tokens ({settings.max_new_tokens})"] += 1
            elif not example.text.strip():
                left_out["empty"] += 1
            elif NO_CHARACTER in example.text:
                left_out["no UTF-8"] += 1
            elif not np.array_equal(
                to_student[theirs.input_ids[theirs.prompt_length :]], ours.input_ids[ours.prompt_length :]
            ):
                left_out["other tokens for the teacher"] += 1
            else:
                kept.append(example)
        if left_out:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(left_out.items()))
            said = f"{len(kept)} of the student's {len(own)} answers in phase {phase} are of use ({reasons})"
            if len(kept) < FEWEST * len(own):
                raise ValueError(
                    f"on_policy: {said}; half of them have to be: raise max_new_tokens, or let a longer phase before "
                    "this one teach the student to answer"
                )
            logger.warning("%s; the others are left out", said)
        return kept
