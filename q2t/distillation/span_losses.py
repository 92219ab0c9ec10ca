"""Losses over the spans that two tokenizations of a text have in common (`alignment.Spans`).

Sources: Universal Logit Distillation (ULD, arXiv 2402.12030), which compares sorted probabilities, and GOLD (TRL's
`trl.experimental.gold`), which merges the probabilities within a span by the chain rule and compares the tokens that
both vocabularies have one by one. Unlike in TRL 1.16,

- a token is predicted by the position before it, always (TRL's default, "observed", takes the token's own);
- an outcome of a span is all the text that it stands for: where one side says "470" and the other "4", "7", "0", that
  last "0" is compared with "470", and not with "0";
- what is not matched is one bucket of the KL, which so is a divergence: never negative, 0 only where both agree;
- the end of the text is an outcome like others, whatever its token is called;
- values are one per span, never a mean, so that micro-batches add up to the whole.

The default across tokenizers remains sequence-level, since these losses are weak where tokenizations differ, as on
numbers (arXiv 2605.21699): a token also has the probability of all longer ones that begin with it and that its
vocabulary lacks. `Spans.numeral` tells numbers apart.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from q2t.distillation.alignment import Spans
from q2t.distillation.losses import FLOOR, cross_entropy


class Predictions(NamedTuple):
    """What a model says at the completion tokens of a batch, not yet multiplied out."""

    hidden: Tensor
    """[tokens, width], of the positions that predict `targets`."""
    head_weight: Tensor
    """[vocabulary, width]."""
    targets: Tensor
    """[tokens]."""


class Matched(NamedTuple):
    kl: Tensor
    """[spans], nats."""
    uld: Tensor
    """[spans], 0 to 2."""


def uld_loss(student: Predictions, teacher: Predictions, spans: Spans, chunk: int) -> Tensor:
    """ULD: distance of the sorted probabilities, the shorter list padded by zeros, [spans], 0 to 2.

    It needs no matched tokens, and so doesn't know which token is meant. Within a span of several tokens, the
    probabilities of the last one are multiplied by those of the tokens before it, as in GOLD, and so add up to
    less than 1.

    Args:
        student: gets the gradient.
        teacher: of the same rows; gets none.
        chunk: spans whose logits exist at one time. For the gradient they are computed again, not kept.
    """

    def compare(ours: Tensor, theirs: Tensor, *_: Tensor) -> tuple[Tensor]:
        return (_sorted_distance(ours, theirs),)

    (uld,) = _by_span(compare, student, teacher, spans, chunk)
    return uld


def matched_loss(student: Predictions, teacher: Predictions, spans: Spans, chunk: int) -> Matched:
    """GOLD: KL(teacher || student) of the outcomes that both have, and ULD of those that one has. Arguments as
    above.

    All unmatched outcomes are one bucket of the KL. In a span of several tokens that is above all what leaves the
    span's text before the last of them and can't be listed, so ULD is 0 there. A student with nothing but
    matched tokens has no bucket: the teacher's probabilities are renormalised, and ULD is 0.
    """

    def compare(
        ours: Tensor, theirs: Tensor, prefix: Tensor, teacher_prefix: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        kinds = spans.kind[index].tolist()
        columns, teacher_columns = (_columns([spans.matched[kind][side] for kind in kinds]) for side in (0, 1))
        q, unmatched = _split(ours, columns)
        p, teacher_unmatched = _split(theirs, teacher_columns)
        merged = kinds[0] > 0
        if merged or spans.others:
            q = torch.cat([q, _bucket(unmatched, prefix)], 1)
            p = torch.cat([p, _bucket(teacher_unmatched, teacher_prefix)], 1)
        q, p = q.log_softmax(1), p.log_softmax(1)
        kl = (p.exp() * (p - q)).sum(1)
        listed = spans.others and not merged
        return kl, _sorted_distance(unmatched, teacher_unmatched) if listed else torch.zeros_like(kl)

    return Matched(*_by_span(compare, student, teacher, spans, chunk))


def _by_span(
    compare: Callable[..., tuple[Tensor, ...]], student: Predictions, teacher: Predictions, spans: Spans, chunk: int
) -> list[Tensor]:
    """`compare` on the log-probabilities of each span's last token, [spans, vocabulary], those of the tokens
    before it added. A chunk is of one token on both sides throughout, or nowhere."""
    teacher = Predictions(*(part.detach() for part in teacher))
    sides = ((student, spans.student_ends), (teacher, spans.teacher_ends))
    prefixes = [_prefix(side, ends, chunk) for side, ends in sides]

    def values(index: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        logprobs = [
            prefix[index, None] + _logits(hidden, side.head_weight).log_softmax(1)
            for hidden, prefix, (side, _) in zip(states, prefixes, sides, strict=True)
        ]
        return compare(*logprobs, *(prefix[index] for prefix in prefixes), index)

    chunks = [part for kind in (spans.kind == 0, spans.kind > 0) for part in kind.nonzero().squeeze(1).split(chunk)]
    chunks = [part for part in chunks if len(part)]
    parts = [
        checkpoint(values, index, *(side.hidden[ends[index] - 1] for side, ends in sides), use_reentrant=False)
        for index in chunks
    ]
    order = torch.cat(chunks).argsort()
    return [torch.cat(part)[order] for part in zip(*parts, strict=True)]


def _prefix(side: Predictions, ends: Tensor, chunk: int) -> Tensor:
    """Log-probability of each span's tokens but the last, [spans]."""
    span = torch.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)))
    inner = torch.ones_like(span, dtype=torch.bool)
    inner[ends - 1] = False
    total = torch.zeros(len(ends), dtype=_exact(side.hidden), device=ends.device)

    def logprobs(index: Tensor, hidden: Tensor) -> Tensor:
        return -cross_entropy(_logits(hidden, side.head_weight), side.targets[index])

    for index in inner.nonzero().squeeze(1).split(chunk):
        part = checkpoint(logprobs, index, side.hidden[index], use_reentrant=False)
        total = total.index_add(0, span[index], part)
    return total


def _logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    # oneDNN keeps a primitive and its memory per shape.
    padded = F.pad(hidden, (0, 0, 0, -len(hidden) % 32))
    return (padded @ head_weight.T)[: len(hidden)].to(_exact(hidden))


def _exact(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _columns(outcomes: list[Tensor]) -> Tensor:
    """[spans, outcomes], -1 where a span has fewer."""
    if all(one is outcomes[0] for one in outcomes):
        return outcomes[0].expand(len(outcomes), -1)
    return pad_sequence(outcomes, batch_first=True, padding_value=-1)


def _split(logprobs: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The columns, and a copy without them; FLOOR is what isn't there."""
    spare = F.pad(logprobs, (0, 1), value=FLOOR)  # -1 is its last column
    columns = columns % spare.shape[1]
    return spare.gather(1, columns), spare.scatter(1, columns, FLOOR)


def _bucket(unmatched: Tensor, prefix: Tensor) -> Tensor:
    """Log-probability of all unmatched outcomes, and of leaving the span's text before its last token, [spans, 1]."""
    epsilon = torch.finfo(prefix.dtype).eps
    leaving = (-torch.expm1(prefix.clamp(max=-epsilon))).log()
    leaving = torch.where(prefix < 0, leaving, FLOOR)
    return torch.logaddexp(leaving, unmatched.logsumexp(1))[:, None]


def _sorted_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    width = max(ours.shape[1], theirs.shape[1])
    a, b = (F.pad(_descending(x.exp()), (0, width - x.shape[1])) for x in (ours, theirs))
    return (a - b).abs().sum(1)


def _descending(values: Tensor) -> Tensor:
    """The values of each row, the largest first."""
    if values.device.type != "cpu":
        return values.sort(1, descending=True).values
    # numpy's sorts are vectorised: a row of 49,152 takes np.sort 0.5 ms, argsort and gather 2, torch's sort 4. In torch
    # threads share the rows, and so they do here.
    negative = np.array_split(-values.detach().numpy(), torch.get_num_threads())
    with ThreadPoolExecutor(len(negative)) as threads:
        if not values.requires_grad:
            return torch.from_numpy(-np.concatenate(list(threads.map(np.sort, negative))))
        return values.gather(1, torch.from_numpy(np.concatenate(list(threads.map(np.argsort, negative)))))
