from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q2t.curation.mixing import mix
from q2t.records import Example


def rows(domain: str, count: int) -> list[Example]:
    return [
        Example(
            id=f"{domain}{i:03}",
            problem_id="p",
            family="f",
            domain=domain,
            teacher="t",
            question="q",
            text="x",
        )  # type: ignore[arg-type]
        for i in range(count)
    ]


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([0.5, 0.6, 0.75, 0.8, 0.9, 1.0]),
    st.integers(0, 5),
)
def test_the_share_is_exact_and_no_larger_mix_exists(targets: int, generals: int, share: float, seed: int) -> None:
    exact = Fraction(str(share))
    best = max(
        (t + g for t in range(1, targets + 1) for g in range(generals + 1) if Fraction(t, t + g) == exact),
        default=0,
    )
    target, general = rows("target", targets), rows("general", generals)
    if not best:
        with pytest.raises(ValueError, match="target_share"):
            mix(target, general, share, seed)
        return
    taken, surplus = mix(target, general, share, seed)
    assert len(taken) == best
    assert Fraction(sum(row.domain == "target" for row in taken), len(taken)) == exact
    assert sorted(row.id for row in taken + surplus) == sorted(row.id for row in target + general)


def test_order_does_not_matter_and_the_seed_does() -> None:
    target, general = rows("target", 50), rows("general", 5)
    taken = mix(target, general, 0.8, 0)
    assert taken == mix(target[::-1], general[::-1], 0.8, 0)
    assert taken != mix(target, general, 0.8, 1)
    assert [row.id for row in taken[0]] == sorted(row.id for row in taken[0])


def test_one_row_more_changes_few() -> None:
    small = {row.id for row in mix(rows("target", 100), rows("general", 10), 0.8, 0)[0]}
    large = {row.id for row in mix(rows("target", 100), rows("general", 11), 0.8, 0)[0]}
    assert small < large and len(large - small) == 5


def test_the_error_names_both_counts() -> None:
    with pytest.raises(ValueError, match="4 target rows for 1 general ones, and only 3 and 9 passed"):
        mix(rows("target", 3), rows("general", 9), 0.8, 0)
