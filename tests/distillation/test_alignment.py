"""Spans by bytes: any text, any two tokenizers that have all bytes."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q2t.distillation.alignment import Vocabulary, align, align_rows, difference, same_vocabulary
from q2t.distillation.rows import Row

CORPUS = [
    "The resistor is 4700 ohm and the supply is 12.5 V; take 4.7k, 47k or 470.",
    "Wir löten den Kondensator (4,7 µF) an Ω. 4700 and 1234, 1200, 120, 12 \N{OK HAND SIGN}\N{OK HAND SIGN}",
] * 9


def byte_level(vocabulary: int, single_digits: bool, end: str = "<|im_end|>", words: bool = True) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|pad|>", end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token="<|pad|>")


def byte_fallback() -> Any:
    """As gemma's: spaces are ▁, and what has no token of its own is read by its bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeohmt 0123456789", "▁o", "12"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("▁", "o"), ("1", "2")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


TOKENIZERS = {
    "merged digits": byte_level(330, single_digits=False),
    "single digits": byte_level(310, single_digits=True, end="<|endoftext|>"),
    "no words": byte_level(400, single_digits=False, words=False),
    "byte fallback": byte_fallback(),
}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def row(name: str, text: str, prompt: int = 1, weight: float = 1.0) -> Row:
    tokenizer = TOKENIZERS[name]
    ids = [*[5] * prompt, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return Row(f"row of {name}", "target", "f", weight, np.array(ids, np.int32), prompt)


def test_a_run_of_spaces_that_gemma_has_as_an_added_token_is_spaces() -> None:
    tokenizer = byte_fallback()
    tokenizer.add_tokens(["▁▁"])
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.pieces[tokenizer.convert_tokens_to_ids("▁▁")] == b"  "
    assert vocabulary.pieces[tokenizer.eos_token_id] == b"<eos>"
    ids = tokenizer("a  b", add_special_tokens=False).input_ids
    assert b"".join(vocabulary.pieces[index] for index in ids) == b"a  b"


texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("0123456789 .kΩµ"), max_size=60)
texts |= st.lists(st.sampled_from(CORPUS[0].split() + CORPUS[1].split())).map(" ".join)


@settings(max_examples=150)
@given(texts, st.sampled_from(sorted(TOKENIZERS)), st.sampled_from(sorted(TOKENIZERS)))
def test_spans_cover_any_text_in_order_and_can_not_be_shorter(text: str, ours: str, theirs: str) -> None:
    names = (ours, theirs)
    if "byte fallback" in names and "▁" in text:
        return
    rows = [row(name, text) for name in names]
    vocabularies = [VOCABULARIES[name] for name in names]
    spans = align_rows([rows[0]], [rows[1]], *vocabularies)
    cuts = []
    for one, vocabulary, ends in zip(rows, vocabularies, (spans.student_ends, spans.teacher_ends), strict=True):
        tokens = one.input_ids[1:].tolist()
        assert ends[-1] == len(tokens) and (torch.diff(ends, prepend=torch.tensor([0])) > 0).all()
        pieces = [vocabulary.pieces[token] for token in tokens[:-1]] + [b"END"]
        cuts.append([pieces[a:b] for a, b in pairwise([0, *ends.tolist()])])
        assert b"".join(pieces) == text.encode() + b"END"
    for a, b in zip(*cuts, strict=True):
        assert b"".join(a) == b"".join(b)
        inner = [{len(b"".join(pieces[:i])) for i in range(1, len(pieces))} for pieces in (a, b)]
        assert not inner[0] & inner[1], "a shorter span was possible"
    assert cuts[0][-1] == cuts[1][-1] == [b"END"]
    assert (spans.kind == 0).tolist() == [len(a) == len(b) == 1 for a, b in zip(*cuts, strict=True)]


@given(st.lists(st.integers(1, 9), min_size=1), st.data())
def test_align_by_hand(lengths: list[int], data: st.DataObject) -> None:
    total = sum(lengths)
    cuts = data.draw(st.sets(st.integers(1, total)).map(lambda inner: sorted(inner | {total})))
    others = np.diff([0, *cuts]).tolist()
    shared = sorted(set(np.cumsum(lengths).tolist()) & set(cuts))
    spans = align(lengths, others).tolist()
    assert [sum(lengths[:a]) for a, _ in spans] == [sum(others[:b]) for _, b in spans] == shared


def test_merged_digits_against_single_digits() -> None:
    ours, theirs = row("merged digits", "is 4700 V", weight=2.0), row("single digits", "is 4700 V")
    vocabularies = VOCABULARIES["merged digits"], VOCABULARIES["single digits"]
    spans = align_rows([ours, ours], [theirs, theirs], *vocabularies)
    pieces = [vocabularies[0].pieces[token] for token in ours.input_ids[1:-1].tolist()]
    assert pieces == [b"is", b" 4700", b" V"], "the corpus makes this one token"
    assert [vocabularies[1].pieces[token] for token in theirs.input_ids[1:-1].tolist()] == [
        *[b"is", b" ", b"4", b"7", b"0", b"0", b" V"],
    ]
    assert spans.student_ends.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert spans.teacher_ends.tolist() == [1, 6, 7, 8, 9, 14, 15, 16]
    assert spans.weights.tolist() == [2.0] * 8
    assert spans.numeral.tolist() == [False, True, False, False] * 2
    assert len(spans.matched) == 2 and spans.kind.tolist() == [0, 1, 0, 0] * 2

    some = [row(name, "is 4700 V5") for name in ("merged digits", "single digits")]
    spans = align_rows(some[:1], some[1:], *vocabularies)
    assert spans.numeral.tolist() == [False, True, False, True, False]
    assert spans.kind.tolist() == [0, 1, 0, 0, 0], "5 is one token for both"


def test_outcomes_are_matched_by_the_text_of_the_span() -> None:
    ours, theirs = VOCABULARIES["merged digits"], VOCABULARIES["single digits"]
    spans = align_rows([row("merged digits", "is 4700 V")], [row("single digits", "is 4700 V")], ours, theirs)
    for i, teacher in zip(*(part.tolist() for part in spans.matched[1]), strict=True):
        assert ours.pieces[i] == b" 470" + theirs.pieces[teacher]
    assert b" 4700" in [ours.pieces[i] for i in spans.matched[1][0].tolist()]
    for i, teacher in zip(*(part.tolist() for part in spans.matched[0]), strict=True):
        assert ours.pieces[i] == theirs.pieces[teacher] or (i, teacher) == (ours.eos, theirs.eos)
    assert len(spans.matched[0][0]) == len(ours.ids.keys() & theirs.ids.keys()) + 1
    swapped = align_rows([row("single digits", "is 4700 V")], [row("merged digits", "is 4700 V")], theirs, ours)
    for pair, other in zip(spans.matched, swapped.matched, strict=True):
        assert set(zip(*map(torch.Tensor.tolist, pair), strict=True)) == set(
            zip(*map(torch.Tensor.tolist, reversed(other)), strict=True)
        )


def test_the_same_tokenizer_gives_every_token_its_own_span() -> None:
    name = "merged digits"
    spans = align_rows([row(name, CORPUS[1])], [row(name, CORPUS[1], prompt=3)], VOCABULARIES[name], VOCABULARIES[name])
    assert spans.student_ends.tolist() == spans.teacher_ends.tolist() == list(range(1, len(spans.kind) + 1))
    assert not spans.others and not spans.kind.any() and spans.numeral.any()
    ids = torch.arange(len(TOKENIZERS[name]))
    torch.testing.assert_close(spans.matched[0][0].sort().values, ids)
    torch.testing.assert_close(spans.matched[0][0], spans.matched[0][1])


def test_a_changed_text_is_refused() -> None:
    ours, theirs = row("merged digits", "a resistor"), row("single digits", "a Resistor")
    with pytest.raises(ValueError, match="row of merged digits: from byte 2 .* b'resistor' .* b'Resistor'.*sequence-l"):
        align_rows([ours], [theirs], VOCABULARIES["merged digits"], VOCABULARIES["single digits"])


def test_a_tokenizer_without_bytes_is_refused() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="no tokens of single bytes.*sequence-level"):
        Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a"))


def test_letters_are_preferred_to_their_fallback_bytes() -> None:
    vocabulary = VOCABULARIES["byte fallback"]
    tokenizer = TOKENIZERS["byte fallback"]
    assert [vocabulary.ids[piece] for piece in (b"a", b" o", b"12")] == tokenizer("a o12").input_ids
    assert vocabulary.pieces[vocabulary.ids["µ".encode()[:1]]] == b"\xc2"


def test_numerals_are_told_apart() -> None:
    (a, b) = (VOCABULARIES[name].is_numeral for name in ("merged digits", "byte fallback"))
    assert a(VOCABULARIES["merged digits"].ids[b" 4700"]) and b(VOCABULARIES["byte fallback"].ids[b"12"])
    assert not a(VOCABULARIES["merged digits"].ids[b" "]) and not a(VOCABULARIES["merged digits"].eos)


def test_vocabularies_of_one_size_with_other_ids_are_refused(tokenizer) -> None:
    ours, theirs = tokenizer(), tokenizer(("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    assert len(ours) == len(theirs) and not same_vocabulary(ours, theirs)
    same, swapped = list(range(len(ours))), [2, 1, 0, *range(3, len(ours))]
    other = "and the teacher has it as 2, which is another token of the student's model"
    assert difference(ours, theirs, same) == f"the student's token '<|endoftext|>' is 0, {other}"
    assert difference(ours, theirs, swapped) == ""
    assert same_vocabulary(ours, tokenizer()) and difference(ours, tokenizer(), same) == ""
    assert "which is another token" in difference(ours, tokenizer(), same[:-1])

    theirs = tokenizer()
    theirs.add_tokens(["<think>"])
    assert difference(ours, theirs, same) == ""  # more tokens than the student's model
    assert "token '<think>' is 259, and the teacher lacks it" in difference(theirs, ours, [*same, 259])
    theirs.eos_token = "<|endoftext|>"
    assert (
        difference(ours, theirs, same) == "the student's texts end on '<|im_end|>' and the teacher's on '<|endoftext|>'"
    )


def test_added_tokens_are_text_and_not_an_alphabet_of_bytes() -> None:
    tokenizer = byte_level(300, single_digits=True)
    tokenizer.add_tokens(["<｜think｜> µ"])
    assert Vocabulary(tokenizer).pieces[len(tokenizer) - 1] == "<｜think｜> µ".encode()
