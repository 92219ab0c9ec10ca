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
    if any(map(any, correct.values())):
        assert retention(correct, correct) == 1.0
        assert retention_interval(correct, correct, **BOOTSTRAP) in [(1.0, 1.0), None]
    else:
        assert retention(correct, correct) is None
        assert retention_interval(correct, correct, **BOOTSTRAP) is None


@given(answers)
def test_accuracy_interval_is_ordered_and_grows_with_confidence(correct: dict[str, list[bool]]) -> None:
    low, high = accuracy_interval(correct, **BOOTSTRAP)
    wide_low, wide_high = accuracy_interval(correct, **BOOTSTRAP | {"confidence": 0.99})
    assert 0 <= wide_low <= low <= high <= wide_high <= 1


@given(answers)
def test_order_of_families_changes_nothing(correct: dict[str, list[bool]]) -> None:
    backwards = dict(reversed(correct.items()))
    assert accuracy_interval(correct, **BOOTSTRAP) == accuracy_interval(backwards, **BOOTSTRAP)


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


def test_bootstrap_agrees_with_the_normal_approximation() -> None:
    correct = {"led": [i < 200 for i in range(400)]}
    half = 1.96 * (0.25 / 400) ** 0.5
    interval = accuracy_interval(correct, resamples=4000, confidence=0.95, seed=1)
    assert interval == pytest.approx((0.5 - half, 0.5 + half), abs=0.005)


def test_intervals_cover_the_truth() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        correct = {"led": (random.random(60) < 0.6).tolist(), "gain": (random.random(60) < 0.4).tolist()}
        low, high = accuracy_interval(correct, resamples=400, confidence=0.9, seed=seed)
        covered += low <= 0.5 <= high
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
