"""What a token counts in each term of the loss: its row's weight, alpha, and what follows the student as it learns."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from q2t.config import Distill
from q2t.distillation.batches import Batch
from q2t.distillation.losses import cross_entropy
from q2t.distillation.rows import Row

LIMIT = 100.0
"""Of `balance`, up and down: a divergence near 0 needs no weight without bounds."""


class Scales(NamedTuple):
    """Factors on the terms beside cross-entropy, over their own weights: what `balance` gives, or 1."""

    distillation: float = 1.0
    hidden: float = 1.0
    attention: float = 1.0
    spans: float = 1.0


EVEN = Scales()


def token_weights(
    batch: Batch, rows: Sequence[Row], settings: Distill, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weights of cross-entropy and of distillation, [tokens] each.

    A token without labels has cross-entropy alone, in full weight; one of `settings.teacher_only`'s domains has
    distillation alone, in full weight. A teacher's whole distribution (`online.logits`) is a label of every token.
    `scale` is the factor on distillation that `balance` gives.
    """
    weights = batch.weights.to(dtype)
    weights = torch.where(batch.reasoning, settings.reasoning * weights, weights)
    labelled = (batch.top_ids >= 0).any(1)
    if settings.online and settings.online.logits:
        labelled = torch.ones_like(labelled)
    task = torch.where(labelled, (1 - settings.alpha) * weights, weights)
    distillation = settings.alpha * scale * weights
    if settings.teacher_only:
        chosen = [float(row.domain in settings.teacher_only) for row in rows]
        alone = labelled & (_of_tokens(chosen, rows, weights) > 0)
        task = task.masked_fill(alone, 0.0)
        distillation = torch.where(alone, scale * weights, distillation)
    return task, distillation


@torch.no_grad()
def curriculum(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, rows: Sequence[Row], strength: float, chunk: int
) -> Tensor:
    """Factor on the weight of each row by its present loss, [tokens], in [0, 1].

    With p = exp(-mean cross-entropy of the row), the mean probability of its tokens: (1 - p)^strength, so that what
    is learnt already counts less (focal loss, arXiv 1708.02002, by row); or, for a negative strength, p^-strength, so
    that what is far off counts little until the student comes near (self-paced learning, Kumar et al. 2010, in a soft
    form). A row's factor depends on no other row, so not on the split into micro-batches. Costs one more product with
    the head.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    parts = []
    for part, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        # oneDNN keeps a primitive and its memory per shape: padded, the last chunks have few.
        logits = F.pad(part, (0, 0, 0, -len(part) % 32)) @ head_weight.T
        parts.append(cross_entropy(logits[: len(part)].to(exact), target))
    losses = torch.cat(parts)
    factors = []
    for of_row in losses.split([row.completion_tokens for row in rows]):
        loss = of_row.mean().item()
        factors.append((-math.expm1(-loss)) ** strength if strength > 0 else math.exp(strength * loss))
    return _of_tokens(factors, rows, losses)


def balance(cross_entropies: Sequence[float], terms: Sequence[float]) -> float:
    """Factor on a term that gives it the scale of cross-entropy, from both in past steps before weighting.

    So alpha, or the term's own weight, alone says what it counts, whatever makes its scale (the balancer of
    NVIDIA's Model-Optimizer, from a running mean, so that single steps don't steer). Sum against sum: tokens without
    labels have their cross-entropy in it. 1 while there is no past.
    """
    task, other = math.fsum(cross_entropies), math.fsum(terms)
    if not other > 0:
        return 1.0
    return min(max(task / other, 1 / LIMIT), LIMIT)


def _of_tokens(values: Sequence[float], rows: Sequence[Row], like: Tensor) -> Tensor:
    """A value of each row at each of its completion tokens, [tokens]."""
    counts = torch.tensor([row.completion_tokens for row in rows])
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(counts).to(like)
