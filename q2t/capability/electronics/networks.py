"""Resistors and capacitors: LED series resistor, voltage divider, RC low-pass filter."""

import math
import random
from typing import Any

from q2t.capability.electronics.calculated import Calculated
from q2t.capability.electronics.values import E6, next_e12, ohms, plain
from q2t.records import Json


class LedResistor(Calculated):
    """Series resistor of a string of LEDs: R = (supply - count x forward voltage) / current, next E12 value up."""

    name = "led"
    unit = "ohm"
    tolerance = 0.0
    phrasings = (
        "{count} LEDs in series, {forward} V each, run at {current} mA from {supply} V. "
        "Which E12 resistor, rounded up?",
        "Choose the series resistor, E12, rounded up: supply {supply} V, LEDs {count} x {forward} V, {current} mA.",
        "A {supply} V rail drives {count} LEDs in a row ({forward} V each) with {current} mA. "
        "Next higher E12 resistor?",
        "LED string: {count} x {forward} V, {current} mA. Supply: {supply} V. Series resistor from E12, next value up?",
    )
    supplies = tuple(range(12, 31))
    forwards = (2, 3)
    counts = (1, 2, 3)
    currents = (1, 2, 10, 20, 100)

    def draw(self, rng: random.Random) -> dict[str, Json]:
        return {
            "supply": rng.choice(self.supplies),
            "forward": rng.choice(self.forwards),
            "count": rng.choice(self.counts),
            "current": rng.choice(self.currents),
        }

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {key: str(value) for key, value in inputs.items()}

    def drop(self, inputs: dict[str, Any]) -> int:
        """Volts left for the resistor."""
        return inputs["supply"] - inputs["count"] * inputs["forward"]

    def expected(self, inputs: dict[str, Any]) -> float:
        return next_e12(self.drop(inputs) / inputs["current"] * 1000)

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        used, drop, current = inputs["count"] * inputs["forward"], self.drop(inputs), inputs["current"]
        exact = drop * 1000 / current
        steps = [f"{inputs['count']}*{inputs['forward']}={used}", f"{inputs['supply']}-{used}={drop}"]
        # Halving and moving the point are the only divisions that are asked of the model.
        if current in (2, 20):
            steps.append(f"{drop}/2={plain(drop / 2)}")
        steps.append(f"{drop} V/{current} mA={exact:g} ohm")
        steps.append(f"{exact:g} up to {self.expected(inputs):g}")
        return "; ".join(steps), f"{self.expected(inputs):g} ohm"


class Divider(Calculated):
    """Lower resistor of an unloaded voltage divider: R2 = R1 Vout / (Vin - Vout)."""

    name = "divider"
    unit = "ohm"
    phrasings = (
        "A divider makes {vout} V from {vin} V. The upper resistor is {r1}. Find the lower one.",
        "Voltage divider: input {vin} V, output {vout} V, top resistor {r1}. Bottom resistor?",
        "I need {vout} V out of {vin} V. R1 (to the input) is {r1}; what is R2 (to ground)?",
        "Find R2 to ground when R1={r1} divides {vin} V down to {vout} V.",
    )
    pairs = tuple(
        (vin, vout) for vin in range(3, 31) for vout in range(1, vin) if vout / (vin - vout) in (0.5, 1.0, 2.0, 3.0)
    )

    def draw(self, rng: random.Random) -> dict[str, Json]:
        vin, vout = rng.choice(self.pairs)
        return {"vin": vin, "vout": vout, "r1": draw_resistor(rng, E6, (3, 4, 5))}

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {"vin": plain(inputs["vin"]), "vout": plain(inputs["vout"]), "r1": ohms(inputs["r1"])}

    def expected(self, inputs: dict[str, Any]) -> float:
        return inputs["r1"] * inputs["vout"] / (inputs["vin"] - inputs["vout"])

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        rest = inputs["vin"] - inputs["vout"]
        ratio = inputs["vout"] / rest
        kilo = inputs["r1"] / 1000
        answer = f"{plain(ratio * kilo)}k ohm"
        return (
            f"{inputs['vin']}-{inputs['vout']}={rest}; {inputs['vout']}/{rest}={plain(ratio)}; "
            f"{plain(kilo)}*{plain(ratio)}={plain(ratio * kilo)}",
            answer,
        )


class RcFilter(Calculated):
    """Capacitor of a first-order RC low-pass: C = 1 / (2 pi R f)."""

    name = "rc"
    unit = "F"
    phrasings = (
        "An RC low-pass has R={r} and should cut off at {f}. Find C.",
        "Which capacitor gives a corner frequency of {f} with {r}?",
        "RC filter: resistor {r}, -3 dB at {f}. Capacitor?",
        "Choose C for a first-order low-pass with {r} and a cutoff of {f}.",
    )
    frequencies = tuple(m * 10**d for d in range(6) for m in (1, 2, 5))

    def draw(self, rng: random.Random) -> dict[str, Json]:
        return {"r": draw_resistor(rng, E6, (2, 3, 4, 5, 6)), "f": rng.choice(self.frequencies)}

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        f = inputs["f"]
        return {"r": ohms(inputs["r"]), "f": f"{f // 1000} kHz" if f >= 1000 else f"{f} Hz"}

    def expected(self, inputs: dict[str, Any]) -> float:
        return 1 / (2 * math.pi * inputs["r"] * inputs["f"])

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        (rm, re), (fm, fe) = scientific(inputs["r"]), scientific(inputs["f"])
        product = rm * fm
        # 1 / (2 pi) = 159e-3, so that C = 159 / (rm fm) * 10^-(re + fe + 3).
        quotient = float(f"{159.155 / product:.3g}")
        exponent = re + fe + 3
        return (
            f"R={plain(rm)}e{re}; f={plain(fm)}e{fe}; {plain(rm)}*{plain(fm)}={plain(product)}; "
            f"159/{plain(product)}={plain(quotient)}; {re}+{fe}+3={exponent}",
            f"{plain(quotient)}e-{exponent} F",
        )


def draw_resistor(rng: random.Random, series: tuple[float, ...], decades: tuple[int, ...]) -> int:
    """A value of the series in one of the decades: 3 is 1 to 10 kilohm."""
    return round(rng.choice(series) * 10 ** rng.choice(decades))


def scientific(value: float) -> tuple[float, int]:
    """Mantissa in [1, 10) and exponent: 47000 -> (4.7, 4)."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return float(mantissa), int(exponent)
