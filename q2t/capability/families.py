"""The families there are, and the verdict on an answer to a problem of any of them."""

from q2t.capability.electronics.amplifiers import InvertingGain, NonInvertingGain
from q2t.capability.electronics.catalog import Part
from q2t.capability.electronics.filters import OneShot, RcFilter, Reactance, RlFilter
from q2t.capability.electronics.markings import ColourCode
from q2t.capability.electronics.networks import Divider, LedResistor
from q2t.capability.electronics.parts import Mosfet, Regulator, Selection
from q2t.capability.family import Family
from q2t.records import Problem, Verdict

FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (
        LedResistor,
        Divider,
        RcFilter,
        RlFilter,
        Reactance,
        OneShot,
        NonInvertingGain,
        InvertingGain,
        Mosfet,
        Regulator,
        ColourCode,
    )
}


def make_families(names: list[str], parts: list[Part]) -> list[Family]:
    """The families of these names; those that choose a part get the catalogue.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise ValueError(f"capability.families: unknown {unknown}; there are {sorted(FAMILIES)}")
    made: list[Family] = []
    for name in names:
        family = FAMILIES[name]
        made.append(family(parts) if issubclass(family, Selection) else family())
    return made


def is_held_out(problem: Problem) -> bool:
    """Whether the problem has the operand value that its family keeps for test; False where a family keeps none."""
    return FAMILIES[problem.family].is_held_out(problem)


def verify(problem: Problem, answer: str) -> Verdict:
    """The verdict of the problem's own family on the text between the answer tags."""
    return FAMILIES[problem.family].verify(problem, answer)
