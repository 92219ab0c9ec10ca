"""Accuracy and retention with their intervals.

Retention is a model's macro accuracy divided by its teacher's. Both answer the same problems, so its interval
comes from a paired bootstrap: each resample draws problems, and takes both models' answers to them.
"""

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

Correct = Mapping[str, Sequence[bool]]
"""Family to one verdict per problem. Two models are paired by position."""
Interval = tuple[float, float]


def macro_accuracy(correct: Correct) -> float:
    """The mean over families of each family's share of correct answers, in [0, 1]."""
    return float(np.mean([np.mean(correct[family]) for family in sorted(correct)]))


def accuracy_interval(correct: Correct, *, resamples: int, confidence: float, seed: int) -> Interval:
    """Percentile bootstrap interval of the macro accuracy; problems are resampled within their family.

    It has no width where all answers are right or all are wrong; `wilson_interval` has, for one family.
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    return _percentiles(_resample([correct], resamples, seed)[0], confidence)


def retention(model: Correct, teacher: Correct) -> float | None:
    """`macro_accuracy(model) / macro_accuracy(teacher)`; None where the teacher has nothing to keep."""
    known = macro_accuracy(teacher)
    return macro_accuracy(model) / known if known > 0 else None


def retention_interval(
    model: Correct, teacher: Correct, *, resamples: int, confidence: float, seed: int
) -> Interval | None:
    """Paired percentile bootstrap interval of `retention`; None where that is.

    Resamples in which the teacher answers nothing right have no ratio, and are left out.
    """
    assert {f: len(c) for f, c in model.items()} == {f: len(c) for f, c in teacher.items()}
    kept, known = _resample([model, teacher], resamples, seed)
    defined = known > 0
    return _percentiles(kept[defined] / known[defined], confidence) if defined.any() else None


def wilson_interval(correct: int, total: int, confidence: float) -> Interval:
    """Interval of one family's accuracy, sensible at 0 and at 1 too (Wilson, JASA 22, 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def _resample(models: Sequence[Correct], resamples: int, seed: int) -> np.ndarray:
    """Macro accuracies [models, resamples]; every model is scored on the same drawn problems."""
    random = np.random.default_rng(seed)
    total = np.zeros((len(models), resamples))
    for family in sorted(models[0]):
        answers = np.array([model[family] for model in models], dtype=np.float64)  # [models, problems]
        problems = answers.shape[1]
        drawn = random.integers(problems, size=(resamples, problems))
        total += answers[:, drawn].mean(axis=2)
    return total / len(models[0])


def _percentiles(values: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
