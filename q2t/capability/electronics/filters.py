"""Reactive parts at a frequency: RC and RL low-pass, a capacitor's reactance, and the timing of a 555.

A solution keeps mantissas and powers of ten apart: a small model multiplies two mantissas by heart and adds exponents,
and fails at numbers like 0.00022. A step is computed with the numbers that it shows, so that each is true as it stands.
"""

import math
import random
from typing import Any

from q2t.capability.electronics.calculated import Calculated
from q2t.capability.electronics.values import E6, E24, draw_value, ohms, plain, scientific, shown
from q2t.capability.family import Grid
from q2t.records import Json

PARTS = {"coarse": E6, "fine": E24}
"""Mantissas of the given part."""
ROUND = {"coarse": (1, 2, 5), "fine": (1, 2, 3, 5)}
"""Mantissas of the frequencies and times that problems ask for."""


class RcFilter(Calculated):
    """Capacitor of a first-order RC low-pass: C = 1 / (2 pi R f)."""

    name = "rc"
    unit = "F"
    held_out = ("r", 33_000)
    phrasings = (
        "An RC low-pass has R={r} and should cut off at {f}. Find C.",
        "Which capacitor gives a corner frequency of {f} with {r}?",
        "RC filter: resistor {r}, -3 dB at {f}. Capacitor?",
        "Choose C for a first-order low-pass with {r} and a cutoff of {f}.",
        "A first-order filter of {r} and a capacitor is to be 3 dB down at {f}. Which capacitance?",
        "Size the capacitor: low-pass, R={r}, cutoff frequency {f}.",
    )

    def draw(self, rng: random.Random, grid: Grid) -> dict[str, Json]:
        return {"r": draw_value(rng, PARTS[grid], range(2, 7)), "f": draw_value(rng, ROUND[grid], range(6))}

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {"r": ohms(inputs["r"]), "f": shown(inputs["f"], "Hz")}

    def expected(self, inputs: dict[str, Any]) -> float:
        return 1 / (2 * math.pi * inputs["r"] * inputs["f"])

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        (rm, re), (fm, fe) = scientific(inputs["r"]), scientific(inputs["f"])
        product = rm * fm
        quotient = rounded(159 / product)
        both = re + fe
        return (
            f"R={plain(rm)}e{re}; f={plain(fm)}e{fe}; {plain(rm)}*{plain(fm)}={plain(product)}; "
            f"159/{plain(product)}={plain(quotient)}; {re}+{fe}={both}; {both}+3={both + 3}",
            f"{plain(quotient)}e-{both + 3} F",
        )


class Reactance(Calculated):
    """Reactance of a capacitor: X = 1 / (2 pi f C)."""

    name = "reactance"
    unit = "ohm"
    held_out = ("c", 3.3e-8)
    phrasings = (
        "What is the reactance of {c} at {f}?",
        "A capacitor of {c} is driven at {f}. Find its reactance.",
        "Capacitor {c}, frequency {f}: magnitude of the impedance?",
        "How many ohms does {c} have at {f}?",
        "Find Xc for C={c} and f={f}.",
        "At {f}, which reactance does a {c} capacitor show?",
    )

    def draw(self, rng: random.Random, grid: Grid) -> dict[str, Json]:
        return {"c": draw_value(rng, PARTS[grid], range(-10, -5)), "f": draw_value(rng, ROUND[grid], range(1, 7))}

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {"c": shown(inputs["c"], "F"), "f": shown(inputs["f"], "Hz")}

    def expected(self, inputs: dict[str, Any]) -> float:
        return 1 / (2 * math.pi * inputs["c"] * inputs["f"])

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        (cm, ce), (fm, fe) = scientific(inputs["c"]), scientific(inputs["f"])
        product = cm * fm
        quotient = rounded(159 / product)
        both = -ce - fe
        return (
            f"C={plain(cm)}e{ce}; f={plain(fm)}e{fe}; {plain(cm)}*{plain(fm)}={plain(product)}; "
            f"159/{plain(product)}={plain(quotient)}; {-ce}-{fe}={both}; {both}-3={both - 3}",
            f"{plain(quotient)}e{both - 3} ohm",
        )


class RlFilter(Calculated):
    """Resistor of a first-order RL low-pass: R = 2 pi f L."""

    name = "rl"
    unit = "ohm"
    held_out = ("l", 3.3e-4)
    phrasings = (
        "An RL low-pass has L={l} and should cut off at {f}. Find R.",
        "Which resistor gives a corner frequency of {f} with {l}?",
        "RL filter: inductor {l}, -3 dB at {f}. Resistor?",
        "Choose R for a first-order RL low-pass with {l} and a cutoff of {f}.",
        "A coil of {l} and a resistor are to be 3 dB down at {f}. Which resistance?",
        "Size the resistor: RL low-pass, L={l}, cutoff frequency {f}.",
    )

    def draw(self, rng: random.Random, grid: Grid) -> dict[str, Json]:
        return {"l": draw_value(rng, PARTS[grid], range(-6, -1)), "f": draw_value(rng, ROUND[grid], range(2, 8))}

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {"l": shown(inputs["l"], "H"), "f": shown(inputs["f"], "Hz")}

    def expected(self, inputs: dict[str, Any]) -> float:
        return 2 * math.pi * inputs["l"] * inputs["f"]

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        (lm, le), (fm, fe) = scientific(inputs["l"]), scientific(inputs["f"])
        product = lm * fm
        result = rounded(6.28 * product)
        exponent = fe + le
        return (
            f"L={plain(lm)}e{le}; f={plain(fm)}e{fe}; {plain(lm)}*{plain(fm)}={plain(product)}; "
            f"6.28*{plain(product)}={plain(result)}; {fe}{le}={exponent}",
            f"{plain(result)}e{exponent} ohm",
        )


class OneShot(Calculated):
    """Capacitor of a 555 monostable: C = t / (1.1 R) (data sheet of the NE555)."""

    name = "oneshot"
    unit = "F"
    held_out = ("r", 33_000)
    phrasings = (
        "A 555 one-shot has R={r} and should time {t}. Find C.",
        "555 monostable: pulse {t}, resistor {r}. Capacitor?",
        "Which capacitor gives a 555 pulse of {t} with {r}?",
        "Choose C for an NE555 monostable with {r} and a pulse width of {t}.",
        "A monostable 555 is to stay on for {t}; its timing resistor is {r}. Which capacitance?",
        "Size the timing capacitor: 555 one-shot, R={r}, t={t}.",
    )

    def draw(self, rng: random.Random, grid: Grid) -> dict[str, Json]:
        return {"r": draw_value(rng, PARTS[grid], range(3, 7)), "t": draw_value(rng, ROUND[grid], range(-6, 2))}

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {"r": ohms(inputs["r"]), "t": shown(inputs["t"], "s")}

    def expected(self, inputs: dict[str, Any]) -> float:
        return inputs["t"] / (1.1 * inputs["r"])

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        (rm, re), (tm, te) = scientific(inputs["r"]), scientific(inputs["t"])
        longer = 1.1 * rm
        # 1/x before the time comes in: a reciprocal for each mantissa to know by heart, not a quotient for each pair.
        inverse = rounded(1 / longer)
        product = tm * inverse
        exponent = te - re
        return (
            f"R={plain(rm)}e{re}; t={plain(tm)}e{te}; 1.1*{plain(rm)}={plain(longer)}; "
            f"1/{plain(longer)}={plain(inverse)}; {plain(tm)}*{plain(inverse)}={plain(product)}; {te}-{re}={exponent}",
            f"{plain(product)}e{exponent} F",
        )


def rounded(value: float) -> float:
    """To three significant digits, which the 2% of the check leave room for."""
    return float(f"{value:.3g}")
