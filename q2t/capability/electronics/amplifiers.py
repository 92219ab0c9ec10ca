"""Operational amplifiers."""

import random
from typing import Any

from q2t.capability.electronics.calculated import Calculated
from q2t.capability.electronics.networks import draw_resistor
from q2t.capability.electronics.values import E12, ohms, plain
from q2t.records import Json


class NonInvertingGain(Calculated):
    """Feedback resistor of a non-inverting amplifier: gain = 1 + Rf / Rg."""

    name = "gain"
    unit = "ohm"
    phrasings = (
        "A non-inverting op-amp stage needs a gain of {gain}. Rg to ground is {rg}. Find Rf.",
        "Non-inverting amplifier, gain {gain}, Rg={rg}: which feedback resistor?",
        "Which Rf gives a gain of {gain} with Rg={rg} (non-inverting)?",
        "Size the feedback resistor: op-amp, non-inverting, G={gain}, ground resistor {rg}.",
    )
    gains = (2, 3, 4, 5, 6, 11, 21, 31, 41, 51, 101)

    def draw(self, rng: random.Random) -> dict[str, Json]:
        return {"gain": rng.choice(self.gains), "rg": draw_resistor(rng, E12, (2, 3, 4, 5))}

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {"gain": str(inputs["gain"]), "rg": ohms(inputs["rg"])}

    def expected(self, inputs: dict[str, Any]) -> float:
        return (inputs["gain"] - 1) * inputs["rg"]

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        factor, kilo = inputs["gain"] - 1, inputs["rg"] / 1000
        product = f"{factor * kilo:.6g}"
        return f"{inputs['gain']}-1={factor}; {plain(kilo)}*{factor}={product}", f"{product}k ohm"
