import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q2t.capability.electronics.values import E12, E24, draw_value, next_e12, ohms, parse, scientific, shown

positive = st.floats(1e-9, 1e9, allow_nan=False)


def test_e24_is_that_of_the_standard():
    """IEC 60063, table 1; six of its values are not the rounded powers 10^(n/24)."""
    standard = "1.0 1.1 1.2 1.3 1.5 1.6 1.8 2.0 2.2 2.4 2.7 3.0 3.3 3.6 3.9 4.3 4.7 5.1 5.6 6.2 6.8 7.5 8.2 9.1"
    assert list(map(float, standard.split())) == list(E24)
    assert E24[::2] == E12


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("560 ohm", "ohm", 560),
        ("4.7k ohm", "ohm", 4700),
        ("4.7 kohm", "ohm", 4700),
        ("4700", "ohm", 4700),
        ("10 kΩ", "ohm", 10_000),
        ("16.9e-9 F", "F", 16.9e-9),
        ("16.9 nF", "F", 16.9e-9),
        ("560R", "ohm", 560),
        ("560 R", "ohm", 560),
        ("0.56 kOhm", "ohm", 560),
        ("47 k Ω", "ohm", 47_000),
        ("4,700 ohm", "ohm", 4700),
        ("1.5e4", "ohm", 15_000),
        ("5.6e-1 kohm", "ohm", 560),
        ("-47k", "ohm", -47_000),
        ("−47k", "ohm", -47_000),
        ("0.53 nf", "F", 0.53e-9),
        ("0.00000000053 farads", "F", 0.53e-9),
        ("530f", "F", 530),
        ("5 mA", "A", 0.005),
        ("2.5M", "ohm", 2.5e6),
        ("2.5m", "ohm", 2.5e-3),
        ("4k7", "ohm", 4700),
        ("4K7 Ω", "ohm", 4700),
        ("2R2", "ohm", 2.2),
        ("2R2 ohm", "ohm", 2.2),
        ("10M5 ohm", "ohm", 10.5e6),
        ("3n3", "F", 3.3e-9),
        ("3n3F", "F", 3.3e-9),
        ("4.7 × 10³ Ω", "ohm", 4700),
        ("4.7x10^3", "ohm", 4700),
        ("1.69*10**-8 F", "F", 16.9e-9),
        ("16.9 · 10⁻⁹ F", "F", 16.9e-9),
        ("16.9 ⋅ 10^{-9} F", "F", 16.9e-9),
        ("4.7X10^{3}", "ohm", 4700),
        ("1.69e−8 F", "F", 16.9e-9),
        ("16.9 nanofarads", "F", 16.9e-9),
        ("16.9 Nano-Farad", "F", 16.9e-9),
        ("4.7 kilohms", "ohm", 4700),
        ("4.7 kilo-ohms", "ohm", 4700),
        ("2 Megohm", "ohm", 2e6),
        ("4.7MEG", "ohm", 4.7e6),
        ("560 ohm.", "ohm", 560),
        ("4.7 kΩ.", "ohm", 4700),
        ("10 mH", "H", 0.01),
        ("10 millihenrys", "H", 0.01),
        ("3V3", "V", 3.3),
        ("1.5 MHz", "Hz", 1.5e6),
        ("2 ms", "s", 0.002),
        ("-5 V", "V", -5),
    ],
)
def test_what_engineers_write_is_read(text, unit, value):
    assert parse(text, unit) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        *("", "ohm", "about 5", "5 F", "1k or 2k", "inf ohm", "nan ohm", "-", "5 V", "1e999 ohm", "5 kk"),
        *(
            "4,7k ohm",
            "5,60 ohm",
            "0,560 ohm",
            "560 ohm -- or 680 ohm",
            "560 ohm # no, 680",
            "1 ohm = 560 ohm",
            "4k7k",
            "4700-",
            "4700 k-",
            "4.7 k\u0131lo ohm",
            "4.7 k\u0130lo ohm",
            "4k7.5",
            "4k700",
            "4n7",
            "4.7 10³",
            "4.7 × 10",
            "4.7 × 103",
            "4.7 × 10{3}",
            "4.7 × 10^{3",
            "4.7 nanofarads",
            "R = 560",
        ),
    ],
)
def test_what_is_no_single_resistance_is_refused(text):
    with pytest.raises(ValueError, match="quantity"):
        parse(text, "ohm")


PIECES = [" ", *"4 7 . , - − e3 k R kilo k\u0131lo Meg ohm Ω ×10 ^ ³ ⁻ n".split()]


@given(st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=9).map("".join), st.sampled_from(["ohm", "F"]))
def test_any_text_is_a_number_or_refused(text, unit):
    try:
        assert math.isfinite(parse(text, unit))
    except ValueError:
        pass


@pytest.mark.parametrize("text", ["4" * 20_000 + "x", "4" + " " * 20_000 + "x"])
def test_a_long_text_is_refused_at_once(text):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="quantity"):
        parse(text, "ohm")
    assert time.perf_counter() - start < 1


@given(positive)
def test_next_e12_is_the_smallest_value_not_below(value):
    found = next_e12(value)
    assert found >= value * (1 - 1e-6)
    decade = 10.0 ** math.floor(math.log10(found) + 1e-9)
    assert any(math.isclose(found, m * decade, rel_tol=1e-9) for m in E12)
    below = [m * d for d in (decade / 10, decade) for m in E12 if m * d < found * (1 - 1e-9)]
    assert max(below) < value


def test_a_value_of_the_series_is_its_own_next():
    for decade in range(-6, 7):
        for mantissa in E12:
            assert next_e12(mantissa * 10.0**decade) == pytest.approx(mantissa * 10.0**decade, rel=1e-9)


@given(st.sampled_from(E24), st.integers(0, 5))
def test_a_shown_resistance_reads_back(mantissa, decade):
    value = mantissa * 10.0**decade
    assert parse(ohms(value), "ohm") == pytest.approx(value, rel=1e-9)


@given(st.sampled_from(E24), st.integers(-11, 2), st.sampled_from(["F", "V", "A"]))
def test_any_other_shown_quantity_reads_back(mantissa, decade, unit):
    value = mantissa * 10.0**decade
    assert parse(shown(value, unit), unit) == pytest.approx(value, rel=1e-9)


@given(st.sampled_from(E24), st.integers(-12, 9), st.randoms())
def test_drawn_values_come_apart_into_mantissa_and_exponent(mantissa, decade, rng):
    value = draw_value(rng, [mantissa], [decade])
    assert scientific(value) == (mantissa, decade)
