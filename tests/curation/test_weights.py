"""What rows count: against each other, never in all."""

from typing import Any

import pytest

from q2t.config import Filter, Weights
from q2t.curation.weights import weigh
from q2t.records import Example

PLAIN: dict[str, Any] = {"domain": {"target": 1.0, "general": 1.0}, "teacher": {}, "difficulty": 0.0}


def example(number: int, domain: str = "target", teacher: str = "expert") -> Example:
    return Example(
        id=f"e{number}",
        problem_id=f"p{number}",
        family="led",
        domain=domain,  # type: ignore[arg-type]
        teacher=teacher,
        question="?",
        text="!",
    )


ROWS = [example(0), example(1), example(2, teacher="other"), example(3, "general", "base")]
VERIFIED = {"p0": 1.0, "p1": 0.25, "p2": 0.5, "p3": 0.5}


def weights(**changes: Any) -> list[float]:
    weighed = weigh(ROWS, VERIFIED, Weights(**PLAIN | changes))
    assert [row.model_copy(update={"weight": 1.0}) for row in weighed] == ROWS
    found = [row.weight for row in weighed]
    assert sum(found) / len(found) == pytest.approx(1)
    return [weight / found[0] for weight in found]


def test_by_default_every_row_counts_one() -> None:
    assert [row.weight for row in weigh(ROWS * 3, VERIFIED, Weights(**PLAIN))] == [1.0] * 12


def test_domain_teacher_and_difficulty_multiply() -> None:
    assert weights(domain={"target": 4.0, "general": 1.0}) == pytest.approx([1, 1, 1, 0.25])
    assert weights(teacher={"other": 3.0}) == pytest.approx([1, 1, 3, 1])
    assert weights(difficulty=1.0) == pytest.approx([1, 4, 2, 1])  # general rows have no verdict
    assert weights(difficulty=-1.0) == pytest.approx([1, 0.25, 0.5, 1])
    assert weights(domain={"target": 2.0, "general": 1.0}, teacher={"other": 3.0}, difficulty=0.5) == pytest.approx(
        [1, 2, 3 * 2**0.5, 0.5]
    )


def test_a_weight_for_a_teacher_that_is_not_read_is_refused() -> None:
    given = {"teachers": ["expert"], "target_share": 0.8, "max_tokens": 99, "max_rows": None, "keep_incorrect": False}
    with pytest.raises(ValueError, match=r"weights.teacher names \['exprt'\], which are not among teachers: expert"):
        Filter(**given, weights=Weights(**PLAIN | {"teacher": {"exprt": 2.0}}))


def test_both_domains_have_a_weight_above_zero() -> None:
    for domain in ({"target": 1.0}, {"target": 1.0, "general": 0.0}, {"target": 1.0, "generall": 1.0}):
        with pytest.raises(ValueError, match="domain"):
            Weights(**PLAIN | {"domain": domain})
