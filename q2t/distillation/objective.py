"""What a step minimises, for one micro-batch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from q2t.config import Distill
from q2t.distillation import batches, weighting
from q2t.distillation.losses import chunk_size, completion_loss, whole_completion_loss
from q2t.distillation.online import OnlineTeacher
from q2t.distillation.rows import Row


class Losses(NamedTuple):
    """Sums over completion tokens, or means of a step's. Only what is weighted has the weights of rows and terms."""

    total: float
    cross_entropy: float
    distillation: float
    weighted_cross_entropy: float
    weighted_distillation: float
    hidden: float = 0.0
    attention: float = 0.0
    spans: float = 0.0
    numerals: float = 0.0
    weighted_hidden: float = 0.0
    weighted_attention: float = 0.0
    weighted_spans: float = 0.0


class Objective(nn.Module):
    """All that is trained, the student and the projections of its teacher, and the loss that trains it.

    One module whose forward gives the loss, so that a student whose weights lie in shards is whole wherever the loss
    reads them: the fused loss multiplies by the head's weight itself, past the head's forward.
    """

    def __init__(self, student: Any, teacher: OnlineTeacher | None = None) -> None:
        super().__init__()
        self.student = student
        self.projections = teacher.projections if teacher else None
        self.teacher = teacher

    def forward(self, micro: Sequence[Row], settings: Distill, scales: weighting.Scales) -> tuple[Tensor, Losses]:
        """The sum of the weighted losses, with a gradient, and what it is made of.

        Args:
            micro: rows of a micro-batch.
            settings: of the phase; the teacher is asked if they have `online`.
            scales: factors on the terms, beside their weights.
        """
        head = batches.output_head(self.student)
        batch = batches.collate(micro).to(head.device)
        teacher = self.teacher if settings.online else None
        if teacher:
            states, asked = teacher.states(self.student, batch), teacher.ask(micro, head.device)
            hidden, whole = states.last, teacher.whole(asked)
        else:
            hidden, whole = batches.predicting_states(self.student, batch), None
        exact = torch.promote_types(hidden.dtype, torch.float32)
        weights = weighting.token_weights(batch, micro, settings, scales.distillation, exact)
        chunk = chunk_size(head)
        if settings.curriculum:
            factor = weighting.curriculum(hidden, head, batch.targets, micro, settings.curriculum, chunk)
            weights = (weights[0] * factor, weights[1] * factor)
        how = (*weights, settings.temperature, chunk, settings.divergence, settings.beta)
        if whole:
            terms = whole_completion_loss(hidden, head, batch.targets, whole, *how)
        else:
            terms = completion_loss(
                hidden, head, batch.targets, batch.top_ids, batch.top_logprobs, batch.tail_logprob, *how
            )
        losses = Losses(*torch.stack([term.detach() for term in terms]).tolist())  # one wait for the device
        if not teacher:
            return terms.total, losses
        beside = teacher.loss(self.student, states, asked, micro, batch, scales)
        total = terms.total + beside.total
        sums = torch.stack([value.detach() for value in beside]).tolist()
        of_teacher = dict(zip(beside._fields, sums, strict=True))
        return total, losses._replace(**of_teacher | {"total": total.item()})
