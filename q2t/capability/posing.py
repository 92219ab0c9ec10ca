"""Problems for every split, disjoint by inputs and by part."""

import random

from q2t.capability.family import Family
from q2t.config import Capability
from q2t.records import Problem, Split, operands

TARGET_SPLITS: tuple[Split, ...] = ("test", "dev", "lessons", "questions")
"""Test first: a problem that is drawn twice stays where it measures."""
HELD_OUT = 6
"""One test problem in so many has the family's held-out operand value, which no other split ever shows."""
ATTEMPTS = 200
"""Draws for each wanted problem before a family counts as exhausted."""


def pose(families: list[Family], settings: Capability, seed: int) -> dict[Split, list[Problem]]:
    """`settings.SPLIT` problems of each family for each target split, no inputs twice.

    Raises:
        ValueError: a family has fewer different inputs than are asked for.
    """
    posed: dict[Split, list[Problem]] = {split: [] for split in TARGET_SPLITS}
    for family in families:
        rng = random.Random(f"{seed}/{family.name}")
        seen: set[str] = set()
        for split in TARGET_SPLITS:
            asked = family.for_split(split)
            wanted = getattr(settings, split)
            fresh: list[Problem] = []
            for _ in range(ATTEMPTS * wanted):
                if len(fresh) == wanted:
                    break
                problem = asked.pose(rng, split, settings.grid)
                wants_held_out = split == "test" and len(fresh) < wanted // HELD_OUT
                if family.held_out and family.is_held_out(problem) != wants_held_out:
                    continue
                key = operands(problem)
                if key not in seen:
                    seen.add(key)
                    fresh.append(problem if split == "lessons" else problem.model_copy(update={"solution": ""}))
            if len(fresh) < wanted:
                lacking = "inputs of their own"
                if family.held_out and split == "test" and len(fresh) < wanted // HELD_OUT:
                    lacking = "{} = {}, as one test problem in {} has,".format(*family.held_out, HELD_OUT)
                raise ValueError(
                    f"capability.{split}: {wanted} problems asked of family {family.name!r}, "
                    f"which has only {len(fresh)} more with {lacking} on the {settings.grid} grid; "
                    "ask for fewer, or set capability.grid to fine"
                )
            posed[split].extend(fresh)
    for problems in posed.values():
        random.Random(seed).shuffle(problems)
    return posed
