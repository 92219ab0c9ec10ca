"""Families whose answer is a calculated quantity: what they share."""

from typing import Any, ClassVar

from q2t.capability.electronics.values import UNITS, parse
from q2t.capability.family import Family
from q2t.records import Json, Problem, Verdict


class Calculated(Family):
    """The answer is one quantity, exact for values of a series or within a tolerance."""

    unit: ClassVar[str]
    tolerance: ClassVar[float] = 0.02
    """Relative. 2% is far less than the step between two values of the finest series in use, E24."""

    def expected(self, inputs: dict[str, Any]) -> float:
        """The right value in `unit`, from the inputs and the textbook formula; never from the worked solution."""
        raise NotImplementedError

    def check(self, inputs: dict[str, Json]) -> dict[str, Json]:
        assert self.unit in UNITS, f"{self.name}: values.UNITS does not say how {self.unit} is written"
        value = float(f"{self.expected(inputs):.6g}")
        return {"kind": "value", "unit": self.unit, "expected": value, "tolerance": self.tolerance}

    @staticmethod
    def verify(problem: Problem, answer: str) -> Verdict:
        spec: dict[str, Any] = problem.check
        try:
            value = parse(answer, spec["unit"])
        except ValueError:
            return Verdict(correct=False, rule="no_quantity", measured=answer[:80])
        # One part per million on top: the spec itself is rounded to six digits.
        correct = abs(value - spec["expected"]) <= (spec["tolerance"] + 1e-6) * abs(spec["expected"])
        return Verdict(correct=correct, rule="ok" if correct else "wrong_value", measured=value)
