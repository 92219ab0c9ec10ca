"""Losses across tokenizers against a definition that lists every outcome as text."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from q2t.distillation.alignment import Spans, Vocabulary, align_rows
from q2t.distillation.batches import collate, predicting_states
from q2t.distillation.rows import Row
from q2t.distillation.span_losses import Predictions, matched_loss, uld_loss

DIGITS = ("4 7", "47 0", "47 1", "1 2", "12 00", "0 0")
WORDS = ("o h", "oh m", "Ġ ohm", "v o", "vo l", "vol t")
TEXTS = ["470 ohm 12", "4701200 volt", "volt 7 ohmΩ 1200", "", "00 471"]


@cache
def bpe(*merges: str, specials: tuple[str, ...] = ("<pad>", "<end>")) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs = sorted((tuple(merge.split()) for merge in merges), key=lambda pair: len("".join(pair)))
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=specials[1])


def rows_of(tokenizer: Any, texts: list[str], prompt: str = "R?") -> list[Row]:
    rows = []
    for i, text in enumerate(texts):
        start, rest = (tokenizer(part, add_special_tokens=False).input_ids for part in (prompt * (i + 1), text))
        ids = np.array([*start, *rest, tokenizer.eos_token_id], np.int32)
        rows.append(Row(f"r{i}", "target", "f", 1.0 + i, ids, len(start)))
    return rows


class Side(NamedTuple):
    vocabulary: Vocabulary
    rows: list[Row]
    predictions: Predictions

    @property
    def logprobs(self) -> Tensor:
        return (self.predictions.hidden @ self.predictions.head_weight.T).log_softmax(1)


def random_side(tokenizer: Any, texts: list[str], seed: int, spare: int = 0) -> Side:
    """Random states, of a width of 4, and a head with some rows more than the tokenizer has tokens."""
    rows = rows_of(tokenizer, texts)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.from_numpy(np.concatenate([row.input_ids[row.prompt_length :] for row in rows])).long()
    hidden, head = (
        torch.randn(n, 4, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (len(targets), len(tokenizer) + spare)
    )
    return Side(Vocabulary(tokenizer), rows, Predictions(hidden, head, targets))


def exactly(side: Side, probabilities: list[dict[str, float]]) -> Side:
    """The side with these probabilities per token; what is left over goes to token "X"."""
    rows = torch.full((len(probabilities), len(side.vocabulary.pieces)), 1e-30, dtype=torch.float64)
    for row, given in zip(rows, probabilities, strict=True):
        for piece, probability in (given | {"X": max(1e-30, 1 - sum(given.values()))}).items():
            row[side.vocabulary.eos if piece == "END" else side.vocabulary.ids[piece.encode()]] = probability
    eye = torch.eye(rows.shape[1], dtype=torch.float64)
    return side._replace(predictions=Predictions(rows.log(), eye, side.predictions.targets))


def spans_of(student: Side, teacher: Side) -> Spans:
    return align_rows(student.rows, teacher.rows, student.vocabulary, teacher.vocabulary)


def outcomes(side: Side, start: int, end: int) -> dict[bytes, float]:
    """Probability of each text that the span could have been."""
    logprobs, targets, pieces = side.logprobs, side.predictions.targets.tolist(), side.vocabulary.pieces
    text, prefix = b"", 1.0
    for at in range(start, end - 1):
        text, prefix = text + pieces[targets[at]], prefix * logprobs[at, targets[at]].exp().item()
    last = (prefix * logprobs[end - 1].exp()).tolist()
    listed = {text + piece: last[i] for i, piece in enumerate(pieces) if i != side.vocabulary.eos}
    return listed | {text + b"\0END": last[side.vocabulary.eos]}


def by_definition(student: Side, teacher: Side) -> tuple[Tensor, Tensor]:
    spans, values = spans_of(student, teacher), []
    starts = [[0, *ends.tolist()[:-1]] for ends in (spans.student_ends, spans.teacher_ends)]
    for s0, s1, t0, t1 in zip(
        starts[0], spans.student_ends.tolist(), starts[1], spans.teacher_ends.tolist(), strict=True
    ):
        q, p = outcomes(student, s0, s1), outcomes(teacher, t0, t1)
        both = sorted(q.keys() & p.keys())
        ours, theirs = np.array([q[text] for text in both]), np.array([p[text] for text in both])
        merged = s1 - s0 > 1 or t1 - t0 > 1
        if merged or spans.others:
            ours, theirs = np.append(ours, 1 - ours.sum()), np.append(theirs, 1 - theirs.sum())
        else:
            ours, theirs = ours / ours.sum(), theirs / theirs.sum()
        uld = 0.0
        if spans.others and not merged:
            rest = [sorted((x[text] for text in x.keys() - set(both)), reverse=True) for x in (q, p)]
            width = max(map(len, rest))
            a, b = (np.pad(np.array(x), (0, width - len(x))) for x in rest)
            uld = abs(a - b).sum()
        said = theirs > 1e-12  # the teacher may have no others, but for rounding
        values.append(((theirs[said] * np.log(theirs[said] / ours[said])).sum(), uld))
    kl, uld = torch.tensor(values, dtype=torch.float64).unbind(1)
    return kl, uld


PAIRS = {
    "one tokenizer": (DIGITS + WORDS, DIGITS + WORDS),
    "merged digits, single digits": (DIGITS + WORDS[:3], WORDS),
    "single digits, merged digits": (WORDS, DIGITS + WORDS[:3]),
    "bytes, words": ((), DIGITS + WORDS),
    "words, bytes": (DIGITS + WORDS, ()),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_values_are_those_of_the_listed_outcomes(pair: str) -> None:
    ours, theirs = PAIRS[pair]
    student, teacher = random_side(bpe(*ours), TEXTS, 0), random_side(bpe(*theirs), TEXTS, 1)
    values = matched_loss(student.predictions, teacher.predictions, spans_of(student, teacher), 3)
    kl, uld = by_definition(student, teacher)
    torch.testing.assert_close(values.kl, kl)
    torch.testing.assert_close(values.uld, uld)
    assert kl.min() > 0 and (uld.max() > 0) == spans_of(student, teacher).others == (len(ours) > 0 and ours != theirs)


@pytest.mark.parametrize("pair", PAIRS)
def test_uld_is_sorted_and_follows_the_chain_rule(pair: str) -> None:
    ours, theirs = PAIRS[pair]
    student, teacher = random_side(bpe(*ours), TEXTS, 0, spare=5), random_side(bpe(*theirs), TEXTS, 1)
    spans, expected = spans_of(student, teacher), []
    starts = {side: 0 for side in ("student", "teacher")}
    for s1, t1 in zip(spans.student_ends.tolist(), spans.teacher_ends.tolist(), strict=True):
        lists = []
        for name, side, end in (("student", student, s1), ("teacher", teacher, t1)):
            probabilities = side.logprobs.exp()
            before = range(starts[name], end - 1)
            prefix = np.prod([probabilities[at, side.predictions.targets[at]].item() for at in before])
            lists.append(sorted((prefix * probabilities[end - 1]).tolist(), reverse=True))
            starts[name] = end
        width = max(map(len, lists))
        padded = [np.pad(np.array(x), (0, width - len(x))) for x in lists]
        expected.append(abs(padded[0] - padded[1]).sum())
    values = uld_loss(student.predictions, teacher.predictions, spans, 4)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


def test_equal_models_have_no_loss_whatever_their_tokens_are_called() -> None:
    """The teacher's ids are the student's in another order, its end token has another name."""
    student = random_side(bpe(*DIGITS, *WORDS), TEXTS, 0)
    other = random_side(bpe(*WORDS, *DIGITS, specials=("<pad>", "</s>", "<more>")), TEXTS, 0)
    text_of = {piece: i for i, piece in enumerate(student.vocabulary.pieces)}
    text_of |= {b"</s>": student.vocabulary.eos, b"<more>": text_of[b"<pad>"]}
    head = student.predictions.head_weight[[text_of[piece] for piece in other.vocabulary.pieces]]
    # Nobody says "<more>", or it would take probability from the others.
    head = head.clone()
    hidden = torch.cat([student.predictions.hidden, torch.ones(len(student.predictions.hidden), 1)], 1)
    silent = torch.zeros(len(head), 1, dtype=torch.float64)
    silent[other.vocabulary.ids[b"<more>"]] = -1e3
    teacher = other._replace(predictions=Predictions(hidden, torch.cat([head, silent], 1), other.predictions.targets))
    assert student.predictions.targets.tolist() != teacher.predictions.targets.tolist()
    spans = spans_of(student, teacher)
    values = matched_loss(student.predictions, teacher.predictions, spans, 3)
    assert values.kl.abs().max() < 1e-9 and values.uld.abs().max() < 1e-9
    assert uld_loss(student.predictions, teacher.predictions, spans, 3).abs().max() < 1e-9


def test_a_shift_by_one_is_seen() -> None:
    student, teacher = (random_side(bpe(*DIGITS, *WORDS), TEXTS, 0) for _ in range(2))
    spans = spans_of(student, teacher)
    assert matched_loss(student.predictions, teacher.predictions, spans, 8).kl.abs().max() < 1e-12
    shifted = teacher.predictions._replace(hidden=teacher.predictions.hidden.roll(1, 0))
    assert matched_loss(student.predictions, shifted, spans, 8).kl.min() > 0.01
    assert uld_loss(student.predictions, shifted, spans, 8).sum() > 1


def test_merged_digits_agree_with_single_digits_that_say_the_same() -> None:
    """By tokens, "0" would be compared with "0", which the student never says; by text all is as it should be."""
    student, teacher = random_side(bpe(*DIGITS), ["470"], 0), random_side(bpe(), ["470"], 1)
    ours = exactly(student, [{"470": 0.24, "471": 0.12, "4": 0.3}, {"END": 0.9}])
    theirs = exactly(teacher, [{"4": 0.5}, {"7": 0.8}, {"0": 0.6, "1": 0.3}, {"END": 0.9}])
    spans = spans_of(ours, theirs)
    assert spans.numeral.tolist() == [True, False]
    kl, uld = matched_loss(ours.predictions, theirs.predictions, spans, 2)
    assert kl.abs().max() < 1e-12 and uld.abs().max() < 1e-12
    less = exactly(student, [{"470": 0.12, "471": 0.12, "4": 0.3}, {"END": 0.9}])
    expected = 0.24 * np.log(0.24 / 0.12) + 0.64 * np.log(0.64 / 0.76)
    torch.testing.assert_close(
        matched_loss(less.predictions, theirs.predictions, spans, 2).kl, torch.tensor([expected, 0.0]).double()
    )


def test_a_student_without_words_is_not_asked_for_them() -> None:
    """All that it has, the teacher has: what the teacher says in other tokens can't be asked of its special ones."""
    student = random_side(bpe(specials=("<pad>", "<end>", "<mine>")), ["X"], 0)
    teacher = random_side(bpe(*DIGITS), ["X"], 1)
    ours = exactly(student, [{"4": 0.5}, {"END": 1.0}])
    theirs = exactly(teacher, [{"47": 0.5, "4": 0.25}, {"END": 1.0}])
    spans = spans_of(ours, theirs)
    assert not spans.others and spans_of(theirs, ours).others
    kl, uld = matched_loss(ours.predictions, theirs.predictions, spans, 2)
    assert kl.abs().max() < 1e-12 and not uld.any()


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("pair", ["merged digits, single digits", "single digits, merged digits", "bytes, words"])
def test_gradient_by_finite_differences(pair: str, chunk: int) -> None:
    texts = ["470", "7 ohm"]
    student, teacher = (random_side(bpe(*m), texts, seed) for seed, m in enumerate(PAIRS[pair]))
    spans, targets = spans_of(student, teacher), student.predictions.targets

    def values(hidden: Tensor, head: Tensor) -> Tensor:
        ours = Predictions(hidden, head, targets)
        kl, uld = matched_loss(ours, teacher.predictions, spans, chunk)
        weights = torch.linspace(1, 2, len(kl), dtype=torch.float64)
        return torch.stack([kl @ weights, uld @ weights, uld_loss(ours, teacher.predictions, spans, chunk) @ weights])

    inputs = student.predictions.hidden, student.predictions.head_weight
    assert torch.autograd.gradcheck(values, inputs, fast_mode=True)
    (values(*inputs) ** 2).sum().backward()
    assert teacher.predictions.hidden.grad is None and teacher.predictions.head_weight.grad is None


def test_sure_models_have_finite_gradients() -> None:
    """Probabilities of 1 in float32: what leaves the span has none."""
    student, teacher = random_side(bpe(), ["470"], 0), random_side(bpe(*DIGITS), ["470"], 1)
    ours, theirs = (
        exactly(side, [{piece: 1 - 1e-20} for piece in pieces]).predictions
        for side, pieces in ((student, ["4", "7", "0", "END"]), (teacher, ["470", "END"]))
    )
    ours, theirs = (Predictions(p.hidden.float(), p.head_weight.float(), p.targets) for p in (ours, theirs))
    ours.hidden.requires_grad_()
    for loss in (matched_loss, uld_loss):
        values = loss(ours, theirs, spans_of(student, teacher), 4)
        (values if loss is uld_loss else values.kl + values.uld).sum().backward()
        assert ours.hidden.grad.isfinite().all() and ours.hidden.grad.abs().max() < 1e-3


def tiny(vocabulary: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, initializer_range=0.3, pad_token_id=1, eos_token_id=1, **shape)
    ).double()


def trained(student: Any, teacher: Any, ours: Any, theirs: Any) -> Callable[[list[int]], Tensor]:
    vocabularies = Vocabulary(ours), Vocabulary(theirs)
    # Another prompt on either side, as by another chat template.
    rows, teacher_rows = rows_of(ours, TEXTS), rows_of(theirs, TEXTS, prompt="<q>R?")

    def total(chosen: list[int]) -> Tensor:
        parts = [[side[i] for i in chosen] for side in (rows, teacher_rows)]
        predictions = []
        for model, part in zip((student, teacher), parts, strict=True):
            batch = collate(part)
            hidden = predicting_states(model, batch)
            predictions.append(Predictions(hidden, model.get_output_embeddings().weight, batch.targets))
        spans = align_rows(*parts, *vocabularies)
        kl, uld = matched_loss(*predictions, spans, 4)
        return (spans.weights.double() * (kl + uld + uld_loss(*predictions, spans, 4))).sum()

    return total


def test_micro_batches_add_up_and_the_teacher_gets_no_gradient() -> None:
    """Rows of unequal length, padded with the id of the end token, one of them empty."""
    ours, theirs = bpe(*DIGITS, *WORDS[:3]), bpe(*WORDS)
    gradients = []
    for split in ([[0, 1, 2, 3, 4]], [[0, 1], [2, 3], [4]], [[3], [0], [4], [2], [1]]):
        student, teacher = tiny(len(ours), 0), tiny(len(theirs) + 3, 1)
        total = trained(student, teacher, ours, theirs)
        for chosen in split:
            total(chosen).backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
        assert all(parameter.grad is None for parameter in teacher.parameters())
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_gradient_reaches_completions_alone() -> None:
    ours, theirs = bpe(*DIGITS, *WORDS[:3]), bpe(*WORDS)
    student, teacher, seen = tiny(len(ours), 0), tiny(len(theirs), 1), []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    student.model.layers[-1].register_forward_hook(keep)
    trained(student, teacher, ours, theirs)(list(range(len(TEXTS)))).backward()
    torch.testing.assert_close(seen[0].grad.abs().sum(2) > 0, collate(rows_of(ours, TEXTS)).predicts)


def test_float32_under_autocast_is_near() -> None:
    ours, theirs = bpe(*DIGITS, *WORDS[:3]), bpe(*WORDS)
    student, teacher = tiny(len(ours), 0).float(), tiny(len(theirs), 1).float()
    total = trained(student, teacher, ours, theirs)
    exact = total([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = total([0, 1, 2])
    rounded.backward()
    assert 0 < (rounded - exact).abs() / exact < 0.02
