"""Component values: the preferred numbers of IEC 60063, and reading and writing quantities."""

import math
import random
import re
from collections.abc import Sequence
from decimal import Decimal

from quantiphy import Quantity

E12 = (1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 3.9, 4.7, 5.6, 6.8, 8.2)
"""Mantissas of the E12 series (IEC 60063): a table, since the standard's values are not the rounded powers."""

E6 = E12[::2]
"""Mantissas of the E6 series: every other one of E12."""

E24 = tuple(sorted((*E12, 1.1, 1.3, 1.6, 2.0, 2.4, 3.0, 3.6, 4.3, 5.1, 6.2, 7.5, 9.1)))
"""Mantissas of the E24 series: those of E12, and one in each gap."""

_TEN = r"10(?:(?:\^|\*\*)(?P<ten>[+−-]?\d{1,3})|\^\{(?P<braced>[+−-]?\d{1,3})\}|(?P<raised>[⁺⁻]?[⁰¹²³⁴-⁹]{1,3}))"
_POWER = rf"[eE](?P<e>[+−-]?\d{{1,3}})|\s*[×xX*·⋅]\s*{_TEN}"
_NUMBER = rf"(?P<number>[+−-]?(?:[1-9]\d{{0,2}}(?:,\d{{3}})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+))(?:{_POWER})?"
_PLAIN = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "+-0123456789-", ",")
_PREFIXES = {"": 0, "p": -12, "n": -9, "u": -6, "µ": -6, "μ": -6, "m": -3, "k": 3, "K": 3, "M": 6, "G": 9, "T": 12}
_PREFIXES |= {"pico": -12, "nano": -9, "micro": -6, "milli": -3, "kilo": 3, "kil": 3, "mega": 6, "meg": 6, "giga": 9}
_PREFIX = "|".join(
    name if len(name) < 2 else f"[{name[0]}{name[0].upper()}]{name[1:]}|{name.upper()}" for name in _PREFIXES
)
UNITS = {"ohm": "ohms?|Ω|Ω|R", "F": "F|farads?", "H": "H|henr(?:ys?|ies)", "V": "V|volts?", "A": "A|amps?|amperes?"}
UNITS |= {"W": "W|watts?", "Hz": "Hz|hertz", "s": "s|secs?|seconds?"}
_QUANTITIES = {
    unit: re.compile(rf"{_NUMBER}\s*+(?P<prefix>{_PREFIX})(?:\s*+-?(?i:{names}))?") for unit, names in UNITS.items()
}
"""A number, an SI prefix and a unit, in small or capital letters, any of the last two left out. Blanks are given back
to nobody: two shares of many would be tried in all ways."""
_CODES = {
    unit: re.compile(rf"^(\d{{1,3}})([{letters}])(\d{{1,2}})(?![\d.])")
    for unit, letters in {"ohm": "RkKMG", "F": "pnuµμm", "V": "V", "A": "A"}.items()
}
"""Where a letter stands for the decimal point, as in 4k7, 2R2 and 3n3 (IEC 60062)."""


def parse(text: str, unit: str) -> float:
    """The number in `text`, in `unit` without prefix: parse("4.7k ohm", "ohm") == 4700.0.

    Accepts what engineers write: "4700", "4,700 ohm", "4.7k", "4k7", "4.7 kohm", "4.7 kΩ", "4.7 × 10³ Ω", "560R",
    "4.7MEG", "16.9e-9 F", "1.69*10^{-8} F", "16.9 nF", "16.9 nanofarads".

    Raises:
        ValueError: no single finite quantity of that unit.
    """
    said = text.strip().removesuffix(".")
    if coded := _CODES.get(unit):
        said = coded.sub(lambda m: f"{m[1]}.{m[3]}{m[2].removeprefix('R' if unit == 'ohm' else unit)}", said)
    found = _QUANTITIES[unit].fullmatch(said)
    if not found:
        raise ValueError(f"{text!r} is no quantity in {unit}; write e.g. '4.7k {unit}'")
    power = int((found["e"] or found["ten"] or found["braced"] or found["raised"] or "0").translate(_PLAIN))
    prefix = found["prefix"] if found["prefix"] in _PREFIXES else found["prefix"].lower()
    value = float(Decimal(found["number"].translate(_PLAIN)).scaleb(power + _PREFIXES[prefix]))
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is no finite quantity in {unit}")
    return value


def next_e12(value: float) -> float:
    """The smallest E12 value that is not below `value` (> 0)."""
    assert value > 0
    decade = 1e-12
    while True:
        for mantissa in E12:
            candidate = float(f"{mantissa * decade:.2g}")
            # Half a part per million: 6.9 / 0.01 must not be pushed past 690 by rounding.
            if candidate >= value * (1 - 5e-7):
                return candidate
        decade *= 10


def draw_value(rng: random.Random, series: Sequence[float], decades: Sequence[int]) -> float:
    """A mantissa of the series in one of the decades: 3 is 1,000 to 10,000. Exact, so that equal values are equal."""
    return float(f"{rng.choice(series)}e{rng.choice(decades)}")


def scientific(value: float) -> tuple[float, int]:
    """Mantissa in [1, 10) and exponent: 47000 -> (4.7, 4)."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return float(mantissa), int(exponent)


def ohms(value: float) -> str:
    """A resistance as people write it in a question: 470 -> "470 ohm", 4700 -> "4.7k ohm", 2.2e6 -> "2.2M ohm"."""
    for factor, prefix in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g}{prefix} ohm"
    return f"{value:.4g} ohm"


def shown(value: float, unit: str) -> str:
    """Any other quantity, with an SI prefix: shown(4.7e-9, "F") is "4.7 nF"."""
    return Quantity(value, unit).render()


def plain(value: float) -> str:
    """At most four significant digits and no trailing zeros: 2.350 -> "2.35"."""
    return f"{value:.4g}"
