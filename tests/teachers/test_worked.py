"""Worked solutions as answers: every lesson once, by its own words."""

from q2t.config import Scratch, Source, Teacher
from q2t.records import Problem, content_id
from q2t.sources import fetch, load_tokenizer
from q2t.teachers import worked

LESSONS = [
    Problem(
        id=content_id(n),
        family="gain",
        domain="target",
        split="lessons",
        inputs={"n": n},
        question=f"What is {n} + 1?",
        check={},
        solution=f"<think>{n}+1={n + 1}</think><answer>{n + 1} ohm</answer>",
    )
    for n in range(5)
]


def test_every_lesson_is_answered_by_its_solution(tmp_path):
    folder = tmp_path / "tiny"
    shape = Scratch(vocabulary=300, hidden=32, intermediate=64, layers=1, heads=4, kv_heads=2)
    fetch("tiny", Source(scratch=shape), folder, corpus=[lesson.question for lesson in LESSONS])
    teacher = Teacher(
        model=str(folder), prompts="lessons", samples=1, temperature=0.0, top_p=1.0, max_new_tokens=9, batch_size=1
    )
    rows = worked.answers(LESSONS, teacher, name="lessons")
    assert [(row.problem_id, row.text, row.finish_reason) for row in rows] == [
        (lesson.id, lesson.solution, "stop") for lesson in LESSONS
    ]
    assert len({row.id for row in rows}) == 5
    assert rows == worked.answers(LESSONS, teacher, name="lessons")
    tokenizer = load_tokenizer(folder)
    assert rows[0].completion_tokens == len(tokenizer(LESSONS[0].solution + tokenizer.eos_token).input_ids)
