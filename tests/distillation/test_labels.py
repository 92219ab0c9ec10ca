"""Labels belong to the tokens beside them, in the student's ids."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import Tokenizer

from q2t.distillation import labels
from q2t.distillation.batches import collate
from q2t.distillation.labels import Beside
from q2t.distillation.losses import completion_loss
from q2t.distillation.rows import Row, encode
from q2t.sources import chat_prompt


def call(model: Any, teacher: Any, examples: Any, **changed: Any) -> list[Row]:
    arguments = {"top_k": 20, "batch_size": 3, "to_student": None, "student_tokenizer": teacher}
    return labels.label(model, teacher, examples, **(arguments | changed))


def loss_of(model: Any, rows: list[Row], temperature: float = 1.0, how: Any = ("forward_kl", 0.5)) -> Any:
    """Divergence of the model's own completion states against the labels, per token."""
    batch = collate(rows)
    with torch.no_grad():
        states = model.base_model(input_ids=batch.input_ids).last_hidden_state
        terms = completion_loss(
            states[batch.predicts],
            model.lm_head.weight,
            batch.targets,
            batch.top_ids,
            batch.top_logprobs,
            batch.tail_logprob,
            batch.weights,
            batch.weights,
            temperature,
            64,
            *how,
        )
        logits = states[batch.predicts] @ model.lm_head.weight.T
    return float(terms.distillation) / len(batch.targets), logits.argmax(1), batch


every_kind = pytest.mark.parametrize("how", [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.3)])


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_teacher_as_student_has_no_loss(
    model: Any, tokenizer: Any, examples: Any, temperature: float, how: Any
) -> None:
    network = model()
    rows = call(network, tokenizer(), examples(7))
    loss, best, batch = loss_of(network, rows, temperature, how)
    assert abs(loss) < 1e-4  # float16's rounding
    assert (best == batch.top_ids[:, 0]).all()


@every_kind
def test_labels_of_the_next_position_have_a_loss(model: Any, tokenizer: Any, examples: Any, how: Any) -> None:
    network = model()
    rows = call(network, tokenizer(), examples(7))
    for row in rows:
        for values in (row.top_ids, row.top_logprobs, row.tail_logprob):
            values[:-1] = values[1:].copy()
    assert loss_of(network, rows, 1.0, how)[0] > 0.1


def test_labels_are_the_models_logprobs(model: Any, tokenizer: Any, examples: Any) -> None:
    """Against the plain forward pass of one row, without batches, buckets or chunks."""
    network, text = model().eval(), tokenizer()
    row = call(network, text, examples(4))[2]
    example = examples(4)[2]
    assert text.decode(row.input_ids[row.prompt_length :]) == example.text + "<|im_end|>"
    assert text.decode(row.input_ids[: row.prompt_length]) == (
        f"<|im_start|>user\n{example.question}<|im_end|>\n<|im_start|>assistant\n"
    )
    with torch.no_grad():
        logprobs = network(torch.tensor(row.input_ids[None]).long()).logits[0].log_softmax(-1)
    expected = logprobs[row.prompt_length - 1 : -1]
    top, ids = expected.topk(20, dim=1)
    assert (ids.numpy() == row.top_ids).all()
    np.testing.assert_allclose(row.top_logprobs, top, rtol=1e-3)
    mass = np.exp(row.top_logprobs.astype(float)).sum(1) + np.exp(row.tail_logprob)
    np.testing.assert_allclose(mass, 1, atol=2e-3)


def test_labels_of_several_teachers_are_those_of_their_mixture(model: Any, tokenizer: Any, examples: Any) -> None:
    writer, others = model(0), [model(1), model(2)]
    k = 299  # all but one: nothing hides in the tail
    beside = [Beside(each, tokenizer(), "", share) for each, share in zip(others, (0.3, 0.2), strict=True)]
    rows = call(writer, tokenizer(), examples(5), top_k=k, beside=beside)
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            said = [each(input_ids=ids).logits[0, row.prompt_length - 1 : -1].softmax(1) for each in (writer, *others)]
        mixture = 0.5 * said[0] + 0.3 * said[1] + 0.2 * said[2]
        expected = mixture.log().gather(1, torch.from_numpy(row.top_ids.astype(np.int64)))
        torch.testing.assert_close(torch.from_numpy(row.top_logprobs).float(), expected, rtol=2e-3, atol=2e-3)
        assert (expected.diff(dim=1) <= 1e-3).all()  # the likeliest of the mixture first


def test_a_teacher_with_another_chat_template_reads_the_question_in_its_own(
    model: Any, tokenizer: Any, examples: Any
) -> None:
    theirs, network = tokenizer(), model()
    theirs.chat_template = "Be exact. " + theirs.chat_template
    rows = call(network, theirs, examples(3), student_tokenizer=tokenizer())
    for row, asked, said in zip(rows, encode(tokenizer(), examples(3)), encode(theirs, examples(3)), strict=True):
        assert np.array_equal(row.input_ids, asked.input_ids) and row.prompt_length == asked.prompt_length
        with torch.no_grad():
            logprobs = network(torch.tensor(said.input_ids[None]).long()).logits[0].log_softmax(-1)
        top = logprobs[said.prompt_length - 1 : -1].topk(20, dim=1).values
        np.testing.assert_allclose(row.top_logprobs, top, rtol=1e-3, atol=1e-3)


def test_a_teacher_beside_itself_changes_no_label(model: Any, tokenizer: Any, examples: Any) -> None:
    alone = call(model(), tokenizer(), examples(5))
    twice = call(model(), tokenizer(), examples(5), beside=[Beside(model(), tokenizer(), "", 0.4)])
    for a, b in zip(alone, twice, strict=True):
        assert np.array_equal(a.top_ids, b.top_ids)
        np.testing.assert_allclose(a.top_logprobs.astype(float), b.top_logprobs.astype(float), atol=4e-3)
        np.testing.assert_allclose(a.tail_logprob, b.tail_logprob, atol=1e-5)


def test_a_teacher_beside_reads_the_question_behind_its_own_prompt(model: Any, tokenizer: Any, examples: Any) -> None:
    network = model(1)
    for told in ("", "Be brief."):
        rows = call(model(0), tokenizer(), examples(3), top_k=299, beside=[Beside(network, tokenizer(), told, 0.5)])
        for row, example in zip(rows, examples(3), strict=True):
            before = tokenizer()(chat_prompt(tokenizer(), example.question, told), add_special_tokens=False).input_ids
            after = row.input_ids[row.prompt_length :]
            with torch.no_grad():
                said = network(torch.tensor([[*before, *after]]).long()).logits[0, len(before) - 1 : -1].softmax(1)
                own = (
                    model(0)(torch.tensor(row.input_ids[None]).long()).logits[0, row.prompt_length - 1 : -1].softmax(1)
                )
            expected = (0.5 * said + 0.5 * own).log().gather(1, torch.from_numpy(row.top_ids.astype(np.int64)))
            torch.testing.assert_close(torch.from_numpy(row.top_logprobs).float(), expected, rtol=2e-3, atol=2e-3)


def test_a_teacher_beside_is_told_nothing_before_a_general_question(model: Any, tokenizer: Any, examples: Any) -> None:
    general = [example.model_copy(update={"domain": "general"}) for example in examples(3)]

    def labels(told: str) -> list[Row]:
        return call(model(0), tokenizer(), general, beside=[Beside(model(1), tokenizer(), told, 0.5)])

    for told, plain in zip(labels("Be brief."), labels(""), strict=True):
        assert np.array_equal(told.top_logprobs, plain.top_logprobs)


def test_more_than_two_billion_labels_are_told_apart() -> None:
    """Their places, as many as tokens by k, are more than the 32 bits hold that Arrow counts the tokens in."""
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2**31 + 2**16, np.uint8)), 2**16)
    lists = pa.ListArray.from_arrays(pa.array([0, 2**15, 2**15 + 1], pa.int32()), values)
    assert [len(one) for one in labels._arrays(pa.chunked_array([lists]))] == [2**31, 2**16]


def test_heads_of_teachers_may_be_padded_to_unequal_lengths(model: Any, tokenizer: Any, examples: Any) -> None:
    """No token that counts is in the padding, whichever of them has it."""
    padded = model(1)
    padded.resize_token_embeddings(310)
    with torch.no_grad():
        padded.get_output_embeddings().weight[300:] = 0.0
    rows = call(model(0), tokenizer(), examples(3), top_k=299, beside=[Beside(padded, tokenizer(), "", 0.5)])
    for row in rows:
        ids = torch.tensor(row.input_ids[None]).long()
        with torch.no_grad():
            said = [m(ids).logits[0, row.prompt_length - 1 : -1].softmax(1)[:, :300] for m in (model(0), padded)]
        mixture = (0.5 * said[0] + 0.5 * said[1]).log()
        expected = mixture.gather(1, torch.from_numpy(row.top_ids.astype(np.int64)))
        torch.testing.assert_close(torch.from_numpy(row.top_logprobs).float(), expected, rtol=2e-3, atol=2e-3)


def test_a_teacher_beside_of_other_tokens_is_refused(model: Any, tokenizer: Any, examples: Any) -> None:
    other = tokenizer(("<|im_end|>", "<|endoftext|>", "<|im_start|>"))
    with pytest.raises(ValueError, match="row .*: a teacher beside reads it in other tokens than its writer"):
        call(model(), tokenizer(), examples(1), beside=[Beside(model(1), other, "", 0.4)])


def test_a_sure_teachers_tail_keeps_its_digits() -> None:
    """Masses from e-4 to e-200, far below what 1 - sum, or exp of a float32, can hold."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 400, generator=generator)
    sure = torch.arange(50) * 7
    logits[torch.arange(50), sure] += torch.linspace(10, 210, 50)
    of_teacher = torch.arange(0, 400, 7)[:55]
    columns, top, tail = labels._top(logits.clone(), of_teacher, 4)
    exact = logits.double().log_softmax(1)
    expected, places = exact[:, of_teacher].topk(4, dim=1)
    assert (columns == places).all() and (of_teacher[columns[:, 0]] == sure).all()
    torch.testing.assert_close(top.double(), expected, rtol=1e-6, atol=1e-5)
    rest = exact.scatter(1, of_teacher[columns], -float("inf")).logsumexp(1)
    torch.testing.assert_close(tail.double(), rest, rtol=1e-6, atol=1e-5)
    assert tail.min() < -190 and tail.isfinite().all()


def test_order_and_batch_size_change_nothing(model: Any, tokenizer: Any, examples: Any) -> None:
    network, text = model(), tokenizer()
    one, many = (call(network, text, examples(9), batch_size=size) for size in (1, 9))
    assert [row.id for row in one] == [f"e{i}" for i in range(9)] == [row.id for row in many]
    for a, b in zip(one, many, strict=True):
        assert (a.input_ids == b.input_ids).all()
        np.testing.assert_allclose(a.tail_logprob, b.tail_logprob, atol=1e-4)


def test_a_smaller_student_gets_its_own_ids(model: Any, tokenizer: Any, examples: Any) -> None:
    """The student has other ids and lacks a token: its mass is in the tail."""
    teacher = tokenizer()
    student = tokenizer(("<|im_end|>", "<|im_start|>"))
    to_student = torch.tensor(
        [student.get_vocab().get(t, -1) for t in teacher.convert_ids_to_tokens(range(len(teacher)))]
    )
    assert (to_student == -1).sum() == 1
    network = model(vocabulary=len(teacher))
    with torch.no_grad():  # the dropped token is a likely one
        network.lm_head.weight[0] *= 20
    plain = call(network, teacher, examples(5))
    mapped = call(network, teacher, examples(5), to_student=to_student, student_tokenizer=student)
    dropped = 0
    for a, b in zip(plain, mapped, strict=True):
        assert (to_student[torch.tensor(a.input_ids).long()].numpy() == b.input_ids).all()
        assert (b.top_ids < len(student)).all()
        assert b.answer_start == a.answer_start
        for ids, logprobs, tail, new_ids, new_logprobs, new_tail in zip(
            a.top_ids,
            a.top_logprobs,
            a.tail_logprob,
            b.top_ids,
            b.top_logprobs,
            b.tail_logprob,
            strict=True,
        ):
            kept = ids != 0
            assert new_ids[: kept.sum()].tolist() == to_student[ids[kept].astype(int)].tolist()
            np.testing.assert_allclose(new_logprobs[: kept.sum()], logprobs[kept], atol=1e-3)
            if not kept.all():
                dropped += 1
                # The next best token took the dropped one's place.
                before = np.exp(tail) + np.exp(float(logprobs[~kept][0]))
                after = np.exp(new_tail) + np.exp(float(new_logprobs[-1]))
                np.testing.assert_allclose(after, before, atol=2e-3)
    assert dropped > 5
    assert [row.answer_start > 0 for row in mapped] == [True] * 4 + [False]


def test_a_wrong_map_names_the_row(model: Any, tokenizer: Any, examples: Any) -> None:
    text = tokenizer()
    to_student = torch.arange(len(text))
    x = text.convert_tokens_to_ids("k")
    to_student[x] = -1
    with pytest.raises(ValueError, match=r"row e0: token \d+ of the answer is \[-1\]"):
        call(model(), text, examples(2), to_student=to_student)


def test_a_token_that_the_teacher_got_later_is_none_of_the_students(model: Any, tokenizer: Any, examples: Any) -> None:
    """Beyond the map's end, like any other that the student lacks: its mass is in the tail, and a row of it refused."""
    student, teacher = tokenizer(), tokenizer()
    same = torch.arange(len(student))
    assert teacher.add_tokens(["divide"]) == 1
    network = model(vocabulary=len(teacher) + 5)
    (row,) = call(network, teacher, examples(1), to_student=same, student_tokenizer=student)
    assert row.top_ids.max() < len(student)
    with pytest.raises(ValueError, match=r"row e0: token \d+ of the answer is \[-1\]"):
        later = [example.model_copy(update={"text": "divide"}) for example in examples(1)]
        call(network, teacher, later, to_student=same, student_tokenizer=student)


def test_top_k_of_all_tokens_is_refused(model: Any, tokenizer: Any, examples: Any) -> None:
    with pytest.raises(ValueError, match="top_k"):
        call(model(), tokenizer(), examples(1), top_k=300)


def test_parquet_keeps_everything_in_equal_bytes(rows: Any, tmp_path: Path) -> None:
    written = rows(9, unlabelled_every=4)
    for name in ("a", "b"):
        labels.write(tmp_path / name, written, top_k=4, teachers={"z": "2", "a": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    metadata = pq.read_schema(tmp_path / "a").metadata
    assert metadata[b"top_k"] == b"4" and metadata[b"teacher.a"] == b"1" and metadata[b"teacher.z"] == b"2"
    for row, copy in zip(written, labels.read(tmp_path / "a"), strict=True):
        for name in ("id", "domain", "family", "weight", "prompt_length", "answer_start"):
            assert getattr(row, name) == getattr(copy, name)
        for name in ("input_ids", "top_ids", "top_logprobs", "tail_logprob"):
            a, b = getattr(row, name), getattr(copy, name)
            assert len(a) == len(b) and (len(a) == 0 or (a.dtype == b.dtype and (a == b).all()))


@st.composite
def stored_rows(draw: st.DrawFn) -> tuple[int, list[Row]]:
    """k and rows, some without labels: log-probabilities of any bits, so in any order, equal or infinite."""
    k, id_type = draw(st.integers(1, 6)), draw(st.sampled_from([np.uint16, np.int32]))
    rows = []
    for i in range(draw(st.integers(0, 5))):
        tokens = draw(st.integers(1, 4))
        given = {}
        if draw(st.booleans()):
            top = st.integers(0, np.iinfo(id_type).max)
            given = {
                "top_ids": draw(arrays(id_type, (tokens, k), elements=top)),
                "top_logprobs": draw(arrays(np.uint16, (tokens, k))).view(np.float16),
                "tail_logprob": draw(
                    arrays(np.float32, tokens, elements=st.just(-np.inf) | st.floats(-50, 0, width=32))
                ),
            }
        ids = np.arange(tokens + 1, dtype=np.int32)
        rows.append(Row(f"r{i}", "target", "divider", 1.0, ids, 1, draw(st.integers(0, tokens)), **given))
    return k, rows


@given(stored_rows())
def test_parquet_keeps_every_bit(stored: tuple[int, list[Row]]) -> None:
    k, rows = stored
    with TemporaryDirectory() as folder:
        labels.write(Path(folder) / "a", rows, top_k=k, teachers={})
        copies = labels.read(Path(folder) / "a")
    for row, copy in zip(rows, copies, strict=True):
        assert (copy.id, copy.answer_start) == (row.id, row.answer_start)
        for name in ("input_ids", "top_ids", "top_logprobs", "tail_logprob"):
            a, b = getattr(row, name), getattr(copy, name)
            assert len(a) == len(b) and a.tobytes() == b.tobytes()
            assert len(a) == 0 or (a.dtype == b.dtype and a.shape == b.shape)


def test_sorted_logprobs_take_less_than_their_own_size(rows: Any, tmp_path: Path) -> None:
    """As they come from `label`: ids of two bytes and log-probabilities of two, and the latter in less than one."""
    sizes = []
    for ordered in (True, False):
        chosen = rows(300, k=16)
        if ordered:
            for row in chosen:
                row.top_logprobs[:] = -np.sort(-row.top_logprobs, axis=1)
        labels.write(tmp_path / "a", chosen, top_k=16, teachers={})
        column = pq.ParquetFile(tmp_path / "a").metadata.row_group(0).column(8)
        assert column.path_in_schema.startswith(labels.STEPS)
        sizes.append(column.total_compressed_size / sum(row.top_logprobs.nbytes for row in chosen))
    assert sizes[0] < 0.7 < sizes[1]


def test_the_answer_begins_where_the_reasoning_ends(tokenizer: Any, examples: Any) -> None:
    """In rows of the template; in others nothing is reasoned."""
    text, chosen = tokenizer(), examples(5)
    chosen[1] = chosen[1].model_copy(update={"text": "no template"})
    for example, row in zip(chosen, encode(text, chosen), strict=True):
        before = text.decode(row.input_ids[row.prompt_length :][: row.answer_start])
        follows = "<think>" in example.text and example.domain == "target"
        assert before == (example.text[: example.text.index("<answer>")] if follows else "")
    assert chosen[4].domain == "general"


def test_a_token_across_the_border_is_reasoning(tokenizer: Any, examples: Any) -> None:
    """As in SmolLM2's vocabulary, where `><` is one token of every target row."""
    text = tokenizer()
    state = json.loads(text.backend_tokenizer.to_str())
    state["model"]["vocab"]["><"] = len(text)
    state["model"]["merges"] = [[">", "<"]]
    text._tokenizer = Tokenizer.from_str(json.dumps(state))
    (row,) = encode(text, examples(1))
    completion = row.input_ids[row.prompt_length :]
    assert text.decode(completion[row.answer_start - 1 : row.answer_start + 2]) == "><an"


def test_parquet_without_any_labels(rows: Any, tmp_path: Path) -> None:
    labels.write(tmp_path / "a", rows(3, unlabelled_every=1), top_k=4, teachers={})
    copies = labels.read(tmp_path / "a")
    assert [len(row.top_ids) for row in copies] == [0, 0, 0]
    assert collate(copies).top_ids.shape[1] in (0, 4)
