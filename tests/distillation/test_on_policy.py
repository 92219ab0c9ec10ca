"""The student's own answers and what the teacher says of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q2t.config import Adapter, OnPolicy
from q2t.distillation import adapters, labels, on_policy
from q2t.sources import save_model

VOCABULARY = 259
SPECIALS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")


@pytest.fixture
def student(model: Any) -> Any:
    """Says any byte, and stops after some twenty: its next token depends on nothing."""

    def make() -> Any:
        network = model(0, VOCABULARY)
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.data.zero_()
            layer.mlp.down_proj.weight.data.zero_()
        embeddings = network.model.embed_tokens.weight.data
        embeddings.mul_(0.05).add_(0.2)
        embeddings[1] += 0.08
        return network

    return make


@pytest.fixture
def settings_of(model: Any, tokenizer: Any, tmp_path: Path) -> Any:
    """Of a teacher in a folder, whose tokens are the student's in another order."""
    save_model(model(5, VOCABULARY), tokenizer(SPECIALS[::-1]), tmp_path / "teacher")

    def make(**changes: Any) -> OnPolicy:
        given: dict[str, Any] = dict(teacher=str(tmp_path / "teacher"), max_new_tokens=200, batch_size=4, top_k=8)
        return OnPolicy(**given | changes)

    return make


@pytest.fixture
def to_student() -> list[int]:
    return [2, 1, 0, *range(3, VOCABULARY)]


@pytest.fixture
def sampler(tokenizer: Any, examples: Any, to_student: Any, compute: Any) -> on_policy.Sampler:
    return on_policy.Sampler(tokenizer(), to_student, examples(6), seed=3, compute=compute)


def test_own_answers_have_the_teachers_labels(
    sampler: Any, settings_of: Any, student: Any, model: Any, tokenizer: Any, examples: Any, to_student: Any
) -> None:
    given, settings = examples(6), settings_of()
    found = sampler(student(), labels.encode(tokenizer(), given), settings, 1)
    assert len(found) >= 3
    questions = {row.prompt_length: e for row, e in zip(labels.encode(tokenizer(), given), given, strict=True)}
    for row in found:
        example = questions[row.prompt_length]
        text = tokenizer().decode(row.input_ids[row.prompt_length : -1])
        assert row.input_ids[-1] == 1 and text != example.text
        (expected,) = labels.label(
            model(5, VOCABULARY),
            tokenizer(SPECIALS[::-1]),
            [example.model_copy(update={"text": text})],
            top_k=8,
            batch_size=1,
            to_student=sampler.to_student,
            student_tokenizer=tokenizer(),
        )
        assert (row.domain, row.family, row.weight) == (example.domain, example.family, example.weight)
        assert np.array_equal(row.top_ids, expected.top_ids)
        np.testing.assert_allclose(row.top_logprobs, expected.top_logprobs, rtol=2e-3, atol=2e-3)


def test_seed_and_phase_decide_and_the_model_is_left_alone(
    sampler: Any, settings_of: Any, student: Any, tokenizer: Any, examples: Any
) -> None:
    network, rows = student().train(), labels.encode(tokenizer(), examples(6))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first, again, other = (sampler(network, rows, settings_of(), phase) for phase in (1, 1, 2))
    assert [row.id for row in first] == [row.id for row in again]
    assert all(np.array_equal(a.top_logprobs, b.top_logprobs) for a, b in zip(first, again, strict=True))
    assert not {row.id for row in first} & {row.id for row in other}
    assert network.training and all((before[name] == value).all() for name, value in network.state_dict().items())


def test_a_question_is_asked_once(sampler: Any, settings_of: Any, student: Any, tokenizer: Any, examples: Any) -> None:
    rows = labels.encode(tokenizer(), examples(3))
    network = student()
    once = sampler(network, rows, settings_of(), 1)
    assert [row.id for row in sampler(network, rows * 2, settings_of(), 1)] == [row.id for row in once]


def test_adapters_that_are_trained_on_answer_too(
    sampler: Any, settings_of: Any, student: Any, tokenizer: Any, examples: Any
) -> None:
    rows, network = labels.encode(tokenizer(), examples(3)), student()
    plain = [row.id for row in sampler(network, rows, settings_of(), 1)]
    adapters.adapt(network, Adapter(kind="lora", rank=2, modules=["q_proj"]), seed=0)
    assert [row.id for row in sampler(network, rows, settings_of(), 1)] == plain
    assert any("lora_A" in name for name, _ in network.named_parameters())


def test_too_few_answers_of_use_are_refused_with_the_reasons(
    sampler: Any, settings_of: Any, student: Any, tokenizer: Any, examples: Any
) -> None:
    rows = labels.encode(tokenizer(), examples(6))
    with pytest.raises(ValueError, match=r"of the student's 6 answers in phase 4, \d are cut at max_new_tokens \(2\)"):
        sampler(student(), rows, settings_of(max_new_tokens=2), 4)


def test_answers_that_the_teacher_has_other_tokens_for_are_left_out(
    settings_of: Any, student: Any, tokenizer: Any, examples: Any, to_student: Any, compute: Any
) -> None:
    """A student's token is one of the teacher's, but a text that it wrote can be another sequence of these."""
    rows, network = labels.encode(tokenizer(), examples(6)), student()
    sampler = on_policy.Sampler(tokenizer(), to_student, examples(6), seed=3, compute=compute)
    found = sampler(network, rows, settings_of(), 1)
    sampler._same_tokens = lambda example, teacher: example.id != found[0].id  # type: ignore[method-assign]
    assert [row.id for row in sampler(network, rows, settings_of(), 1)] == [row.id for row in found[1:]]


def test_a_teacher_of_another_vocabulary_is_refused(
    settings_of: Any, student: Any, tokenizer: Any, examples: Any, compute: Any
) -> None:
    sampler = on_policy.Sampler(tokenizer(), list(range(VOCABULARY)), examples(6), seed=3, compute=compute)
    with pytest.raises(ValueError, match="on_policy.teacher: the student's vocabulary was cut from another one"):
        sampler(student(), labels.encode(tokenizer(), examples(6)), settings_of(), 1)
