"""Task and distillation losses over completion tokens.

`cross_entropy` and `distillation_kl` are the definitions; `completion_loss` is what trains: the same numbers
without ever holding [all tokens, vocabulary]. Everything here is a sum or one value per token, never a mean:
the caller divides by the completion tokens of the whole optimiser step, so that the split into micro-batches
can't change the gradient.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = -1e4
"""Log-probability of an empty bucket: its exponential is 0, and so is 0 * FLOOR, where 0 * -inf is nan."""


class Terms(NamedTuple):
    """Sums over tokens, before and after the weights. Only `total` carries a gradient."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor
    weighted_cross_entropy: Tensor
    weighted_kl: Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target), [tokens], in nats; logits [tokens, vocabulary] are those that predict the targets."""
    return F.cross_entropy(logits, targets, reduction="none")


def distillation_kl(
    logits: Tensor, top_ids: Tensor, top_logprobs: Tensor, tail_logprob: Tensor, temperature: float
) -> Tensor:
    """T² KL(teacher || student) over k + 1 buckets, [tokens], in nats.

    The teacher is known by its k best tokens and the mass of all others, so both distributions are first
    coarse-grained to these k tokens and one tail bucket, at temperature 1 (dropping the tail instead would
    bias the teacher: arXiv 2503.16870), and then tempered by 1/T and renormalised. Equal models give 0 at
    every T, and at T = 1 the value rises with k to the full KL, since merging outcomes can't increase a
    divergence. T² keeps the gradient's magnitude (Hinton et al. 2015, arXiv 1503.02531).

    Shapes: logits [tokens, vocabulary]; top_ids, top_logprobs [tokens, k]; tail_logprob [tokens], which is
    -inf if k is the vocabulary.
    """
    logprobs = logits.log_softmax(-1)
    top = logprobs.gather(1, top_ids)
    if top_ids.shape[1] == logits.shape[1]:
        tail = torch.full_like(top[:, :1], FLOOR)
    else:
        tail = logprobs.scatter(1, top_ids, -torch.inf).logsumexp(1, keepdim=True)
    student = (torch.cat([top, tail], 1) / temperature).log_softmax(1)
    teacher = (_buckets(top_logprobs, tail_logprob) / temperature).log_softmax(1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1)


def completion_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    tail_logprob: Tensor,
    weights: Tensor,
    alpha: float,
    temperature: float,
    chunk: int,
) -> Terms:
    """Sum over tokens of weight * ((1 - alpha) * cross-entropy + alpha * T² KL).

    A token without labels (top_ids -1) gets cross-entropy alone, in full weight. Logits exist for `chunk`
    tokens at a time: their gradient has a closed form and is taken in the same pass, so nothing is kept or
    computed twice. Under autocast the matrix products run in its dtype, all else in float32.

    Args:
        hidden: [tokens, width], of the positions that predict `targets`.
        head_weight: [vocabulary, width].
        targets: [tokens].
        top_ids: [tokens, k]; k may be 0, if no token has labels.
        top_logprobs: [tokens, k].
        tail_logprob: [tokens].
        weights: [tokens], of the row that the token belongs to.
        alpha: weight of the distillation loss.
        temperature: T.
        chunk: tokens.
    """
    labels = (top_ids, top_logprobs, tail_logprob)
    return Terms(*_CompletionLoss.apply(hidden, head_weight, targets, labels, weights, alpha, temperature, chunk))


class _CompletionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        labels: tuple[Tensor, Tensor, Tensor],
        weights: Tensor,
        alpha: float,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        exact = torch.promote_types(hidden.dtype, torch.float32)
        top_ids, top_logprobs, tail_logprob = labels
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head_weight)
        sums = torch.zeros(4, dtype=exact, device=hidden.device)
        labelled = (top_ids >= 0).any(1)
        with torch.autocast(device, enabled=False):
            head = head_weight.to(dtype)
            for has_labels, index in _chunks(labelled, chunk):
                # oneDNN keeps a primitive and its memory per shape: padded, the last chunks have few.
                inputs = F.pad(hidden[index].to(dtype), (0, 0, 0, -len(index) % 32))
                logits = (inputs @ head.T).to(exact)
                weight = weights[index].to(exact)
                k = top_ids.shape[1] if has_labels else 0
                ce_weight, kl_weight = ((1 - alpha) * weight, alpha * weight) if k else (weight, 0 * weight)
                ce, kl = _to_gradient(
                    logits[: len(index)],
                    targets[index],
                    top_ids[index, :k],
                    _buckets(top_logprobs[index, :k], tail_logprob[index]).to(exact),
                    ce_weight,
                    kl_weight,
                    temperature,
                )
                logits[len(index) :] = 0
                sums += torch.stack([ce.sum(), kl.sum(), ce @ ce_weight, kl @ kl_weight])
                gradient = logits.to(dtype)
                grad_hidden[index] = (gradient @ head)[: len(index)].to(hidden.dtype)
                grad_head += gradient.T @ inputs
        ctx.save_for_backward(grad_hidden, grad_head)
        terms = sums.unbind()
        ctx.mark_non_differentiable(*terms)
        return terms[2] + terms[3], *terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grad_total.to(grad_hidden.dtype)
        return grad_hidden * scale, grad_head * scale, None, None, None, None, None, None


def _to_gradient(
    logits: Tensor,
    targets: Tensor,
    top_ids: Tensor,
    teacher: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and T² KL per token; overwrites logits [tokens, vocabulary] by the weighted sum's
    gradient.

    With b the student's bucket log-probabilities, r and p the tempered student and teacher, d(T² KL)/db = T
    (r - p). These sum to 0, so b's normaliser drops out: a top token's logit gets its bucket's slope, and the
    others share the tail's in proportion to their probabilities, as they share the cross-entropy's.
    """
    target = logits.gather(1, targets[:, None]).squeeze(1)
    top = logits.gather(1, top_ids)
    rest = logits.scatter_(1, top_ids, -torch.inf)
    highest = rest.amax(1, keepdim=True).clamp(min=FLOOR)
    rest.sub_(highest).exp_()
    mass = rest.sum(1, keepdim=True)
    tail = (highest + mass.log()).clamp(min=FLOOR)
    student = torch.cat([top, tail], 1)
    normaliser = student.logsumexp(1)
    student -= normaliser[:, None]

    p = (teacher / temperature).log_softmax(1)
    r = (student / temperature).log_softmax(1)
    slope = ce_weight[:, None] * student.exp() + kl_weight[:, None] * temperature * (r.exp() - p.exp())
    rest.mul_(slope[:, -1:] / mass.clamp(min=torch.finfo(mass.dtype).tiny))
    rest.scatter_(1, top_ids, slope[:, :-1])
    rest.scatter_add_(1, targets[:, None], -ce_weight[:, None])
    return normaliser - target, temperature**2 * (p.exp() * (p - r)).sum(1)


def _buckets(top_logprobs: Tensor, tail_logprob: Tensor) -> Tensor:
    return torch.cat([top_logprobs, tail_logprob[:, None]], 1).clamp(min=FLOOR)


def _chunks(labelled: Tensor, size: int) -> list[tuple[bool, Tensor]]:
    """Indices of the tokens in pieces of at most `size`, those with labels apart from those without."""
    pieces = [(True, labelled.nonzero().squeeze(1)), (False, (~labelled).nonzero().squeeze(1))]
    return [(has, part) for has, index in pieces if len(index) for part in index.split(size)]
