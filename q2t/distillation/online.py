"""A teacher that is run beside the student, for what stored labels can't hold: hidden states, attention maps, and
what it says in tokens of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q2t.config import Compute, Online
from q2t.distillation import features, span_losses
from q2t.distillation.alignment import Vocabulary, align_rows, same_vocabulary
from q2t.distillation.batches import Batch, collate
from q2t.distillation.losses import chunk_size
from q2t.distillation.rows import NO_SYSTEMS, Row, encode
from q2t.records import Example
from q2t.sources import load_model, load_tokenizer


class OnlineTerms(NamedTuple):
    """Sums over a batch's completion tokens, or over its spans. Only `total` has weights, and a gradient."""

    total: Tensor
    hidden: Tensor
    attention: Tensor
    spans: Tensor
    numerals: Tensor
    """What of `spans` comes from those with a numeral, where tokenizers differ most."""


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
            ValueError: no model folder, a layer that a model doesn't have, tokens that don't fit the loss, or a row
                whose text a tokenizer changes.
        """
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
        self.rows = {row.id: row for row in of_teacher}
        if settings.spans:  # a text that can't be aligned is refused here, and not when its step comes
            align_rows(rows, [self.rows[row.id] for row in rows], *self.vocabularies)

    def states(self, student: Any, batch: Batch) -> features.States:
        """The student's states that the losses need, with a gradient."""
        return features.capture(student, batch, *self._layers(0))

    def loss(self, student: Any, states: features.States, rows: Sequence[Row], batch: Batch) -> OnlineTerms:
        """The terms of a batch.

        Args:
            states: what `states` gave for it.
            rows: those of the batch.
        """
        settings = self.settings
        teacher_rows = [self.rows[row.id] for row in rows]
        # The teacher's completions are the student's, so that targets and weights are those of the batch.
        device = batch.input_ids.device  # a process of several knows its own once the loop has begun
        teacher_batch = collate(teacher_rows).to(device)
        theirs = features.teacher_states(self.model.to(device), teacher_batch, *self._layers(1))
        zero = torch.zeros((), dtype=torch.promote_types(states.last.dtype, torch.float32), device=states.last.device)
        terms = OnlineTerms(zero, zero, zero, zero, zero)
        if settings.hidden:
            values = features.hidden_loss(states.hidden, theirs.hidden, self.projections, settings.distance)
            terms = _with(terms, "hidden", values, batch.weights, settings.hidden_weight)
        if settings.attention:
            values = features.attention_loss(states.attentions, theirs.attentions, self.groups)
            terms = _with(terms, "attention", values, batch.weights, settings.attention_weight)
        if settings.spans:
            spans = align_rows(rows, teacher_rows, *self.vocabularies).to(device)
            heads = [model.get_output_embeddings().weight for model in (student, self.model)]
            ours = span_losses.Predictions(states.last, heads[0], batch.targets)
            teacher = span_losses.Predictions(theirs.last, heads[1], teacher_batch.targets)
            chunk = chunk_size(*heads)
            if settings.spans == "uld":
                values = span_losses.uld_loss(ours, teacher, spans, chunk)
            else:
                matched = span_losses.matched_loss(ours, teacher, spans, chunk)
                values = matched.kl + matched.uld
            terms = _with(terms, "spans", values, spans.weights, settings.spans_weight)
            terms = terms._replace(numerals=values.detach()[spans.numeral].sum())
        return terms

    def _layers(self, side: int) -> tuple[list[int], list[int]]:
        """Of hidden states and of attention maps, the student's (0) or the teacher's (1)."""
        pairs = self.settings.hidden, self.settings.attention
        hidden, attention = ([pair[side] for pair in of_kind] for of_kind in pairs)
        return hidden, attention


def _with(terms: OnlineTerms, name: str, values: Tensor, weights: Tensor, weight: float) -> OnlineTerms:
    total = terms.total + weight * (values * weights.to(values.dtype)).sum()
    return terms._replace(total=total, **{name: values.detach().sum()})
