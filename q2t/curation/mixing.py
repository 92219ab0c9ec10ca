"""How many of the kept rows are trained on: a sample of the target rows, and their share in the mix."""

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

from q2t.records import Example, content_id


def sample(rows: Sequence[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """`count` of the rows or, if there are fewer, all: as many of each family as of the others, or all that it has.

    Ids and seed alone decide what is taken, and a larger sample contains the smaller ones.

    Returns:
        The sample and the rest.
    """
    families: dict[str, list[Example]] = defaultdict(list)
    for row in _drawn(rows, seed):
        families[row.family].append(row)
    # One row of each family in turn; in the last round it is chance whose turn comes.
    turns = {row.id: turn for family in families.values() for turn, row in enumerate(family)}
    drawn = sorted(_drawn(rows, seed), key=lambda row: turns[row.id])
    return drawn[:count], drawn[count:]


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
            f"only {len(target)} and {len(general)} are left after the filter and its max_rows; ask the teachers more, "
            "or choose another share or max_rows"
        )
    taken, surplus = [], []
    for rows, count in ((target, units * per_target), (general, units * per_general)):
        drawn = _drawn(rows, seed)
        taken += drawn[:count]
        surplus += drawn[count:]
    return sorted(taken, key=_id), sorted(surplus, key=_id)


def _drawn(rows: Sequence[Example], seed: int) -> list[Example]:
    """All rows in a random order that their ids and the seed decide."""
    return sorted(rows, key=lambda row: content_id(seed, row.id))


def _id(row: Example) -> str:
    return row.id
