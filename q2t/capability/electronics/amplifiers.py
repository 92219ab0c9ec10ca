"""Operational amplifiers: the feedback resistor for a gain.

Answers have to be exact, as they come out: one family's formula for the other's is 1 off in the gain, and so within 2%
from 51 on.
"""

import random
from typing import Any

from q2t.capability.electronics.calculated import Calculated
from q2t.capability.electronics.values import E12, E24, draw_value, ohms, plain, scientific
from q2t.capability.family import Grid
from q2t.records import Json

RESISTORS = {"coarse": E12, "fine": E24}
"""Mantissas of the given resistor."""
FACTORS = {
    "coarse": tuple(m * 10**e for e in range(3) for m in (1, 2, 3, 5)),
    "fine": tuple(m * 10**e for e in range(3) for m in range(1, 10)),
}
"""Feedback resistor over the other one."""


class NonInvertingGain(Calculated):
    """Feedback resistor of a non-inverting amplifier: gain = 1 + Rf / Rg."""

    name = "gain"
    unit = "ohm"
    tolerance = 0.0
    held_out = ("rg", 3900)
    phrasings = (
        "A non-inverting op-amp stage needs a gain of {gain}. Rg to ground is {rg}. Find Rf.",
        "Non-inverting amplifier, gain {gain}, Rg={rg}: which feedback resistor?",
        "Which Rf gives a gain of {gain} with Rg={rg} (non-inverting)?",
        "Size the feedback resistor: op-amp, non-inverting, G={gain}, ground resistor {rg}.",
        "With {rg} to ground, what feedback resistor makes a non-inverting gain of {gain}?",
        "Op-amp, input at the + pin, {rg} from - to ground. Rf for {gain} times?",
    )

    def draw(self, rng: random.Random, grid: Grid) -> dict[str, Json]:
        return {"gain": rng.choice(FACTORS[grid]) + 1, "rg": draw_value(rng, RESISTORS[grid], range(2, 6))}

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {"gain": str(inputs["gain"]), "rg": ohms(inputs["rg"])}

    def expected(self, inputs: dict[str, Any]) -> float:
        return (inputs["gain"] - 1) * inputs["rg"]

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        factor = inputs["gain"] - 1
        reasoning, answer = scaled("Rg", inputs["rg"], factor)
        return f"{inputs['gain']}-1={factor}; {reasoning}", answer


class InvertingGain(Calculated):
    """Feedback resistor of an inverting amplifier: |gain| = Rf / Rin."""

    name = "inverting"
    unit = "ohm"
    tolerance = 0.0
    held_out = ("rin", 3900)
    phrasings = (
        "An inverting op-amp stage needs a gain of -{gain}. The input resistor is {rin}. Find Rf.",
        "Inverting amplifier, gain -{gain}, Rin={rin}: which feedback resistor?",
        "Which Rf gives a gain of -{gain} with Rin={rin} (inverting)?",
        "Size the feedback resistor: op-amp, inverting, G=-{gain}, input resistor {rin}.",
        "With {rin} at the - input, what feedback resistor amplifies by -{gain}?",
        "Op-amp, + pin grounded, signal through {rin} into -. Rf for a gain of -{gain}?",
    )

    def draw(self, rng: random.Random, grid: Grid) -> dict[str, Json]:
        return {"gain": rng.choice(FACTORS[grid]), "rin": draw_value(rng, RESISTORS[grid], range(2, 6))}

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {"gain": str(inputs["gain"]), "rin": ohms(inputs["rin"])}

    def expected(self, inputs: dict[str, Any]) -> float:
        return inputs["gain"] * inputs["rin"]

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        return scaled("Rin", inputs["rin"], inputs["gain"])


def scaled(name: str, resistance: float, factor: int) -> tuple[str, str]:
    """Reasoning and answer of factor x resistance, mantissas and powers of ten apart."""
    (rm, re), (fm, fe) = scientific(resistance), scientific(factor)
    product = rm * fm
    return (
        f"{name}={plain(rm)}e{re}; {factor}={plain(fm)}e{fe}; "
        f"{plain(rm)}*{plain(fm)}={plain(product)}; {re}+{fe}={re + fe}",
        f"{plain(product)}e{re + fe} ohm",
    )
