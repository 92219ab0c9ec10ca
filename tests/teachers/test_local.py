"""The local teacher: K answers a problem, and a killed run ends with the bytes of an uninterrupted one."""

import pytest

from q2t.config import Compute, Scratch, Source, Teacher
from q2t.records import Problem, dump_line
from q2t.sources import fetch
from q2t.teachers.journal import Journal
from q2t.teachers.local import answers

COMPUTE = Compute(threads=1, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    shape = Scratch(vocabulary=300, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2)
    fetch("tiny", Source(scratch=shape), folder)
    return Teacher(
        model=str(folder),
        prompts="general",
        samples=3,
        temperature=1.0,
        top_p=0.95,
        max_new_tokens=8,
        batch_size=4,
    )


PROBLEMS = [
    Problem(
        id=f"{i:016x}",
        family="general",
        domain="general",
        split="general",
        inputs={},
        question=f"Say {'so ' * i}something.",
        check={},
    )
    for i in range(5)
]


def run(teacher, journal):
    return answers(PROBLEMS, teacher, journal, name="t", seed=1, compute=COMPUTE)


def test_k_answers_in_the_order_of_the_problems(teacher, tmp_path):
    rows = run(teacher, Journal(tmp_path / "j.jsonl"))
    assert [(row.problem_id, row.sample) for row in rows] == [(p.id, k) for p in PROBLEMS for k in range(3)]
    assert len({row.text for row in rows}) > 5


class Killed(BaseException):
    pass


class Mortal(Journal):
    """Dies at the start of the given append, half of its rows written."""

    left = 0

    def append(self, rows):
        if self.left == 0:
            super().append(list(rows)[:2])
            raise Killed
        self.left -= 1
        super().append(rows)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_resumed_run_gives_the_bytes_of_an_uninterrupted_one(teacher, tmp_path, batches):
    whole = [dump_line(row) for row in run(teacher, Journal(tmp_path / "whole.jsonl"))]
    mortal = Mortal(tmp_path / "killed.jsonl")
    mortal.left = batches
    with pytest.raises(Killed):
        run(teacher, mortal)
    with open(tmp_path / "killed.jsonl", "a") as journal:
        journal.write('{"id": "half a li')
    assert [dump_line(row) for row in run(teacher, Journal(tmp_path / "killed.jsonl"))] == whole


def test_nothing_is_asked_twice_and_other_sampling_is_asked_anew(teacher, tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    run(teacher, journal)
    size = journal.path.stat().st_size
    run(teacher, Journal(journal.path))
    assert journal.path.stat().st_size == size
    warmer = teacher.model_copy(update={"temperature": 1.2})
    assert {r.id for r in run(warmer, Journal(journal.path))}.isdisjoint(journal.rows)
