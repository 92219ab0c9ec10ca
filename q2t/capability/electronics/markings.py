"""What is printed on parts: the colour code of resistors."""

import random
from typing import Any

from q2t.capability.electronics.calculated import Calculated
from q2t.capability.family import Grid
from q2t.records import Json

COLOURS = ("black", "brown", "red", "orange", "yellow", "green", "blue", "violet", "grey", "white")
"""By digit, IEC 60062."""


class ColourCode(Calculated):
    """Resistance from three colour bands: two digits and the number of zeros (IEC 60062)."""

    name = "bands"
    unit = "ohm"
    tolerance = 0.0
    phrasings = (
        "A resistor has the bands {first}, {second}, {zeros}. What is its resistance?",
        "Read the colour code {first} {second} {zeros}.",
        "Bands {first}, {second}, {zeros}: how many ohms?",
        "Which resistor is marked {first} {second} {zeros}?",
        "{first}, {second}, {zeros}: what value is that?",
        "Resistance of {first} {second} {zeros}?",
    )

    def draw(self, rng: random.Random, grid: Grid) -> dict[str, Json]:
        return {"first": rng.randint(1, 9), "second": rng.randint(0, 9), "zeros": rng.randint(0, 6)}

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {band: COLOURS[digit] for band, digit in inputs.items()}

    def expected(self, inputs: dict[str, Any]) -> float:
        return (10 * inputs["first"] + inputs["second"]) * 10 ** inputs["zeros"]

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        steps = [f"{COLOURS[digit]} {digit}" for digit in inputs.values()]
        return "; ".join(steps), f"{inputs['first']}{inputs['second']}{'0' * inputs['zeros']} ohm"
