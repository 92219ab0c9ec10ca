"""Soft labels: what the writer of a row, and teachers beside it, would have said at each of its tokens, in student
ids."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from q2t.distillation.rows import NO_SYSTEMS, Row, encode
from q2t.records import Example

if TYPE_CHECKING:
    from torch import Tensor

STEPS = "top_logprob_steps"
"""Column of the log-probabilities, see `write`."""
CHUNK = 256
"""Positions whose logits exist at one time."""


class Beside(NamedTuple):
    """A teacher that is mixed into the labels of what another wrote."""

    model: Any
    tokenizer: Any
    """Has the writer's ids for all that the student knows."""
    system: str
    """What it is told before a question of the target domain, as when it answers."""
    weight: float
    """Its share of the mixture."""


def label(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    top_k: int,
    batch_size: int,
    to_student: "Tensor | None",
    student_tokenizer: Any,
    systems: Mapping[str, str] = NO_SYSTEMS,
    beside: Sequence[Beside] = (),
) -> list[Row]:
    """Rows with the log-probabilities of `model`, which wrote them, in the order of the examples.

    With others beside it, those of the mixture: the mean of all distributions by weight (You et al., Learning from
    Multiple Teacher Networks, KDD 2017, who soften each first; here the mixture is softened, in the loss). Each teacher
    reads the question in its own chat template.

    Args:
        model: the writer, a causal language model.
        tokenizer: the writer's.
        top_k: tokens kept per position, the best of those that the student has.
        batch_size: rows per forward pass.
        to_student: [teacher vocabulary], student id or -1, as for the tokens behind its end; None if the ids are the
            same.
        student_tokenizer: has to give the mapped ids on every answer.
        systems: as for `encode`, of the writer's.
        beside: the writer has what their weights leave of 1.

    Raises:
        ValueError: an answer is segmented otherwise by the student; names the row. Or top_k is not smaller than
            the shared vocabulary, or a teacher beside reads a row in other tokens.
    """
    import torch
    from tqdm import tqdm

    from q2t.distillation.batches import collate, output_head, predicting_states

    rows = encode(tokenizer, examples, systems)
    student_rows = encode(student_tokenizer, examples)
    models, read = [model, *(other.model for other in beside)], [rows]
    for other in beside:
        told = {e.teacher: other.system for e in examples if e.domain == "target"}  # no teacher writes of both domains
        read.append(encode(other.tokenizer, examples, told))
        _check_completions(rows, read[-1])
    weights = [1 - math.fsum(other.weight for other in beside), *(other.weight for other in beside)]
    heads = [output_head(each) for each in models]
    head, device = heads[0], heads[0].device
    to_student = torch.arange(len(head)) if to_student is None else to_student.cpu()
    to_student = cover(to_student, tokenizer)
    _check_segmentation(rows, student_rows, to_student.numpy(), student_tokenizer)

    of_teacher = (to_student >= 0).nonzero().squeeze(1)
    if top_k >= len(of_teacher):
        raise ValueError(
            f"top_k is {top_k}, but the student knows {len(of_teacher)} of the teacher's tokens: choose a smaller top_k"
        )
    of_student = to_student[of_teacher].numpy()
    of_teacher = of_teacher.to(device)
    id_type = np.uint16 if of_student.max() < 2**16 else np.int32
    # Longest first: what does not fit into memory fails at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    labelled: dict[int, Row] = {}
    attention = [each.config._attn_implementation for each in models]
    for each in models:
        each.eval()
        if device.type == "cpu" and head.dtype == torch.bfloat16:
            # The fused kernel is slow there: 6.3 s for 64 rows against 5.2.
            each.set_attn_implementation("eager")
    with torch.inference_mode(), tqdm(total=len(rows), desc="label", unit="row") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batches = [collate([each[i] for i in chosen]).to(device) for each in read]
            states = [predicting_states(*each).split(CHUNK) for each in zip(models, batches, strict=True)]
            mixed = (_mixed(part, heads, weights) for part in zip(*states, strict=True))
            parts = [_top(logits, of_teacher, top_k) for logits in mixed]
            columns, top_logprobs, tail_logprob = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
            top_ids = of_student[columns].astype(id_type)
            top_logprobs = top_logprobs.astype(np.float16)
            end = 0
            for i in chosen:
                begin, end = end, end + rows[i].completion_tokens
                labelled[i] = replace(
                    student_rows[i],
                    top_ids=top_ids[begin:end],
                    top_logprobs=top_logprobs[begin:end],
                    tail_logprob=tail_logprob[begin:end],
                )
            bar.update(len(chosen))
    for each, kind in zip(models, attention, strict=True):
        each.set_attn_implementation(kind)
    return [labelled[i] for i in range(len(rows))]


def cover(to_student: "Tensor", teacher: Any) -> "Tensor":
    """The map of the teacher's ids, -1 for tokens that the teacher's tokenizer got after the map was made."""
    import torch

    later = max(teacher.get_vocab().values()) + 1 - len(to_student)
    return torch.nn.functional.pad(to_student, (0, max(0, later)), value=-1)


def _mixed(states: Sequence["Tensor"], heads: Sequence["Tensor"], weights: Sequence[float]) -> "Tensor":
    """Logits [tokens, vocabulary] of the mean of several models' distributions; a single one's are its own.

    Heads may be padded to unequal numbers of tokens; the longest counts.
    """
    from torch.nn.functional import pad

    if len(heads) == 1:
        return states[0] @ heads[0].T
    longest, mixed = max(map(len, heads)), None
    for part, head, weight in zip(states, heads, weights, strict=True):
        logs = (part @ head.T).float().log_softmax(1) + math.log(weight)
        logs = pad(logs, (0, longest - len(head)), value=-math.inf)
        mixed = logs if mixed is None else mixed.logaddexp(logs)
    assert mixed is not None
    return mixed


def _top(logits: "Tensor", of_teacher: "Tensor", k: int) -> tuple["Tensor", "Tensor", "Tensor"]:
    """Columns of `of_teacher` [tokens, k], their log-probabilities [tokens, k], the log of all other mass
    [tokens]."""
    logits = logits.float()
    top, columns = logits[:, of_teacher].topk(k, dim=1)
    # Not log(1 - sum): that has no digits left where the teacher is sure.
    others = logits.scatter_(1, of_teacher[columns], -float("inf"))
    # In place, against their own peak: logsumexp, which takes twice as long for its copies.
    peak = others.amax(1, keepdim=True)
    tail = others.sub_(peak).exp_().sum(1, keepdim=True).log() + peak
    normaliser = top.logsumexp(1, keepdim=True).logaddexp(tail)
    return columns, top - normaliser, (tail - normaliser).squeeze(1)


def _check_segmentation(rows: list[Row], student_rows: list[Row], to_student: np.ndarray, student: Any) -> None:
    for row, expected in zip(rows, student_rows, strict=True):
        mapped = to_student[row.input_ids[row.prompt_length :]]
        wanted = expected.input_ids[expected.prompt_length :]
        if np.array_equal(mapped, wanted):
            continue
        shared = min(len(mapped), len(wanted))
        differs = np.flatnonzero(mapped[:shared] != wanted[:shared])
        at = int(differs[0]) if len(differs) else shared
        token = student.convert_ids_to_tokens(wanted[at : at + 1].tolist())
        raise ValueError(
            f"row {row.id}: token {at} of the answer is {mapped[at : at + 1].tolist()} by the vocabulary map and "
            f"{wanted[at : at + 1].tolist()} {token} by the student's tokenizer: "
            "labels would belong to other tokens. Rebuild the student's vocabulary from these rows"
        )


def _check_completions(rows: list[Row], beside: list[Row]) -> None:
    for row, other in zip(rows, beside, strict=True):
        if not np.array_equal(row.input_ids[row.prompt_length :], other.input_ids[other.prompt_length :]):
            raise ValueError(
                f"row {row.id}: a teacher beside reads it in other tokens than its writer, so that their labels can't "
                "be mixed: leave it out of label.beside"
            )


def write(path: Path, rows: Sequence[Row], *, top_k: int, teachers: dict[str, str]) -> None:
    """Publish rows as Parquet; equal rows give equal bytes.

    Log-probabilities fall from one entry to the next, and so do the bit patterns of a float16 rise: stored are their
    steps, `np.diff` of the patterns as uint16. They and the ids lie in streams of bytes, first bytes apart from second
    ones: for steps less than half of what the values themselves take.

    Args:
        teachers: name to fingerprint of those that labelled, kept in the schema's metadata beside top_k.
    """
    id_type = next((row.top_ids.dtype for row in rows if len(row.top_ids)), np.dtype(np.uint16))
    ids = _concatenate([row.top_ids.ravel() for row in rows], id_type)
    bits = [row.top_logprobs.view(np.uint16) for row in rows]
    steps = _concatenate([np.diff(b, axis=1, prepend=np.uint16(0)).ravel() for b in bits], np.uint16)
    labels = [len(row.top_ids) for row in rows]
    columns = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "domain": pa.array([row.domain for row in rows], pa.string()),
        "family": pa.array([row.family for row in rows], pa.string()),
        "weight": pa.array([row.weight for row in rows], pa.float32()),
        "input_ids": _lists([len(r.input_ids) for r in rows], _concatenate([r.input_ids for r in rows], np.int32)),
        "prompt_length": pa.array([row.prompt_length for row in rows], pa.int32()),
        "answer_start": pa.array([row.answer_start for row in rows], pa.int32()),
        "top_ids": _lists(labels, pa.FixedSizeListArray.from_arrays(ids, top_k)),
        STEPS: _lists(labels, pa.FixedSizeListArray.from_arrays(steps, top_k)),
        "tail_logprob": _lists(labels, _concatenate([row.tail_logprob for row in rows], np.float32)),
    }
    metadata = {"top_k": str(top_k)} | {f"teacher.{name}": teachers[name] for name in sorted(teachers)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(
        pa.table(columns, metadata=metadata),
        partial,
        compression="zstd",
        row_group_size=1024,
        use_dictionary=["id", "domain", "family", "input_ids.list.element"],
        column_encoding={f"{name}.list.element.list.element": "BYTE_STREAM_SPLIT" for name in ("top_ids", STEPS)},
    )
    os.replace(partial, path)


def read(path: Path) -> list[Row]:
    """The rows of `write`, in order."""
    table = pq.read_table(path).combine_chunks()
    k = int(table.schema.metadata[b"top_k"])
    plain = table.select(["id", "domain", "family", "weight", "prompt_length", "answer_start"]).to_pylist()
    lists = {name: _arrays(table[name]) for name in ("input_ids", "top_ids", STEPS, "tail_logprob")}
    return [
        Row(
            **plain[i],
            input_ids=lists["input_ids"][i],
            top_ids=lists["top_ids"][i].reshape(-1, k),
            top_logprobs=lists[STEPS][i].reshape(-1, k).cumsum(1, dtype=np.uint16).view(np.float16),
            tail_logprob=lists["tail_logprob"][i],
        )
        for i in range(len(plain))
    ]


def _concatenate(parts: list[np.ndarray], dtype: Any) -> pa.Array:
    return pa.array(np.concatenate([np.empty(0, dtype), *parts]).astype(dtype))


def _lists(lengths: list[int], values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), values)


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """One array per list, flat, without copying the values."""
    if column.num_chunks == 0:
        return []
    array = column.chunk(0)
    offsets = array.offsets.to_numpy().astype(np.int64)  # of tokens, and soon of k times as many
    flat = array.values
    if pa.types.is_fixed_size_list(flat.type):
        offsets, flat = offsets * flat.type.list_size, flat.values
    values = flat.to_numpy()
    return [values[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
