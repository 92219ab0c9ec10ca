"""Task and distillation losses over completion tokens.

`cross_entropy` and `distillation` are the definitions; `completion_loss` is what trains: the same numbers without
ever holding [all tokens, vocabulary]. Everything here is a sum or one value per token, never a mean: the caller
divides by the completion tokens of the whole optimiser step, so that the split into micro-batches can't change the
gradient.
"""

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from q2t.config import Divergence

LOGITS = {"cpu": 2**24, "cuda": 2**27}
"""Logits that exist at one time, by device: 64 MB in float32, and 512 on a GPU, which so few leave idle."""
FLOOR = -1e4
"""Log-probability of an empty bucket: its exponential is 0, and so is 0 * FLOOR, where 0 * -inf is nan."""


T = TypeVar("T", Tensor, float)


class Terms(NamedTuple, Generic[T]):
    """Sums over tokens, before and after the weights. Only `total` carries a gradient."""

    total: T
    cross_entropy: T
    distillation: T
    weighted_cross_entropy: T
    weighted_distillation: T


def chunk_size(*heads: Tensor) -> int:
    """Tokens whose logits exist at one time, for the largest of these heads [vocabulary, width]."""
    return max(32, LOGITS[heads[0].device.type] // max(map(len, heads)) // 32 * 32)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target), [tokens], in nats; logits [tokens, vocabulary] are those that predict the targets."""
    return F.cross_entropy(logits, targets, reduction="none")


def divergence(teacher: Tensor, student: Tensor, kind: Divergence, beta: float) -> Tensor:
    """Divergence of two sets of log-probabilities [tokens, outcomes]: [tokens], in nats, 0 where they are equal.

    - forward_kl: KL(teacher || student). The student has to cover all that the teacher would say (Hinton et al. 2015,
      arXiv 1503.02531).
    - reverse_kl: KL(student || teacher). The student keeps to what it can say well, and is punished for what the
      teacher would not say (MiniLLM, arXiv 2306.08543).
    - jsd: generalised Jensen-Shannon, beta KL(teacher || mixture) + (1 - beta) KL(student || mixture), the mixture
      being beta teacher + (1 - beta) student. Bounded; near forward KL, times beta, for a small beta, and near
      reverse KL, times 1 - beta, for a large one (GKD, arXiv 2306.13649).
    """
    if kind == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(1)
    if kind == "reverse_kl":
        return (student.exp() * (student - teacher)).sum(1)
    mixture = _mixture(teacher, student, beta)
    of_teacher = (teacher.exp() * (teacher - mixture)).sum(1)
    of_student = (student.exp() * (student - mixture)).sum(1)
    return beta * of_teacher + (1 - beta) * of_student


def distillation(
    logits: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    tail_logprob: Tensor,
    temperature: float,
    kind: Divergence = "forward_kl",
    beta: float = 0.5,
) -> Tensor:
    """T² times the divergence of teacher and student over k + 1 buckets, [tokens], in nats.

    The teacher is known by its k best tokens and the mass of all others, so both distributions are first
    coarse-grained to these k tokens and one tail bucket, at temperature 1 (dropping the tail instead would
    bias the teacher: arXiv 2503.16870), and then tempered by 1/T and renormalised. Equal models give 0 at
    every T, and at T = 1 the value rises with k to that of the full distributions, since merging outcomes can't
    increase an f-divergence. T² keeps the gradient's magnitude (Hinton et al. 2015, arXiv 1503.02531).

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
    return temperature**2 * divergence(teacher, student, kind, beta)


def completion_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    tail_logprob: Tensor,
    task_weights: Tensor,
    distillation_weights: Tensor,
    temperature: float,
    chunk: int,
    kind: Divergence = "forward_kl",
    beta: float = 0.5,
) -> Terms[Tensor]:
    """Sum over tokens of task weight * cross-entropy + distillation weight * T² divergence.

    A token without labels (top_ids -1) has no divergence, whatever its weight. Logits exist for `chunk`
    tokens at a time: their gradient has a closed form and is taken in the same pass, so nothing is kept or
    computed twice. It is good for one backward. Under autocast the matrix products run in its dtype, all else in
    float32.

    Args:
        hidden: [tokens, width], of the positions that predict `targets`.
        head_weight: [vocabulary, width].
        targets: [tokens].
        top_ids: [tokens, k]; k may be 0, if no token has labels.
        top_logprobs: [tokens, k].
        tail_logprob: [tokens].
        task_weights: [tokens]; no gradient flows into weights.
        distillation_weights: [tokens].
        temperature: T.
        chunk: tokens.
        kind: see `divergence`.
        beta: of the Jensen-Shannon divergence, in (0, 1).
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)

    def to_gradient(
        logits: Tensor, index: Tensor, labelled: bool, task: Tensor, distilled: Tensor
    ) -> tuple[Tensor, Tensor]:
        k = top_ids.shape[1] if labelled else 0
        buckets = _buckets(top_logprobs[index, :k], tail_logprob[index]).to(exact)
        return _to_gradient(
            logits, targets[index], top_ids[index, :k], buckets, task, distilled, temperature, kind, beta
        )

    pieces = _chunks((top_ids >= 0).any(1), chunk)
    return Terms(*_CompletionLoss.apply(hidden, head_weight, (task_weights, distillation_weights), pieces, to_gradient))


class Whole(NamedTuple):
    """A teacher's whole distribution for each token of a batch, which its head makes when it is asked for."""

    hidden: Tensor
    """[tokens, teacher width], of the positions that predict the targets."""
    head_weight: Tensor
    """[student vocabulary, teacher width]: the teacher's rows for the student's tokens, in their order."""

    def logits(self, index: Tensor) -> Tensor:
        """[len(index), student vocabulary]."""
        inputs = F.pad(self.hidden[index].to(self.head_weight.dtype), (0, 0, 0, -len(index) % 32))
        return (inputs @ self.head_weight.T)[: len(index)]


def whole_completion_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    teacher: Whole,
    task_weights: Tensor,
    distillation_weights: Tensor,
    temperature: float,
    chunk: int,
    kind: Divergence = "forward_kl",
    beta: float = 0.5,
) -> Terms[Tensor]:
    """As `completion_loss`, with the teacher's whole distribution in place of its k best tokens and a tail.

    Of what the teacher says in tokens that the student lacks nothing is left: its distribution is the one over the
    student's tokens, renormalised. For `chunk` tokens at a time there are both models' logits, and a few tensors of
    their size.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)

    def to_gradient(logits: Tensor, index: Tensor, _: bool, task: Tensor, distilled: Tensor) -> tuple[Tensor, Tensor]:
        p = (teacher.logits(index).to(exact) / temperature).log_softmax(1)
        student = logits.log_softmax(1)
        r = (student / temperature).log_softmax(1)
        logits.copy_(task[:, None] * student.exp() + distilled[:, None] * temperature * _slope(p, r, kind, beta))
        logits.scatter_add_(1, targets[index, None], -task[:, None])
        return -student.gather(1, targets[index, None]).squeeze(1), temperature**2 * divergence(p, r, kind, beta)

    pieces = [(True, part) for part in torch.arange(len(hidden), device=hidden.device).split(chunk)]
    return Terms(*_CompletionLoss.apply(hidden, head_weight, (task_weights, distillation_weights), pieces, to_gradient))


class _CompletionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        weights: tuple[Tensor, Tensor],
        pieces: list[tuple[bool, Tensor]],
        to_gradient: Callable[[Tensor, Tensor, bool, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        """`to_gradient` takes a piece's logits, its tokens, whether these have labels, and their weights; it overwrites
        the logits by the weighted sum's gradient, and returns cross-entropy and divergence per token."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        exact = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head_weight) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(4, dtype=exact, device=hidden.device)
        rows = max(1, LOGITS[device] // head_weight.shape[1])
        with torch.autocast(device, enabled=False):
            head = head_weight.to(dtype)
            for labelled, index in pieces:
                # oneDNN keeps a primitive and its memory per shape: padded, the last chunks have few.
                inputs = F.pad(hidden[index].to(dtype), (0, 0, 0, -len(index) % 32))
                logits = (inputs @ head.T).to(exact)
                task_weight, distillation_weight = (weight[index].to(exact) for weight in weights)
                ce, kd = to_gradient(logits[: len(index)], index, labelled, task_weight, distillation_weight)
                logits[len(index) :] = 0
                sums += torch.stack([ce.sum(), kd.sum(), ce @ task_weight, kd @ distillation_weight])
                gradient = logits.to(dtype)
                grad_hidden[index] = (gradient @ head)[: len(index)].to(hidden.dtype)
                if grad_head is not None:
                    # By parts of the vocabulary: the whole product would be a second head in memory.
                    for part in range(0, len(head), rows):
                        grad_head[part : part + rows] += gradient[:, part : part + rows].T @ inputs
        ctx.gradients = grad_hidden, grad_head
        terms = sums.unbind()
        ctx.mark_non_differentiable(*terms)
        return terms[2] + terms[3], *terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients, "scaled in place, they are good for one backward"
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None
        scale = grad_total.to(grad_hidden.dtype)
        return grad_hidden.mul_(scale), None if grad_head is None else grad_head.mul_(scale), None, None, None


def _to_gradient(
    logits: Tensor,
    targets: Tensor,
    top_ids: Tensor,
    teacher: Tensor,
    task_weight: Tensor,
    distillation_weight: Tensor,
    temperature: float,
    kind: Divergence,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and T² divergence per token; overwrites logits [tokens, vocabulary] by the weighted sum's
    gradient.

    With b the student's bucket log-probabilities and T * slope the divergence's gradient by b: the slopes sum to 0, so
    b's normaliser drops out. A top token's logit gets its bucket's slope, and the others share the tail's in proportion
    to their probabilities, as they share the cross-entropy's.
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
    slope = task_weight[:, None] * student.exp() + distillation_weight[:, None] * temperature * _slope(p, r, kind, beta)
    rest.mul_(slope[:, -1:] / mass.clamp(min=torch.finfo(mass.dtype).tiny))
    rest.scatter_(1, top_ids, slope[:, :-1])
    rest.scatter_add_(1, targets[:, None], -task_weight[:, None])
    return normaliser - target, temperature**2 * divergence(p, r, kind, beta)


def _slope(p: Tensor, r: Tensor, kind: Divergence, beta: float) -> Tensor:
    """Gradient of `divergence` by the logits of the student r, from the log-probabilities p and r.

    A functional F of a softmax has the gradient r (g - sum of r g), g being dF/dr up to a constant. Forward KL has
    g = -p / r, hence r - p; reverse KL g = log r - log p (MiniLLM, arXiv 2306.08543, has its sampled form); and
    generalised Jensen-Shannon (1 - beta) (log r - log m): of dF/dr all else is constant, since
    beta p + (1 - beta) r is m (divergence as in GKD, arXiv 2306.13649).
    """
    if kind == "forward_kl":
        return r.exp() - p.exp()
    g = r - p if kind == "reverse_kl" else (1 - beta) * (r - _mixture(p, r, beta))
    r = r.exp()
    return r * (g - (r * g).sum(1, keepdim=True))


def _mixture(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(math.log(beta) + teacher, math.log1p(-beta) + student)


def _buckets(top_logprobs: Tensor, tail_logprob: Tensor) -> Tensor:
    return torch.cat([top_logprobs, tail_logprob[:, None]], 1).clamp(min=FLOOR)


def _chunks(labelled: Tensor, size: int) -> list[tuple[bool, Tensor]]:
    """Indices of the tokens in pieces of at most `size`, those with labels apart from those without."""
    pieces = [(True, labelled.nonzero().squeeze(1)), (False, (~labelled).nonzero().squeeze(1))]
    return [(has, part) for has, index in pieces if len(index) for part in index.split(size)]
