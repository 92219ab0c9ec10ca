"""How a model is trained: the sections distill and prune, and what specialize shares with them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A closed section: a key that is not declared here is an error, and "3" is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Folder = Annotated[str, AfterValidator(lambda folder: str(Path(folder)))]
"""A model folder, written in one way: "models/teacher/" is "models/teacher"."""
Name = Annotated[str, Field(pattern=r"^[\w-]+$")]
"""Of what the user names: it becomes part of commands, paths and, where a dot parts them, DVC's parameters."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""The range that NumPy takes."""


class Optimizer(Section):
    epochs: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(gt=0)
    """Rows per optimiser step."""
    warmup: float = Field(ge=0, lt=1)
    """Share of the steps; linear decay to zero follows."""
    weight_decay: float = Field(ge=0)


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

    teacher: Folder
    logits: bool = False
    """Whether its whole distribution is learnt from in place of stored labels, with the same alpha, temperature and
    divergence."""
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
        if not (self.logits or self.hidden or self.attention or self.spans):
            raise ValueError(
                "nothing is learnt from this teacher: give logits, hidden, attention or spans, or leave it out"
            )
        if self.spans and (self.logits or self.hidden or self.attention):
            raise ValueError(
                "spans is for a teacher of another tokenizer, whose logits, hidden states and attention maps belong to "
                "other tokens: leave out spans, or these"
            )
        needs = {key: key.removesuffix("_weight") for key in ("hidden_weight", "attention_weight", "spans_weight")}
        for key, loss in (needs | {"distance": "hidden"}).items():
            if key in self.model_fields_set and not getattr(self, loss):
                raise ValueError(f"{key} has no effect without {loss}: leave it out")
        return self


class OnPolicy(Section):
    """The student answers the rows' questions itself, and learns what a teacher says of its answers (GKD, arXiv
    2306.13649): sampled once, as the phase begins."""

    teacher: Folder
    """It has the student's tokens, or more."""
    temperature: float = Field(default=1.0, gt=0)
    max_new_tokens: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    """Of sampling, and of labelling what was sampled."""
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
    seed: Seed
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
    """Whether the other terms are scaled to cross-entropy's size as training goes; see `distillation.weighting`."""
    curriculum: float
    """Above 0, rows count less the better they are learnt; below 0, the further off they are; 0 is off."""
    reasoning: float = Field(gt=0)
    """What a token of the reasoning counts against one of the answer (Distilling Step-by-Step, arXiv 2305.02301)."""
    sparsity: float = Field(ge=0)
    """Strength of an L1 penalty on feed-forward neurons, for a later cut; see `distillation.adapters.shrink`."""
    gradient_checkpointing: bool
    """Whether activations inside a block are computed again for the gradient and not kept: one more forward pass, and
    little memory for long rows."""
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
        in_phases = self.in_phases()
        if self.online and not any(phase.online for phase in in_phases):
            raise ValueError("online has no effect: all phases leave it out")
        if self.online and self.online.logits and not any(p.online and (p.alpha or p.teacher_only) for p in in_phases):
            raise ValueError("online.logits has no effect where alpha is 0: leave it out, or raise alpha")
        if self.on_policy and not any(phase.on_policy for phase in in_phases):
            raise ValueError("on_policy has no effect: all phases leave it out")
        if self.adapter and any(phase.sparsity for phase in in_phases):
            raise ValueError("sparsity shrinks the weights that an adapter leaves as they are: leave one of them out")
        learnt = {domain for phase in in_phases for domain in phase.domains}
        if unknown := sorted({domain for phase in in_phases for domain in phase.teacher_only} - learnt):
            raise ValueError(f"{unknown} in teacher_only has no rows: no phase has it in domains")
        for number, (given, phase) in enumerate(zip(self.phases or [Phase()], in_phases, strict=True), 1):
            if phase.on_policy and given.alpha is not None:
                raise ValueError(
                    f"phase {number} has alpha, which has no effect on_policy, where the teacher's word is all there "
                    "is: leave it out"
                )
            if given.teacher_only and phase.on_policy:
                raise ValueError(f"phase {number} has teacher_only, which all of on_policy is: leave it out")
            if given.beta is not None and phase.divergence != "jsd":
                raise ValueError(f"phase {number} has beta, which {phase.divergence} doesn't know: leave it out")
            if phase.online and phase.on_policy:
                raise ValueError(
                    f"phase {number} is on_policy and has an online teacher, which knows the rows' own answers only: "
                    "give it online: false"
                )
            beside = phase.online and (phase.online.hidden or phase.online.attention or phase.online.spans)
            if beside and (phase.reasoning != 1 or phase.curriculum):
                raise ValueError(
                    f"phase {number} has an online teacher, whose terms reasoning and curriculum would not weight, but "
                    "for logits: leave these at 1.0 and 0.0 there"
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
