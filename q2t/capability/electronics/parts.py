"""Choosing a part from a closed list of real ones: MOSFET and linear regulator."""

import random
import re
from itertools import zip_longest
from typing import Any, ClassVar

from q2t.capability.electronics.catalog import Part
from q2t.capability.family import Family, Grid
from q2t.records import Json, Problem, Split, Verdict

LETTERS = "ABC"
CURRENT_MARGIN = 2
"""The catalogue's currents agree with distributors' in 84% of the parts: ask with a margin that covers the rest."""
VOLTAGE_MARGIN = 1.5
SHARES: dict[Split, float] = {"lessons": 0.5, "questions": 0.25, "test": 0.15, "dev": 0.1}
"""How a kind's parts are divided among the splits, whole root symbols at a time."""


def partition(parts: list[Part]) -> dict[Split, list[Part]]:
    """Parts by split. A part and its variants, which share a root symbol, are never in two splits.

    Roots go, largest first, to the split that is furthest behind its share.
    """
    by_root: dict[str, list[Part]] = {}
    for part in sorted(parts, key=lambda p: p.name):
        by_root.setdefault(part.root, []).append(part)
    divided: dict[Split, list[Part]] = {split: [] for split in SHARES}
    for _, variants in sorted(by_root.items(), key=lambda item: (-len(item[1]), item[0])):
        behind = max(SHARES, key=lambda s: SHARES[s] * len(parts) - len(divided[s]))
        divided[behind].extend(variants)
    return divided


class Selection(Family):
    """Exactly one of three candidates meets all constraints; the answer is its letter, or its name.

    Copying a part number letter by letter is a skill of its own, and not the one that is asked for.
    """

    kind: ClassVar[str]
    refused: ClassVar[str]
    """What a solution says of a candidate with the wrong voltage."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = [p for p in parts if p.kind == self.kind and self.usable(p)]

    def usable(self, part: Part) -> bool:
        raise NotImplementedError

    def for_split(self, split: Split) -> "Selection":
        return type(self)(partition(self.parts)[split])

    def fits(self, part: Part, need: dict[str, Any]) -> bool:
        raise NotImplementedError

    def need(self, rng: random.Random) -> dict[str, Json]:
        raise NotImplementedError

    def draw(self, rng: random.Random, grid: Grid) -> dict[str, Json]:
        for _ in range(1000):
            need = self.need(rng)
            fitting = [p for p in self.parts if self.fits(p, need)]
            others = self.distractors(need)
            if fitting and len(others) >= 2:
                break
        else:
            raise ValueError(
                f"{self.name}: no constraint tells {len(self.parts)} parts apart; add parts to the catalogue"
            )
        chosen = [self.pick(rng, fitting), self.pick(rng, others)]
        chosen.append(self.pick(rng, [p for p in others if p is not chosen[1]]))
        rng.shuffle(chosen)
        return {
            **need,
            "candidates": [[p.name, p.voltage, p.current] for p in chosen],
        }

    def distractors(self, need: dict[str, Any]) -> list[Part]:
        return [p for p in self.parts if not self.fits(p, need)]

    def pick(self, rng: random.Random, parts: list[Part]) -> Part:
        return rng.choice(parts)

    def candidates(self, inputs: dict[str, Any]) -> str:
        return "; ".join(
            f"{letter} {name} {voltage:g} V {amperes(current)} A"
            for letter, (name, voltage, current) in zip(LETTERS, inputs["candidates"], strict=True)
        )

    def accepts(self, voltage: float, current: float, inputs: dict[str, Any]) -> bool:
        raise NotImplementedError

    def answer(self, inputs: dict[str, Any]) -> str:
        (name,) = [n for n, v, i in inputs["candidates"] if self.accepts(v, i, inputs)]
        return name

    def check(self, inputs: dict[str, Any]) -> dict[str, Json]:
        names = [name for name, _, _ in inputs["candidates"]]
        return {"kind": "choice", "expected": self.answer(inputs), "candidates": names}

    def needed(self, inputs: dict[str, Any]) -> tuple[str, float]:
        """The first step of a solution, and the smallest current that will do."""
        raise NotImplementedError

    def voltages(self, voltage: float, inputs: dict[str, Any]) -> tuple[str, bool]:
        """What there is to compare of a candidate's voltage, and whether it will do."""
        raise NotImplementedError

    def solve(self, inputs: dict[str, Any]) -> tuple[str, str]:
        """Candidate by candidate, voltage first; the first that meets both is the only one."""
        first, amps = self.needed(inputs)
        steps = [first]
        for letter, (_, voltage, current) in zip(LETTERS, inputs["candidates"], strict=True):
            comparison, enough = self.voltages(voltage, inputs)
            if not enough:
                steps.append(f"{letter} {comparison} {self.refused}")
                continue
            steps.append(f"{letter} {comparison} ok {compared(amperes(current), amperes(amps))}")
            if current >= amps:
                steps[-1] += " ok"
                return "; ".join(steps), letter
            steps[-1] += " low"
        raise AssertionError("no candidate fits")

    @staticmethod
    def verify(problem: Problem, answer: str) -> Verdict:
        spec: dict[str, Any] = problem.check
        names = dict(zip(LETTERS, spec["candidates"], strict=True))
        name = next((name for letter, name in names.items() if _names(answer, letter, name)), None)
        if name is None:
            return Verdict(correct=False, rule="not_a_candidate", measured=answer.strip()[:80])
        correct = name == problem.check["expected"]
        return Verdict(correct=correct, rule="ok" if correct else "wrong_part", measured=name)


def _names(answer: str, letter: str, name: str) -> bool:
    """Whether the whole answer is this candidate: "B", "(B)", "B)", "Option B.", its name with or without the ratings
    listed, or both: "B NAME", "B (NAME)", "NAME (B)"."""
    named = rf"{re.escape(name)}(?: [\d.]+ V [\d.]+ A)?"
    lettered = rf"(?:(?:option|candidate|choice|part) )?(?:{letter}\)?|\({letter}\))"
    listed = rf"{lettered}(?:[.:,]? (?:{named}|\({named}\)))?"
    return bool(re.fullmatch(rf"(?:{listed}|{named}(?: \({letter}\))?)\.?", answer.strip(), re.IGNORECASE))


def amperes(current: float) -> str:
    """With at least one decimal, so that whole numbers look like the others: "7.0", "0.115"."""
    return f"{current:.1f}" if current == round(current, 1) else f"{current:g}"


def compared(one: str, other: str) -> str:
    """How a small model compares two numbers: by their length, else digit by digit up to the first that differs.

    "7.0 vs 30.0 fewer digits", "30 vs 36 3=3 0<6", "1.55 vs 1.5 1=1 5=5 5>0".
    """
    (whole, _, part), (other_whole, _, other_part) = one.partition("."), other.partition(".")
    if len(whole) != len(other_whole):
        return f"{one} vs {other} {'fewer' if len(whole) < len(other_whole) else 'more'} digits"
    steps = []
    for a, b in zip_longest(whole + part, other_whole + other_part, fillvalue="0"):
        steps.append(f"{a}{'=' if a == b else '<' if a < b else '>'}{b}")
        if a != b:
            break
    return f"{one} vs {other} {' '.join(steps)}"


class Mosfet(Selection):
    """N-channel MOSFET as a low-side switch: Vds >= 1.5 x supply, Id >= 2 x load."""

    name = "mosfet"
    kind = "mosfet"
    refused = "low"
    phrasings = (
        "Which N-MOSFET switches {load} A at {supply} V (need 1.5x voltage, 2x current)? {candidates}",
        "Low-side switch for {load} A, {supply} V. Margins: voltage 1.5x, current 2x. Choose: {candidates}",
        "Pick the MOSFET for a {supply} V, {load} A load with 1.5x voltage and 2x current in reserve: {candidates}",
        "A {load} A load on {supply} V: which transistor has 1.5x the voltage and 2x the current? {candidates}",
        "{supply} V, {load} A to switch to ground. Which one, at 1.5x voltage and 2x current? {candidates}",
        "Transistor for {load} A from {supply} V; rate it at 1.5x the voltage, 2x the current: {candidates}",
    )
    supplies = (12, 16, 18, 20, 24, 30, 40, 48)
    loads = (0.1, 0.5, 1, 2, 3, 4, 8, 10, 15, 20)

    def usable(self, part: Part) -> bool:
        # Two digits of volts: a small model compares numbers of one length.
        return part.polarity == "N" and part.voltage < 100 and 0.1 <= part.current < 100

    def need(self, rng: random.Random) -> dict[str, Json]:
        return {"supply": rng.choice(self.supplies), "load": rng.choice(self.loads)}

    def accepts(self, voltage: float, current: float, inputs: dict[str, Any]) -> bool:
        return voltage >= inputs["supply"] * VOLTAGE_MARGIN and current >= inputs["load"] * CURRENT_MARGIN

    def fits(self, part: Part, need: dict[str, Any]) -> bool:
        return self.accepts(part.voltage, part.current, need)

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {
            "supply": f"{inputs['supply']:g}",
            "load": f"{inputs['load']:g}",
            "candidates": self.candidates(inputs),
        }

    def needed(self, inputs: dict[str, Any]) -> tuple[str, float]:
        volts, amps = inputs["supply"] * VOLTAGE_MARGIN, inputs["load"] * CURRENT_MARGIN
        return f"{inputs['supply']:g}*1.5={volts:g}; {inputs['load']:g}*2={amperes(amps)}", amps

    def voltages(self, voltage: float, inputs: dict[str, Any]) -> tuple[str, bool]:
        volts = inputs["supply"] * VOLTAGE_MARGIN
        return compared(f"{voltage:g}", f"{volts:g}"), voltage >= volts

    def pick(self, rng: random.Random, parts: list[Part]) -> Part:
        """Most parts have 20, 30 or 60 V and tens of amperes. Here currents of one digit are as frequent as those of
        two, and among them each voltage: whoever never compares must not be right."""
        large = rng.choice(sorted({part.current >= 10 for part in parts}))
        alike = [part for part in parts if (part.current >= 10) == large]
        voltage = rng.choice(sorted({part.voltage for part in alike}))
        return rng.choice([part for part in alike if part.voltage == voltage])


class Regulator(Selection):
    """Linear regulator with a fixed output: exact voltage, current >= 2 x load."""

    name = "regulator"
    kind = "regulator"
    refused = "no"
    phrasings = (
        "Which regulator makes {output} V for a {load} A load (2x current in reserve)? {candidates}",
        "Choose a linear regulator: {output} V out, load {load} A, rated for twice the load. {candidates}",
        "I need {output} V at {load} A with 2x current margin. Pick one: {candidates}",
        "A {load} A load needs {output} V. Which part has that output and twice the current? {candidates}",
        "Fixed {output} V for {load} A, with 2x current rating: which one? {candidates}",
        "Supply {load} A at {output} V from a linear regulator with twice that current: {candidates}",
    )
    loads = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5)

    def usable(self, part: Part) -> bool:
        return 0.1 <= part.current < 100

    def need(self, rng: random.Random) -> dict[str, Json]:
        return {"output": rng.choice(sorted({p.voltage for p in self.parts})), "load": rng.choice(self.loads)}

    def accepts(self, voltage: float, current: float, inputs: dict[str, Any]) -> bool:
        return voltage == inputs["output"] and current >= inputs["load"] * CURRENT_MARGIN

    def fits(self, part: Part, need: dict[str, Any]) -> bool:
        return self.accepts(part.voltage, part.current, need)

    def distractors(self, need: dict[str, Any]) -> list[Part]:
        """Half of them with the right voltage and too little current, where there are such parts."""
        weak = [p for p in self.parts if p.voltage == need["output"] and not self.fits(p, need)]
        strong = [p for p in self.parts if p.voltage != need["output"]]
        return weak + strong[:: max(1, len(strong) // max(1, len(weak)))]

    def show(self, inputs: dict[str, Any]) -> dict[str, str]:
        return {
            "output": f"{inputs['output']:g}",
            "load": f"{inputs['load']:g}",
            "candidates": self.candidates(inputs),
        }

    def needed(self, inputs: dict[str, Any]) -> tuple[str, float]:
        amps = inputs["load"] * CURRENT_MARGIN
        return f"{inputs['load']:g}*2={amperes(amps)}; {inputs['output']:g} V", amps

    def voltages(self, voltage: float, inputs: dict[str, Any]) -> tuple[str, bool]:
        return f"{voltage:g}", voltage == inputs["output"]
