"""Properties of accuracy, retention and their intervals."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from q2t.evaluation.retention import (
    accuracy_interval,
    macro_accuracy,
    retention,
    retention_interval,
    wilson_interval,
)

BOOTSTRAP: dict[str, Any] = {"resamples": 300, "confidence": 0.95, "seed": 7}
answers = st.dictionaries(
    st.sampled_from(["led", "gain", "divider"]), st.lists(st.booleans(), min_size=1, max_size=20), min_size=1
)


def test_families_weigh_the_same_whatever_their_size() -> None:
    assert macro_accuracy({"led": [True] * 30, "gain": [False, True]}) == 0.75


@given(answers)
def test_identical_answers_are_kept_exactly(correct: dict[str, list[bool]]) -> None:
    assert retention(correct, correct) == (1.0 if any(map(any, correct.values())) else None)
    assert retention_interval(correct, correct, **BOOTSTRAP) is None  # nothing was drawn that could differ


@given(answers)
def test_accuracy_interval_holds_the_accuracy_has_width_and_grows_with_confidence(
    correct: dict[str, list[bool]],
) -> None:
    low, high = accuracy_interval(correct, 0.95)
    wide_low, wide_high = accuracy_interval(correct, 0.99)
    assert 0 <= wide_low <= low < high <= wide_high <= 1
    assert low - 1e-12 <= macro_accuracy(correct) <= high + 1e-12


@given(answers)
def test_accuracy_interval_mirrors(correct: dict[str, list[bool]]) -> None:
    low, high = accuracy_interval(correct, 0.9)
    mirrored = accuracy_interval({family: [not c for c in cs] for family, cs in correct.items()}, 0.9)
    assert mirrored == pytest.approx((1 - high, 1 - low))


@given(answers)
def test_order_of_families_changes_nothing(correct: dict[str, list[bool]]) -> None:
    backwards = dict(reversed(correct.items()))
    assert accuracy_interval(correct, 0.95) == accuracy_interval(backwards, 0.95)
    assert retention_interval(correct, correct, **BOOTSTRAP) == retention_interval(backwards, backwards, **BOOTSTRAP)


@settings(max_examples=30)
@given(answers)
def test_a_model_that_is_never_better_retains_at_most_all(teacher: dict[str, list[bool]]) -> None:
    model = {family: [c and i % 2 == 0 for i, c in enumerate(cs)] for family, cs in teacher.items()}
    interval = retention_interval(model, teacher, **BOOTSTRAP)
    assert interval is None or 0 <= interval[0] <= interval[1] <= 1


def test_pairing_narrows_the_interval() -> None:
    teacher = {"led": [i % 2 == 0 for i in range(200)]}
    same = {"led": [i % 2 == 0 and i > 8 for i in range(200)]}
    other = {"led": [i % 2 == 1 and i > 8 for i in range(200)]}  # as accurate, on other problems
    assert macro_accuracy(same) == pytest.approx(macro_accuracy(other), abs=0.01)

    def width(model: dict[str, list[bool]]) -> float:
        interval = retention_interval(model, teacher, **BOOTSTRAP)
        assert interval is not None
        return interval[1] - interval[0]

    assert width(same) < width(other) / 3


def test_nothing_right_is_no_certainty() -> None:
    nothing = {f"f{number}": [False] * 30 for number in range(10)}
    low, high = accuracy_interval(nothing, 0.95)
    assert low == 0 and 3 / 300 < high < 5 / 300  # the rule of three: 3 / n
    teacher = {family: [True] * 30 for family in nothing}
    assert retention(nothing, teacher) == 0
    assert retention_interval(nothing, teacher, **BOOTSTRAP) is None


def test_one_family_has_the_interval_of_agresti_and_coull() -> None:
    # Brown, Cai and DasGupta, Statistical Science 16, 2001, formula 5: n~ = n + z^2, p~ = (x + z^2 / 2) / n~.
    centre, half = (81 + 1.9207) / 266.8415, 1.95996 * (0.31075 * 0.68925 / 266.8415) ** 0.5
    assert accuracy_interval({"led": [n < 81 for n in range(263)]}, 0.95) == pytest.approx(
        (centre - half, centre + half), abs=1e-5
    )


@pytest.mark.parametrize(
    ("truths", "least"),
    [([0.005] * 10, 0.95), ([0.02] * 10, 0.93), ([0.5] * 10, 0.93), ([0.05, 0.3, 0.5, 0.7, 0.95] * 2, 0.93)],
)
def test_intervals_cover_the_truth(truths: list[float], least: float) -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        correct = {f"f{number}": (random.random(30) < p).tolist() for number, p in enumerate(truths)}
        low, high = accuracy_interval(correct, 0.95)
        covered += low <= np.mean(truths) <= high
    assert least <= covered / 500 < 1


def test_retention_intervals_cover_the_truth() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        known = random.random((2, 60)) < 0.8
        kept = known & (random.random((2, 60)) < 0.75)
        model, teacher = ({"led": rows[0].tolist(), "gain": rows[1].tolist()} for rows in (kept, known))
        interval = retention_interval(model, teacher, resamples=400, confidence=0.9, seed=seed)
        assert interval is not None
        covered += interval[0] <= 0.75 <= interval[1]
    assert 165 <= covered <= 195  # 180 expected


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(counts: tuple[int, int]) -> None:
    correct, total = counts
    low, high = wilson_interval(correct, total, 0.95)
    assert 0 <= low <= correct / total + 1e-12 and correct / total - 1e-12 <= high <= 1
    assert low < high
    mirrored = wilson_interval(total - correct, total, 0.95)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_wilson_against_the_published_example() -> None:
    # Newcombe, Statistics in Medicine 17, 1998, table I: 81 of 263.
    assert wilson_interval(81, 263, 0.95) == pytest.approx((0.2553, 0.3662), abs=5e-5)
