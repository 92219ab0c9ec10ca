"""The share of target rows among the training rows."""

from collections.abc import Sequence
from fractions import Fraction

from q2t.records import Example, content_id


def mix(
    target: Sequence[Example], general: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """As many rows as possible so that target rows are exactly `share` of them, counted in rows; none twice.

    Whole units are taken (0.8: four target rows with one general); when one side runs out, the other is cut.
    Ids and seed alone decide what is taken: the rows with the smallest hashes.

    Returns:
        The mixed rows, sorted by id, and the surplus that did not fit, sorted by id.

    Raises:
        ValueError: not enough rows for one unit.
    """
    ratio = Fraction(str(share))  # of the decimal that was written: 0.8 is 4/5
    per_target, per_general = ratio.numerator, ratio.denominator - ratio.numerator
    units = len(target) // per_target
    if per_general:
        units = min(units, len(general) // per_general)
    if not units:
        raise ValueError(
            f"filter.target_share {share} means {per_target} target rows for {per_general} general ones, and "
            f"only {len(target)} and {len(general)} passed the filter; ask the teachers more, or choose "
            "another share"
        )
    taken, surplus = [], []
    for rows, count in ((target, units * per_target), (general, units * per_general)):
        drawn = sorted(rows, key=lambda row: content_id(seed, row.id))
        taken += drawn[:count]
        surplus += drawn[count:]
    return sorted(taken, key=_id), sorted(surplus, key=_id)


def _id(row: Example) -> str:
    return row.id
