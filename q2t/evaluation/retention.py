"""Accuracy and retention with their intervals.

Accuracy has intervals from formulas that hold at 0 and at 1 as well. Retention is a model's macro accuracy divided
by its teacher's. Both answer the same problems, so its interval comes from a paired bootstrap: each resample draws
problems, and takes both models' answers to them.
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


def accuracy_interval(correct: Correct, confidence: float) -> Interval:
    """Interval of the macro accuracy, sensible at 0 and at 1 too.

    The families are the strata: each gets its share of z^2 imaginary problems, half of them answered right, and the
    normal interval of the mean follows. With one family this is Agresti and Coull's interval. A percentile bootstrap
    has no width where all answers are right or all are wrong.
    Price and Bonett, Computational Statistics and Data Analysis 45, 2004, who write 4 for z^2: 95%.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    added = z * z / len(correct)
    totals = np.array([len(correct[family]) for family in sorted(correct)]) + added
    shares = (np.array([sum(correct[family]) for family in sorted(correct)]) + added / 2) / totals
    centre = float(shares.mean())
    half = z * float(np.sqrt((shares * (1 - shares) / totals).sum())) / len(correct)
    return max(0.0, centre - half), min(1.0, centre + half)


def retention(model: Correct, teacher: Correct) -> float | None:
    """`macro_accuracy(model) / macro_accuracy(teacher)`; None where the teacher has nothing to keep."""
    known = macro_accuracy(teacher)
    return macro_accuracy(model) / known if known > 0 else None


def retention_interval(
    model: Correct, teacher: Correct, *, resamples: int, confidence: float, seed: int
) -> Interval | None:
    """Paired percentile bootstrap interval of `retention`; None where that is.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Resamples in which the teacher answers nothing right have no ratio, and are left out. None too where all the others
    say the same, as of a model with nothing right, or of the teacher itself: that is no certainty.
    """
    assert {f: len(c) for f, c in model.items()} == {f: len(c) for f, c in teacher.items()}
    kept, known = _resample([model, teacher], resamples, seed)
    defined = known > 0
    ratios = kept[defined] / known[defined]
    if len(set(ratios)) < 2:
        return None
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


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
