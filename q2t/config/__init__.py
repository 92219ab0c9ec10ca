"""params.yaml as closed, typed models: one class per section, unknown keys refused, and sections that have to fit.

params.yaml is read as YAML 1.2, as DVC writes it (after `-S lr=5e-5` a YAML 1.1 reader returns a string).
"""

import difflib
import math
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError, model_validator

from q2t.config.sections import (
    Capability,
    Compute,
    Evaluate,
    Export,
    Filter,
    Initialize,
    Label,
    Scratch,
    Source,
    Specialize,
    Teacher,
    Tracking,
    Weights,
)
from q2t.config.training import (
    Adapter,
    Distill,
    Divergence,
    Domain,
    Name,
    Online,
    OnPolicy,
    Optimizer,
    Phase,
    Prune,
    Schedule,
    Section,
    Seed,
)

__all__ = [
    "Adapter",
    "Capability",
    "Compute",
    "Distill",
    "Divergence",
    "Domain",
    "Evaluate",
    "Export",
    "Filter",
    "Initialize",
    "Label",
    "OnPolicy",
    "Online",
    "Optimizer",
    "PARAMS",
    "Params",
    "Phase",
    "Prune",
    "Schedule",
    "Scratch",
    "Section",
    "Source",
    "Specialize",
    "Teacher",
    "Tracking",
    "Weights",
    "load",
]

PARAMS = Path("params.yaml")


class Params(Section):
    """All of params.yaml."""

    seed: Seed
    compute: Compute
    launch: str
    """The command that runs the module of a stage which can have several processes; it ends with -m."""
    sources: dict[Name, Source]
    capability: Capability
    specialize: Specialize
    teachers: dict[Name, Teacher]
    filter: Filter
    initialize: Initialize
    label: Label
    distill: Distill
    prune: Prune
    export: Export
    evaluate: Evaluate
    tracking: Tracking

    @property
    def systems(self) -> dict[str, str]:
        """The system prompt of each teacher that has one, by name."""
        return {name: teacher.system for name, teacher in self.teachers.items() if teacher.system}

    @property
    def told(self) -> dict[str, str]:
        """What each model folder is told where it answers the questions, of those that are told anything."""
        return {t.model: t.system for t in self.teachers.values() if t.system and t.prompts == "questions"}

    @model_validator(mode="after")
    def _launch_starts_a_module(self) -> "Params":
        if self.launch.split()[-1:] != ["-m"]:
            raise ValueError(f"launch: {self.launch!r} would start no module: end it with -m")
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> "Params":
        if self.specialize.source not in self.sources:
            raise ValueError(f"specialize: source {self.specialize.source!r} is not in sources: {list(self.sources)}")
        if unknown := [name for name in self.filter.teachers if name not in self.teachers]:
            raise ValueError(f"filter: teachers names {unknown}, which are not in teachers: {list(self.teachers)}")
        if self.label.top_k >= self.initialize.vocabulary:
            raise ValueError(
                f"label: top_k is {self.label.top_k}, and initialize.vocabulary leaves the student no more than "
                f"{self.initialize.vocabulary} tokens: choose a smaller top_k"
            )
        if "reference" not in self.teachers or self.teachers["reference"].prompts != "general_test":
            raise ValueError(
                "teachers: reference answers what forgetting is measured on: give it, with prompts: general_test"
            )
        return self

    @model_validator(mode="after")
    def _a_model_is_told_one_thing(self) -> "Params":
        phases = [phase for section in (self.distill, self.prune) for phase in section.in_phases()]
        asked = {
            *self.evaluate.models.values(),
            *self.label.beside,
            *(p.on_policy.teacher for p in phases if p.on_policy),
        }
        for name, teacher in self.teachers.items():
            answers = teacher.prompts == "questions" and teacher.model in asked
            if answers and teacher.system != self.told.get(teacher.model, ""):
                raise ValueError(
                    f"teachers: {name} and another have {teacher.model!r} answer questions behind different `system` "
                    "prompts, and where it is asked without a name nobody would know which: give both the same"
                )
        return self

    @model_validator(mode="after")
    def _teachers_are_watched(self) -> "Params":
        # Folders that dvc.yaml's label, distill and prune depend on.
        watched = ["models/teacher", *(f"models/sources/{name}" for name in self.sources)]
        for folder in self.label.beside:
            if folder not in watched:
                raise ValueError(
                    f"label: beside names {folder!r}, and DVC would not see it change: name one of "
                    f"{', '.join(watched)}, and put other models into sources; an endpoint has no probabilities to mix"
                )
        for name, section in (("distill", self.distill), ("prune", self.prune)):
            for phase in section.in_phases():
                for key, given in (("online", phase.online), ("on_policy", phase.on_policy)):
                    if given and given.teacher not in watched:
                        raise ValueError(
                            f"{name}: {key}.teacher is {given.teacher!r}, and DVC would not see it change: name one "
                            f"of {', '.join(watched)}, and put other models into sources"
                        )
        return self

    @model_validator(mode="after")
    def _writers_have_a_say(self) -> "Params":
        for name in self.filter.teachers:
            together = math.fsum(self.label.beside_writer(self.teachers[name].model).values())
            if together > 1 - 1e-6:
                raise ValueError(
                    f"label: beside has weights of {together:g} together for what {name} wrote: leave it some of 1"
                )
        writers = [self.teachers[name].model for name in self.filter.teachers]
        if self.label.beside and not any(map(self.label.beside_writer, writers)):
            raise ValueError(f"label: beside names {writers[0]} alone, which wrote all rows: leave it out")
        return self

    @model_validator(mode="after")
    def _rows_can_be_mixed(self) -> "Params":
        share, read = self.filter.target_share, {name: self.teachers[name] for name in self.filter.teachers}
        if held_out := [name for name, teacher in read.items() if teacher.prompts == "general_test"]:
            raise ValueError(
                f"filter: teachers names {held_out}, whose prompts forgetting is measured on: leave them out"
            )
        wanted = ["target", "general"] if share < 1 else ["target"]
        if lacking := [domain for domain in wanted if domain not in {teacher.domain for teacher in read.values()}]:
            other = ", or set target_share to 1.0" if lacking == ["general"] else ""
            raise ValueError(
                f"filter: target_share is {share}, and no answer of teachers {list(read)} is {lacking[0]}: name one "
                f"who gives such{other}"
            )
        for name, section in (("distill", self.distill), ("prune", self.prune)):
            if any(not set(wanted) & set(phase.domains) for phase in section.in_phases()):
                raise ValueError(f"{name}: domains has general rows alone, and filter.target_share {share} leaves none")
        return self

    @model_validator(mode="after")
    def _online_teachers_read_what_writers_did(self) -> "Params":
        told = [name for name in self.filter.teachers if name in self.systems]
        for name, section in (("distill", self.distill), ("prune", self.prune)):
            for phase in section.in_phases():
                learnt = [each for each in told if self.teachers[each].domain in phase.domains]
                if learnt and phase.online and not phase.online.spans:
                    raise ValueError(
                        f"{name}: the teacher of online reads the student's own rows, which lack the `system` prompt "
                        f"that {learnt[0]} answers behind: learn from stored labels, which have it"
                    )
        return self


def load(path: Path = PARAMS) -> Params:
    """Read and check params.yaml.

    Raises:
        ValueError: names every wrong key with its section and, for an unknown key, the nearest valid one; or the place
            that is no YAML.
    """
    from ruamel.yaml import YAML, YAMLError

    try:
        raw = YAML(typ="safe").load(path)
    except YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(e)}" for e in error.errors())
        raise ValueError(f"{path}:\n{problems}") from None


def _explain(error: Any) -> str:
    # A map's key that is wrong has "[key]" behind it; what is wrong with a whole section isn't all that it holds.
    *section, key = [part for part in error["loc"] if part != "[key]"] or ["params"]
    where = ".".join(map(str, section)) or "the top level"
    if error["type"] == "extra_forbidden":
        valid = _keys(section)
        near = difflib.get_close_matches(str(key), valid, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
        return f"unknown key {key!r} in {where}: {hint}"
    if error["type"] == "missing":
        return f"{key!r} is missing in {where}"
    got = "" if isinstance(error["input"], dict) else f"; got {error['input']!r}"
    return f"{key!r} in {where}: {error['msg']}{got}"


def _keys(section: list[str]) -> list[str]:
    """The valid keys of the section at this path."""
    model: type[Section] = Params
    for name in section:
        if name in model.model_fields:  # else it is a name in a map, such as sources.NAME
            annotation = model.model_fields[name].annotation
            (model,) = (
                a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, Section)
            )
    return sorted(model.model_fields)
