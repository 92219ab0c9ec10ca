"""A teacher that is run beside the student, for what stored labels can't hold: its whole distribution, hidden states,
attention maps, and what it says in tokens of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q2t.config import Compute, Online
from q2t.distillation import features, span_losses
from q2t.distillation.alignment import Vocabulary, align_rows, same_vocabulary
from q2t.distillation.batches import Batch, collate, output_head
from q2t.distillation.losses import Whole, chunk_size
from q2t.distillation.rows import NO_SYSTEMS, Row, encode
from q2t.distillation.weighting import EVEN, Scales
from q2t.records import Example
from q2t.sources import load_model, load_tokenizer


class OnlineTerms(NamedTuple):
    """Sums over a batch's completion tokens, or over its spans. Only `total` has a gradient."""

    total: Tensor
    """Of the weighted terms."""
    hidden: Tensor
    attention: Tensor
    spans: Tensor
    numerals: Tensor
    """What of `spans` comes from those with a numeral, where tokenizers differ most."""
    weighted_hidden: Tensor
    weighted_attention: Tensor
    weighted_spans: Tensor


class Asked(NamedTuple):
    """What the teacher makes of a batch's rows."""

    rows: list[Row]
    batch: Batch
    states: features.States


class OnlineTeacher:
    """Holds the teacher, its rows, and the projections that are trained beside the student."""

    def __init__(
        self,
        settings: Online,
        student: Any,
        tokenizer: Any,
        rows: Sequence[Row],
        examples: Sequence[Example],
        *,
        seed: int,
        compute: Compute,
        systems: Mapping[str, str] = NO_SYSTEMS,
    ) -> None:
        """Load the teacher and read the rows as it does.

        Args:
            tokenizer: the student's.
            rows: those that are learnt from.
            examples: theirs.
            seed: of the projections.
            systems: as for `rows.encode`: what a row's writer was told before the question. With `spans` alone, where
                the teacher reads rows of its own.

        Raises:
            ValueError: no model folder, a layer that a model doesn't have, tokens that don't fit the loss, a row
                whose text a tokenizer changes, or a row whose writer was told more than the student reads.
        """
        learnt = {row.id for row in rows}
        told = sorted({each.teacher for each in examples if each.id in learnt and systems.get(each.teacher)})
        if told and not settings.spans:
            raise ValueError(
                f"online: {told[0]} answered behind its `system` prompt, which the teacher beside would not see: it "
                "reads the student's own rows. Learn from stored labels, which have the prompt"
            )
        folder = Path(settings.teacher)
        self.settings = settings
        try:
            self.model = load_model(folder, compute.dtype).requires_grad_(False)
            theirs = load_tokenizer(folder)
        except ValueError as error:
            raise ValueError(f"online.teacher: {error}") from None
        configs = student.config.get_text_config(), self.model.config.get_text_config()
        pairs = {"hidden": settings.hidden, "attention": settings.attention}
        for field, layers in pairs.items():
            if layers:
                features.check_layer_map(f"online.{field}", layers, *configs, embeddings=field == "hidden")
        if settings.attention:
            self.model.set_attn_implementation("eager")
            self.groups = features.head_groups(*configs)
        ours, wanted = (config.hidden_size for config in configs)
        self.projections = features.Projections(len(settings.hidden), ours, wanted, seed)
        if settings.spans:
            if same_vocabulary(tokenizer, theirs):
                raise ValueError(
                    "online.spans is for a teacher with other tokens than the student's, and these have the same: "
                    "leave it out, stored labels compare them token by token"
                )
            self.vocabularies = Vocabulary(tokenizer), Vocabulary(theirs)
            of_teacher = encode(theirs, examples, systems)
        else:
            of_teacher = features.in_teacher_ids(rows, tokenizer, theirs)
        self.head: Tensor | None = None  # of `logits`, once the device is known
        if settings.logits:
            self.ids = _in_teacher_ids(student, tokenizer, theirs)
        self.rows = {row.id: row for row in of_teacher}
        if settings.spans:  # a text that can't be aligned is refused here, and not when its step comes
            align_rows(rows, [self.rows[row.id] for row in rows], *self.vocabularies)

    def states(self, student: Any, batch: Batch) -> features.States:
        """The student's states that the losses need, with a gradient."""
        return features.capture(student, batch, *self._layers(0))

    def ask(self, rows: Sequence[Row], device: torch.device) -> Asked:
        """The teacher's states for the rows of a batch, without a gradient."""
        teacher_rows = [self.rows[row.id] for row in rows]
        # The teacher's completions are the student's, so that targets and weights are those of the student's batch.
        batch = collate(teacher_rows).to(device)
        # Here, since a process of several knows its device once the loop has begun.
        states = features.teacher_states(self.model.to(device), batch, *self._layers(1))
        return Asked(teacher_rows, batch, states)

    def whole(self, asked: Asked) -> Whole | None:
        """Its distributions over the student's tokens, if `logits` are asked for."""
        if not self.settings.logits:
            return None
        last = asked.states.last
        if self.head is None or self.head.device != last.device:
            self.head = output_head(self.model)[self.ids.to(last.device)]
        return Whole(last, self.head)

    def loss(
        self,
        student: Any,
        states: features.States,
        asked: Asked,
        rows: Sequence[Row],
        batch: Batch,
        scales: Scales = EVEN,
    ) -> OnlineTerms:
        """The terms of a batch.

        Args:
            states: what `states` gave for it, as `asked` what `ask` did.
            rows: those of the batch.
            scales: factors on the terms, beside their weights.
        """
        settings = self.settings
        teacher_rows, teacher_batch, theirs = asked
        zero = torch.zeros((), dtype=torch.promote_types(states.last.dtype, torch.float32), device=states.last.device)
        terms = OnlineTerms(*[zero] * len(OnlineTerms._fields))
        if settings.hidden:
            values = features.hidden_loss(states.hidden, theirs.hidden, self.projections, settings.distance)
            terms = _with(terms, "hidden", values, batch.weights, settings.hidden_weight * scales.hidden)
        if settings.attention:
            values = features.attention_loss(states.attentions, theirs.attentions, self.groups)
            terms = _with(terms, "attention", values, batch.weights, settings.attention_weight * scales.attention)
        if settings.spans:
            spans = align_rows(rows, teacher_rows, *self.vocabularies).to(batch.input_ids.device)
            heads = [output_head(model) for model in (student, self.model)]
            ours = span_losses.Predictions(states.last, heads[0], batch.targets)
            teacher = span_losses.Predictions(theirs.last, heads[1], teacher_batch.targets)
            chunk = chunk_size(*heads)
            if settings.spans == "uld":
                values = span_losses.uld_loss(ours, teacher, spans, chunk)
            else:
                matched = span_losses.matched_loss(ours, teacher, spans, chunk)
                values = matched.kl + matched.uld
            terms = _with(terms, "spans", values, spans.weights, settings.spans_weight * scales.spans)
            terms = terms._replace(numerals=values.detach()[spans.numeral].sum())
        return terms

    def _layers(self, side: int) -> tuple[list[int], list[int]]:
        """Of hidden states and of attention maps, the student's (0) or the teacher's (1)."""
        pairs = self.settings.hidden, self.settings.attention
        hidden, attention = ([pair[side] for pair in of_kind] for of_kind in pairs)
        return hidden, attention


def _in_teacher_ids(student: Any, tokenizer: Any, theirs: Any) -> Tensor:
    """[student vocabulary]: the teacher's id of the same token.

    Raises:
        ValueError: the teacher lacks a token of the student's, or ends texts on another.
    """
    ours, known = tokenizer.get_vocab(), theirs.get_vocab()
    assert len(student.get_output_embeddings().weight) == len(ours), "initialize leaves no row without a token"
    ids = torch.empty(len(ours), dtype=torch.int64)
    for token, index in ours.items():
        if token not in known:
            raise ValueError(
                f"online.logits: the teacher lacks the student's token {token!r}: take a teacher whose vocabulary the "
                "student's was cut from, or spans for one with another tokenizer"
            )
        ids[index] = known[token]
    if tokenizer.eos_token != theirs.eos_token:
        raise ValueError(
            f"online.logits: the student's texts end on {tokenizer.eos_token!r} and the teacher's on "
            f"{theirs.eos_token!r}: take a teacher whose vocabulary the student's was cut from"
        )
    return ids


def _with(terms: OnlineTerms, name: str, values: Tensor, weights: Tensor, weight: float) -> OnlineTerms:
    weighted = weight * (values * weights.to(values.dtype)).sum()
    sums = {name: values.detach().sum(), f"weighted_{name}": weighted.detach()}
    return terms._replace(total=terms.total + weighted, **sums)
