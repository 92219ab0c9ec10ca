from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q2t.curation.mixing import mix, sample
from q2t.records import Example


def rows(domain: str, count: int, family: str = "f") -> list[Example]:
    return [
        Example(
            id=f"{domain}{family}{i:03}",
            problem_id="p",
            family=family,
            domain=domain,
            teacher="t",
            question="q",
            text="x",
        )  # type: ignore[arg-type]
        for i in range(count)
    ]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 60), st.integers(0, 5))
def test_a_sample_is_as_even_over_families_as_their_rows_allow(sizes: list[int], count: int, seed: int) -> None:
    given = [row for i, size in enumerate(sizes) for row in rows("target", size, f"f{i}")]
    taken, rest = sample(given, count, seed)
    assert len(taken) == min(count, len(given))
    assert sorted(row.id for row in taken + rest) == sorted(row.id for row in given)
    have = [sum(row.family == f"f{i}" for row in taken) for i in range(len(sizes))]
    short = [number for number, size in zip(have, sizes, strict=True) if number < size]
    assert all(number >= max(have) - 1 for number in short)  # only a family that has no more has less


def test_a_sample_is_drawn_by_the_seed_and_grows() -> None:
    given = rows("target", 30, "a") + rows("target", 30, "b")
    taken, _ = sample(given, 11, 0)
    assert taken == sample(given[::-1], 11, 0)[0] != sample(given, 11, 1)[0]
    assert {row.id for row in taken} < {row.id for row in sample(given, 12, 0)[0]}
    odd = {tuple(sorted(row.family for row in sample(given, 11, seed)[0])) for seed in range(20)}
    assert len(odd) == 2  # whose turn comes in the last round is chance


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
    with pytest.raises(ValueError, match="4 target rows for 1 general ones, and only 3 and 9 are left"):
        mix(rows("target", 3), rows("general", 9), 0.8, 0)
