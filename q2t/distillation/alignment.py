"""Alignment across tokenizers: the spans of text where both tokenizations have a boundary, by bytes.

What a token stands for is taken from the vocabulary and checked against the text, so that neither an added begin
token nor a character cut in two can shift what follows, as with decoded strings (TRL #4392). What the losses over
these spans are, `span_losses` says; `online` brings both into a run.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice, takewhile
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from torch import Tensor

from q2t.distillation.rows import Row

INSTEAD = "leave online.spans out, and the teacher's words alone are learnt from (sequence-level)"


class Vocabulary:
    """A tokenizer's tokens as the bytes of text that they stand for.

    Raises:
        ValueError: the tokenizer is neither byte-level nor one with byte fallback.
    """

    pieces: list[bytes]
    """By id; empty where an id has no token."""
    ids: dict[bytes, int]
    """Of all pieces but the end token's, which is no text."""
    special: set[int]
    eos: int

    def __init__(self, tokenizer: Any) -> None:
        decoder = repr(tokenizer.backend_tokenizer.decoder)
        if "ByteLevel" not in decoder and "ByteFallback" not in decoder:
            raise ValueError(
                f"tokenizer: by its decoder ({decoder}) it has no tokens of single bytes, and its tokens can't be "
                f"aligned by bytes: {INSTEAD}"
            )
        by_level = "ByteLevel" in decoder
        to_bytes = _from_byte_level if by_level else _from_byte_fallback
        added = tokenizer.added_tokens_decoder
        names = {index: token for token, index in tokenizer.get_vocab().items()}
        self.pieces = [b""] * (max(names) + 1)
        for index, name in names.items():
            # Where there is a fallback, added tokens are text as any other: gemma's runs of spaces are.
            as_it_stands = index in added and (by_level or added[index].special)
            self.pieces[index] = name.encode() if as_it_stands else to_bytes(name)
        self.eos = tokenizer.eos_token_id
        self.special = {index for index, token in added.items() if token.special}
        # By ascending id: byte-fallback tokens come first, and the letters that text is read as replace them.
        self.ids = {piece: index for index, piece in enumerate(self.pieces) if piece and index != self.eos}

    def is_numeral(self, token: int) -> bool:
        """Decimal digits, with or without space around them, and nothing else."""
        return self.pieces[token].strip().isdigit()

    def beginning_with(self, prefix: bytes) -> dict[bytes, int]:
        """Ids of the tokens that begin with the prefix, by what follows it."""
        if not prefix:
            return self.ids
        found = islice(self._sorted, bisect_left(self._sorted, prefix), None)
        return {p[len(prefix) :]: self.ids[p] for p in takewhile(lambda piece: piece.startswith(prefix), found)}

    @cached_property
    def _sorted(self) -> list[bytes]:
        return sorted(self.ids)


def _from_byte_level(token: str) -> bytes:
    return bytes(_byte_level_alphabet()[character] for character in token)


@cache
def _byte_level_alphabet() -> dict[str, int]:
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def _from_byte_fallback(token: str) -> bytes:
    match = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(match[1]) if match else token.replace("▁", " ").encode()


def same_vocabulary(student: Any, teacher: Any) -> bool:
    """Two tokenizers give every token the same id and end texts on the same one; equal sizes don't show that."""
    return student.get_vocab() == teacher.get_vocab() and student.eos_token_id == teacher.eos_token_id


def difference(student: Any, teacher: Any, to_student: Sequence[int]) -> str:
    """Why the student's vocabulary was not cut from the teacher's; empty if it was. Equal sizes don't show that.

    Args:
        student: its tokenizer, as the teacher's, which may have more tokens than the map.
        to_student: [vocabulary that the student's was cut from], student id or -1.
    """
    theirs = teacher.get_vocab()
    for token, index in sorted(student.get_vocab().items()):
        other = theirs.get(token, -1)
        if not 0 <= other < len(to_student) or to_student[other] != index:
            where = "lacks it" if other < 0 else f"has it as {other}, which is another token of the student's model"
            return f"the student's token {token!r} is {index}, and the teacher {where}"
    if student.eos_token != teacher.eos_token:
        return f"the student's texts end on {student.eos_token!r} and the teacher's on {teacher.eos_token!r}"
    return ""


def align(student: Sequence[int], teacher: Sequence[int]) -> np.ndarray:
    """The shortest spans of whole tokens that cover the same bytes on both sides, in order and without gaps.

    Args:
        student: bytes of each token, none 0; their sum is the text's length.
        teacher: as the student's, of the same text.

    Returns:
        [spans, 2]: number of the student's and of the teacher's tokens up to the end of each span.
    """
    _, ours, theirs = np.intersect1d(np.cumsum(student), np.cumsum(teacher), assume_unique=True, return_indices=True)
    return np.stack([ours, theirs], 1) + 1


@dataclass(frozen=True)
class Spans:
    """Aligned spans of a batch, row after row, as its completion tokens are."""

    student_ends: Tensor
    """[spans], int64: the student's completion tokens up to the end of the span."""
    teacher_ends: Tensor
    """[spans], int64."""
    weights: Tensor
    """[spans], float32: the weight of the span's row."""
    numeral: Tensor
    """[spans], bool: the student or the teacher has a numeral there."""
    kind: Tensor
    """[spans], int64: index into `matched`, 0 if the span is one token on both sides."""
    matched: tuple[tuple[Tensor, Tensor], ...]
    """[outcomes] and [outcomes]: last tokens of the student and of the teacher that make the same text of a span."""
    others: bool
    """The student has tokens, not only special ones, that the teacher lacks."""

    def to(self, device: torch.device) -> "Spans":
        names = ("student_ends", "teacher_ends", "weights", "numeral", "kind")
        matched = tuple((ours.to(device), theirs.to(device)) for ours, theirs in self.matched)
        return replace(self, matched=matched, **{name: getattr(self, name).to(device) for name in names})


def align_rows(rows: Sequence[Row], teacher_rows: Sequence[Row], student: Vocabulary, teacher: Vocabulary) -> Spans:
    """The spans of a batch: the same completions as the student and as the teacher read them.

    The two end tokens are a span of their own.

    Raises:
        ValueError: a row's tokens spell different texts; names the row.
    """
    ends = [np.zeros((1, 2), np.int64)]
    kinds = {(b"", b""): 0}
    weights: list[float] = []
    numeral: list[bool] = []
    kind: list[int] = []
    for row, teacher_row in zip(rows, teacher_rows, strict=True):
        sides = [(student, _completion(row)), (teacher, _completion(teacher_row))]
        assert all(tokens[-1] == vocabulary.eos for vocabulary, tokens in sides)
        pieces = [[vocabulary.pieces[token] for token in tokens[:-1]] for vocabulary, tokens in sides]
        texts = [b"".join(part) for part in pieces]
        if texts[0] != texts[1]:
            at = len(commonprefix(texts))
            ours, theirs = (text[at : at + 20] for text in texts)
            raise ValueError(
                f"row {row.id}: from byte {at} the student's tokens spell {ours!r} and the teacher's {theirs!r}, so "
                f"a tokenizer changes the text or lacks some of it. Leave the row out, or {INSTEAD}"
            )
        # The end counts as one more byte, and so is a span on both sides.
        spans = align(*([*map(len, part), 1] for part in pieces))
        starts = np.concatenate([[[0, 0]], spans[:-1]])
        for start, end in zip(starts.tolist(), spans.tolist(), strict=True):
            ours, theirs = (b"".join(part[a : b - 1]) for part, a, b in zip(pieces, start, end, strict=True))
            # One of the two is the beginning of the other.
            kind.append(kinds.setdefault((ours[len(theirs) :], theirs[len(ours) :]), len(kinds)))
            both = zip(sides, start, end, strict=True)
            numeral.append(any(vocabulary.is_numeral(t) for (vocabulary, said), a, b in both for t in said[a:b]))
        weights += [row.weight] * len(spans)
        ends.append(spans + ends[-1][-1])
    student_ends, teacher_ends = torch.from_numpy(np.concatenate(ends[1:])).unbind(1)
    return Spans(
        student_ends=student_ends,
        teacher_ends=teacher_ends,
        weights=torch.tensor(weights, dtype=torch.float32),
        numeral=torch.tensor(numeral),
        kind=torch.tensor(kind),
        matched=tuple(_matched(student, teacher, *prefixes) for prefixes in kinds),
        others=any(i not in student.special and piece not in teacher.ids for piece, i in student.ids.items()),
    )


def _completion(row: Row) -> list[int]:
    return row.input_ids[row.prompt_length :].tolist()


@cache
def _matched(student: Vocabulary, teacher: Vocabulary, longer: bytes, teacher_longer: bytes) -> tuple[Tensor, Tensor]:
    """Tokens that end in the same text, where one side has already said some bytes more than the other."""
    ours, theirs = student.beginning_with(teacher_longer), teacher.beginning_with(longer)
    pairs = sorted((ours[text], theirs[text]) for text in ours.keys() & theirs.keys())
    if not longer and not teacher_longer:
        pairs.append((student.eos, teacher.eos))
    columns = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]
