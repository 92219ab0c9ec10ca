"""The lessons' worked solutions as answers: what the control learns that is taught without a teacher's words."""

from pathlib import Path

from q2t.config import Teacher
from q2t.records import Completion, Problem
from q2t.sources import fingerprint, load_tokenizer
from q2t.teachers.keys import completion_key


def answers(lessons: list[Problem], teacher: Teacher, *, name: str) -> list[Completion]:
    """One answer to each lesson: its solution. Tokens are counted as `teacher.model` does, which also labels them."""
    folder = Path(teacher.model)
    tokenizer = load_tokenizer(folder)
    model = fingerprint(folder)
    rows = []
    for lesson in lessons:
        key, settings = completion_key(name, model, "", {}, lesson.id, 0, 0)
        rows.append(
            Completion(
                id=key,
                problem_id=lesson.id,
                teacher=name,
                sample=0,
                text=lesson.solution,
                finish_reason="stop",
                prompt_tokens=len(tokenizer(lesson.question).input_ids),
                completion_tokens=len(tokenizer(lesson.solution).input_ids) + 1,  # and the end
                settings=settings,
            )
        )
    return rows
