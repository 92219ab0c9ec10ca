"""Resistor networks: LED series resistor and voltage divider."""

import random
from typing import Any, ClassVar

from q2t.capability.electronics.calculated import Calculated
from q2t.capability.electronics.values import E6, E24, draw_value, next_e12, ohms, plain, scientific
from q2t.capability.family import Grid
from q2t.records import Json


class LedResistor(Calculated):
    """Series resistor of a string of LEDs: R = (supply - count x forward voltage) / current, rounded up to E12."""

    name = "led"
    unit = "ohm"
    tolerance = 0.0
    held_out = ("supply", 26)
    phrasings = (
        "{count} LEDs in series, {forward} V each, run at {current} mA from {supply} V. "
        "Which E12 resistor, rounded up?",
        "Choose the series resistor, E12, rounded up: supply {supply} V, LEDs {count} x {forward} V, {current} mA.",
        "A {supply} V rail drives {count} LEDs in a row ({forward} V each) with {current} mA. "
        "E12 resistor, rounded up?",
        "LED string: {count} x {forward} V, {current} mA. Supply: {supply} V. Series resistor rounded up to E12?",
        "From {supply} V I want {current} mA through {count} LEDs of {forward} V in series. E12 resistor, rounded up?",
        "Limit {count} x {forward} V of LEDs to {current} mA on a {supply} V supply: which E12 value, rounded up?",
    )
    supplies: ClassVar = {
        "coarse": (10, 12, 14, 15, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 48),
        "fine": tuple(range(10, 61)),
    }
    forwards = (2, 3)
    counts = (1, 2, 3)
    currents: ClassVar = {"coarse": (1, 2, 10, 20, 100, 200), "fine": (1, 2, 5, 10, 20, 50, 100, 200, 500)}

    def draw(self, rng: random.Random, grid: Grid) -> dict[str, Json]:
        return {
            "supply": rng.choice(self.supplies[grid]),
            "forward": rng.choice(self.forwards),
            "count": rng.choice(self.counts),
            "current": rng.choice(self.currents[grid]),
        }

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {key: str(value) for key, value in inputs.items()}

    def drop(self, inputs: dict[str, Any]) -> int:
        """Volts left for the resistor."""
        return inputs["supply"] - inputs["count"] * inputs["forward"]

    def expected(self, inputs: dict[str, Any]) -> float:
        return next_e12(self.drop(inputs) / inputs["current"] * 1000)

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        supply, used, drop = inputs["supply"], inputs["count"] * inputs["forward"], self.drop(inputs)
        tens, ones = supply // 10 * 10, supply % 10
        mantissa, exponent = scientific(inputs["current"])
        quotient = drop / mantissa
        ohm = f"{drop / inputs['current'] * 1000:g}"
        steps = [
            f"{inputs['count']}*{inputs['forward']}={used}",
            # Ones before tens, so that no borrowing happens within a step.
            f"{ones}-{used}={ones - used}; {tens}{ones - used:+d}={drop}",
            f"I={plain(mantissa)}e{exponent}; {drop}/{plain(mantissa)}={plain(quotient)}; 3-{exponent}={3 - exponent}",
            f"{plain(quotient)}e{3 - exponent}={ohm}",
            f"up to {self.expected(inputs):g}",
        ]
        return "; ".join(steps), f"{self.expected(inputs):g} ohm"


class Divider(Calculated):
    """Lower resistor of an unloaded voltage divider: R2 = R1 Vout / (Vin - Vout)."""

    name = "divider"
    unit = "ohm"
    held_out = ("r1", 33_000)
    phrasings = (
        "A divider makes {vout} V from {vin} V. The upper resistor is {r1}. Find the lower one.",
        "Voltage divider: input {vin} V, output {vout} V, top resistor {r1}. Bottom resistor?",
        "I need {vout} V out of {vin} V. R1 (to the input) is {r1}; what is R2 (to ground)?",
        "Find R2 to ground when R1={r1} divides {vin} V down to {vout} V.",
        "Which lower resistor gives {vout} V at the tap of a divider on {vin} V with {r1} on top?",
        "Divide {vin} V to {vout} V with {r1} as the upper resistor: size the lower resistor.",
    )
    pairs = tuple(
        (vin, vout) for vin in range(3, 31) for vout in range(1, vin) if vout / (vin - vout) in (0.5, 1.0, 2.0, 3.0)
    )
    resistors: ClassVar = {"coarse": E6, "fine": E24}

    def draw(self, rng: random.Random, grid: Grid) -> dict[str, Json]:
        vin, vout = rng.choice(self.pairs)
        return {"vin": vin, "vout": vout, "r1": draw_value(rng, self.resistors[grid], (3, 4, 5))}

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {"vin": plain(inputs["vin"]), "vout": plain(inputs["vout"]), "r1": ohms(inputs["r1"])}

    def expected(self, inputs: dict[str, Any]) -> float:
        return inputs["r1"] * inputs["vout"] / (inputs["vin"] - inputs["vout"])

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        vin, vout = inputs["vin"], inputs["vout"]
        (vi, ones_in), (vo, ones_out) = divmod(vin, 10), divmod(vout, 10)
        ones, tens, rest = ones_in - ones_out, (vi - vo) * 10, vin - vout
        ratio = vout / rest
        mantissa, exponent = scientific(inputs["r1"])
        return (
            # Ones and tens apart, so that no borrowing happens within a step.
            f"{ones_in}-{ones_out}={ones}; {vi * 10}-{vo * 10}={tens}; {tens}{ones:+d}={rest}; "
            f"{vout}/{rest}={plain(ratio)}; R1={plain(mantissa)}e{exponent}; "
            f"{plain(mantissa)}*{plain(ratio)}={plain(mantissa * ratio)}",
            f"{plain(mantissa * ratio)}e{exponent} ohm",
        )
