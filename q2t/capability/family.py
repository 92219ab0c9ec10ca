"""What a problem family is: it poses problems, works them out and verifies answers."""

import random
from typing import ClassVar, Literal

from q2t.records import Json, Problem, Split, Verdict, content_id

Grid = Literal["coarse", "fine"]
"""How close together the values are that operands are drawn from; `capability.grid` in params.yaml."""


class Family:
    """One kind of problem. Subclasses set `name` and `phrasings` and write `draw`.

    A phrasing is a format string over the inputs. A solution is a trajectory in the fewest steps that a small
    model can take without a jump: every number that a step needs stands in the question or in the step before.
    """

    name: ClassVar[str]
    phrasings: ClassVar[tuple[str, ...]]
    held_out: ClassVar[tuple[str, Json] | None] = None
    """An operand and the value of it that occurs in test alone. Families of parts have whole parts held out."""

    @classmethod
    def is_held_out(cls, problem: Problem) -> bool:
        """Whether the problem has the operand value that occurs in test alone."""
        return cls.held_out is not None and problem.inputs[cls.held_out[0]] == cls.held_out[1]

    def for_split(self, split: Split) -> "Family":
        """The family as it may be asked in this split. Calculated families are told apart by their inputs alone."""
        return self

    def draw(self, rng: random.Random, grid: Grid) -> dict[str, Json]:
        """The inputs of one problem, at random. Choices of parts and colour codes are the same on both grids."""
        raise NotImplementedError

    def show(self, inputs: dict[str, Json]) -> dict[str, str]:
        """The inputs as the phrasings write them."""
        raise NotImplementedError

    def solve(self, inputs: dict[str, Json]) -> tuple[str, str]:
        """Reasoning and answer of a worked solution."""
        raise NotImplementedError

    def check(self, inputs: dict[str, Json]) -> dict[str, Json]:
        """The verifier's spec."""
        raise NotImplementedError

    @staticmethod
    def verify(problem: Problem, answer: str) -> Verdict:
        """Decide whether `answer`, the text between the answer tags, solves the problem."""
        raise NotImplementedError

    def pose(self, rng: random.Random, split: Split = "lessons", grid: Grid = "coarse") -> Problem:
        """One problem at random, with its worked solution."""
        inputs = self.draw(rng, grid)
        phrasing = rng.choice(self.phrasings)
        question = phrasing.format(**self.show(inputs))
        reasoning, answer = self.solve(inputs)
        return Problem(
            id=content_id(self.name, inputs, question),
            family=self.name,
            domain="target",
            split=split,
            inputs=inputs,
            question=question,
            check=self.check(inputs),
            solution=f"<think>{reasoning}</think><answer>{answer}</answer>",
        )
