"""Resistors and capacitors: LED series resistor, voltage divider, RC low-pass filter."""

import math
import random
from typing import Any

from q2t.capability.electronics.calculated import Calculated
from q2t.capability.electronics.values import E12, next_e12, ohms, plain
from q2t.records import Json


class LedResistor(Calculated):
    """Series resistor of an LED: R = (supply - forward voltage) / current, next E12 value up."""

    name = "led"
    unit = "ohm"
    tolerance = 0.0
    phrasings = (
        "An LED with a forward voltage of {forward} V runs at {current} mA from {supply} V. Which E12 resistor (next value up)?",
        "Choose the series resistor, E12, rounded up: supply {supply} V, LED {forward} V, {current} mA.",
        "From a {supply} V rail I drive an LED ({forward} V) with {current} mA. Give the next higher E12 resistor.",
        "LED: {forward} V, {current} mA. Supply: {supply} V. Series resistor from E12, next value up?",
    )
    supplies = tuple(range(5, 25))
    forwards = (1.8, 1.9, 2.0, 2.1, 2.2, 3.0, 3.2, 3.4)
    currents = (1, 2, 4, 5, 10, 20)

    def draw(self, rng: random.Random) -> dict[str, Json]:
        return {
            "supply": rng.choice(self.supplies),
            "forward": rng.choice(self.forwards),
            "current": rng.choice(self.currents),
        }

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {k: plain(v) for k, v in inputs.items()}

    def expected(self, inputs: dict[str, Any]) -> float:
        return next_e12((inputs["supply"] - inputs["forward"]) / inputs["current"] * 1000)

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        drop = round(1000 * (inputs["supply"] - inputs["forward"]))
        current = inputs["current"]
        steps = [f"{inputs['supply']:.1f}-{inputs['forward']:.1f}={drop / 1000:.1f} V={drop} mV"]
        # Halving, doubling and moving the point are the only divisions that are asked of the model.
        value: float = drop
        if current in (2, 4, 20):
            value /= 2
            steps.append(f"{drop}/2={plain5(value)}")
        if current == 4:
            steps.append(f"{plain5(value)}/2={plain5(value / 2)}")
            value /= 2
        if current == 5:
            value *= 2
            steps.append(f"{drop}*2={plain5(value)}")
        if current in (5, 10, 20):
            steps.append(f"{plain5(value)}/10={plain5(value / 10)}")
            value /= 10
        steps.append(f"{plain5(value)} up to {self.expected(inputs):.0f}")
        return "; ".join(steps), f"{self.expected(inputs):.0f} ohm"


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
    ratios = (0.2, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
    pairs = tuple(
        (vin, vout) for vin in range(3, 31) for vout in range(1, vin) if vout / (vin - vout) in (0.2, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
    )

    def draw(self, rng: random.Random) -> dict[str, Json]:
        vin, vout = rng.choice(self.pairs)
        return {"vin": vin, "vout": vout, "r1": draw_resistor(rng)}

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
    frequencies = tuple(m * d for d in (10, 100, 1000, 10000) for m in (1, 2, 3, 5))

    def draw(self, rng: random.Random) -> dict[str, Json]:
        return {"r": draw_resistor(rng), "f": rng.choice(self.frequencies)}

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


def draw_resistor(rng: random.Random) -> int:
    """An E12 value from 1 kilohm to 820 kilohm."""
    return round(rng.choice(E12) * 10 ** rng.choice((3, 4, 5)))


def scientific(value: float) -> tuple[float, int]:
    """Mantissa in [1, 10) and exponent: 47000 -> (4.7, 4)."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return float(mantissa), int(exponent)


def plain5(value: float) -> str:
    """At most six significant digits and no trailing zeros."""
    return f"{value:.6g}"
