"""The student's own answers and what the teacher says of them."""

import copy
import logging
import math
import re
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from q2t.config import Adapter, OnPolicy
from q2t.deployment.runtime import Runtime
from q2t.distillation import adapters, on_policy
from q2t.distillation.labels import label
from q2t.distillation.rows import Row, encode
from q2t.records import content_id
from q2t.sources import save_model

VOCABULARY = 259
SPECIALS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
QUESTIONS = 12


@pytest.fixture
def student(model: Any, tokenizer: Any) -> Any:
    """Draws every token from one distribution, whatever stands before it: letters, each likelier than the next, and
    the end."""

    def make(letters: str = "abcdef", stop: float = 0.1) -> Any:
        network = model(0, VOCABULARY)
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.data.zero_()
            layer.mlp.down_proj.weight.data.zero_()
        network.model.embed_tokens.weight.data.fill_(1.0)  # and so are the states
        logits = torch.full((VOCABULARY,), math.log(1e-9))
        likelier = torch.tensor([0.9**n for n in range(len(letters))])
        ids = tokenizer().convert_tokens_to_ids(list(letters))
        logits[ids] = ((1 - stop) * likelier / likelier.sum()).log()
        logits[1] = math.log(stop)
        network.config.tie_word_embeddings = False
        network.lm_head.weight = torch.nn.Parameter((logits / 32)[:, None].repeat(1, 32))
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
def sampler_of(tokenizer: Any, examples: Any, compute: Any, tmp_path: Path) -> Any:
    journals = (tmp_path / f"answers-{n}.jsonl" for n in count())

    class Asking(on_policy.Sampler):
        """With a journal of its own each time, unless one is given."""

        def __call__(self, *given: Any, journal: Path | None = None) -> list[Row]:
            return super().__call__(*given, journal=journal or next(journals))

    swapped = (2, 1, 0, *range(3, VOCABULARY))

    def make(to_student: Any = swapped, seed: int = 3, given: Any = None, **more: Any) -> Asking:
        return Asking(tokenizer(), to_student, given or examples(QUESTIONS), seed=seed, compute=compute, **more)

    return make


@pytest.fixture
def asked(tokenizer: Any, examples: Any) -> list[Row]:
    return encode(tokenizer(), examples(QUESTIONS))


def ids(rows: list[Row]) -> list[str]:
    return [row.id for row in rows]


def texts(rows: list[Row], tokenizer: Any) -> list[str]:
    return [tokenizer().decode(row.input_ids[row.prompt_length : -1]) for row in rows]


def test_own_answers_have_the_labels_that_label_gives(
    sampler_of: Any, settings_of: Any, student: Any, asked: Any, model: Any, tokenizer: Any, examples: Any
) -> None:
    sampler = sampler_of()
    found = sampler(student(), asked, settings_of(), 4)
    said, problems = texts(found, tokenizer), {e.problem_id: e for e in examples(QUESTIONS)}
    assert len(found) >= 8 and all(re.fullmatch("[a-f]+", text) for text in said)
    known = {content_id(problem, 4, text): problem for problem in problems for text in said}
    own = [
        problems[known[row.id]].model_copy(update={"id": row.id, "text": text})
        for row, text in zip(found, said, strict=True)
    ]
    places = [list(problems).index(example.problem_id) for example in own]
    assert places == sorted(set(places))
    expected = label(
        model(5, VOCABULARY),
        tokenizer(SPECIALS[::-1]),
        own,
        top_k=8,
        batch_size=4,
        to_student=sampler.to_student,
        student_tokenizer=tokenizer(),
    )
    for row, other in zip(found, expected, strict=True):
        assert (row.domain, row.family, row.weight) == (other.domain, other.family, other.weight)
        for name in ("input_ids", "top_ids", "top_logprobs", "tail_logprob"):
            assert np.array_equal(getattr(row, name), getattr(other, name)) and len(getattr(row, name))


def test_seed_phase_and_problem_decide_and_nothing_else(
    sampler_of: Any, settings_of: Any, student: Any, asked: Any
) -> None:
    network, settings = student(), settings_of()
    first = sampler_of()(network, asked, settings, 1)
    again = sampler_of()(network, asked, settings, 1)
    assert ids(first) == ids(again)
    for a, b in zip(first, again, strict=True):
        for name in ("input_ids", "top_ids", "top_logprobs", "tail_logprob"):
            assert np.array_equal(getattr(a, name), getattr(b, name))
    fewer = sampler_of()(network, asked[4:], settings_of(batch_size=3), 1)
    assert fewer and ids(fewer) == ids(first)[-len(fewer) :]
    other_phase, other_seed = sampler_of()(network, asked, settings, 2), sampler_of(seed=4)(network, asked, settings, 1)
    assert not {tuple(row.input_ids) for row in first} & {tuple(row.input_ids) for row in [*other_phase, *other_seed]}


def test_what_was_answered_before_a_kill_is_not_asked_again(
    sampler_of: Any, settings_of: Any, student: Any, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, settings, journal = student(), settings_of(), tmp_path / "answers.jsonl"
    whole = sampler_of()(network, asked, settings, 1)
    decode, decoded = Runtime._decode, []

    def dying(self: Any, requests: Any, *rest: Any) -> Any:
        if len(decoded) == 2:
            raise KeyboardInterrupt
        decoded.append(len(requests))
        return decode(self, requests, *rest)

    monkeypatch.setattr(Runtime, "_decode", dying)
    with pytest.raises(KeyboardInterrupt):
        sampler_of()(network, asked, settings, 1, journal=journal)
    assert len(journal.read_text().splitlines()) == sum(decoded) == 8
    decoded.clear()
    assert ids(sampler_of()(network, asked, settings, 1, journal=journal)) == ids(whole)
    assert sum(decoded) == QUESTIONS - 8


def test_the_model_and_the_random_state_are_left_alone(
    sampler_of: Any, settings_of: Any, student: Any, asked: Any
) -> None:
    network = student().train()
    network.set_attn_implementation("eager")
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    assert sampler_of()(network, asked, settings_of(), 1)
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training and network.config._attn_implementation == "eager"
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_a_problem_is_asked_once_and_its_first_row_counts(
    sampler_of: Any, settings_of: Any, student: Any, asked: Any, tokenizer: Any, examples: Any
) -> None:
    given = examples(QUESTIONS)
    others = [e.model_copy(update={"id": f"other {e.id}", "weight": 9.0, "text": "other"}) for e in given]
    sampler = sampler_of(given=[*others, *given])
    twice = sampler(student(), [*asked, *encode(tokenizer(), others)], settings_of(), 1)
    once = sampler_of()(student(), asked, settings_of(), 1)
    assert ids(twice) == ids(once) and [row.weight for row in twice] == [row.weight for row in once]


def test_adapters_answer_too_and_are_trained_on(sampler_of: Any, settings_of: Any, student: Any, asked: Any) -> None:
    network = student()
    plain = ids(sampler_of()(network, asked, settings_of(), 1))
    adapters.adapt(network, Adapter(kind="lora", rank=2, modules=["down_proj"]), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    adapted = ids(sampler_of()(network, asked, settings_of(), 1))
    assert any("lora_A" in name and p.requires_grad for name, p in network.named_parameters())
    adapters.merge(network)
    assert ids(sampler_of()(network, asked, settings_of(), 1)) == adapted != plain


def test_cut_answers_are_left_out(
    sampler_of: Any, settings_of: Any, student: Any, asked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole = sampler_of()(student(), asked, settings_of(), 1)
    lengths = sorted(row.completion_tokens for row in whole)
    limit = lengths[len(lengths) * 3 // 4]
    caplog.clear()
    found = sampler_of()(student(), asked, settings_of(max_new_tokens=limit), 1)
    assert ids(found) == [row.id for row in whole if row.completion_tokens <= limit]
    cut = len(whole) - len(found)
    assert cut and f"cut at max_new_tokens ({limit}): {cut}" in caplog.text


def test_empty_answers_and_bytes_that_are_no_text_are_left_out(
    sampler_of: Any, settings_of: Any, student: Any, asked: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of a student that writes the first byte of a character only (Ã is 0xC3), or stops at once."""
    found = sampler_of()(student("abcdefghijklmnÃ", stop=0.2), asked, settings_of(), 3)
    assert found and not any("\ufffd" in text or not text for text in texts(found, tokenizer))
    empty, broken = (int(re.findall(rf"{name}: (\d+)", caplog.text)[0]) for name in ("empty", "no UTF-8"))
    assert empty and broken and len(found) == QUESTIONS - empty - broken


def test_words_that_the_teacher_has_other_tokens_for_are_left_out(
    sampler_of: Any,
    settings_of: Any,
    student: Any,
    asked: Any,
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The student's vocabulary was cut from the teacher's, which has "ab" in one token."""
    from tokenizers import models

    theirs = tokenizer(SPECIALS[::-1])
    theirs.backend_tokenizer.model = models.BPE(vocab=theirs.get_vocab() | {"ab": VOCABULARY}, merges=[("a", "b")])
    save_model(model(5, VOCABULARY + 1), theirs, tmp_path / "merging")
    whole = sampler_of()(student(), asked, settings_of(), 1)
    caplog.clear()
    sampler = sampler_of((2, 1, 0, *range(3, VOCABULARY), -1))
    found = sampler(student(), asked, settings_of(teacher=str(tmp_path / "merging")), 1)
    kept = [row.id for row, text in zip(whole, texts(whole, tokenizer), strict=True) if "ab" not in text]
    assert ids(found) == kept and len(kept) < len(whole)
    assert f"other tokens for the teacher: {len(whole) - len(kept)}" in caplog.text


def test_nothing_is_said_where_all_are_of_use(
    sampler_of: Any, settings_of: Any, student: Any, asked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(sampler_of()(student(), asked[:3], settings_of(), 2)) == 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("stop", "limit", "reason"), [(0.02, 2, r"max_new_tokens \(2\): \d+"), (1 - 1e-7, 9, "empty: 12")]
)
def test_too_few_answers_of_use_are_refused_with_the_reasons(
    sampler_of: Any, settings_of: Any, student: Any, asked: Any, stop: float, limit: int, reason: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"on_policy: \d of the student's 12 answers in phase 4.*{reason}.*longer phase"
    ):
        sampler_of()(student(stop=stop), asked, settings_of(max_new_tokens=limit), 4)


def test_a_teacher_of_other_tokens_is_refused(sampler_of: Any, settings_of: Any, student: Any, asked: Any) -> None:
    with pytest.raises(ValueError, match=r"on_policy\.teacher: the student's token .* is another token"):
        sampler_of(range(VOCABULARY))(student(), asked, settings_of(), 1)


def test_what_a_phase_needs_is_known_before_it_begins(sampler_of: Any, settings_of: Any) -> None:
    with pytest.raises(ValueError, match="on_policy.teacher: nowhere is no model folder"):
        sampler_of().teacher_map(settings_of(teacher="nowhere"))
    with pytest.raises(ValueError, match=f"on_policy.top_k is 900, but the student knows {VOCABULARY} tokens"):
        sampler_of().teacher_map(settings_of(top_k=900))


def test_the_teacher_scores_behind_its_own_prompt_where_problems_are_asked(
    sampler_of: Any, settings_of: Any, student: Any, asked: Any
) -> None:
    settings = settings_of()
    plain = sampler_of()(student(), asked, settings, 4)
    told = sampler_of(told={settings.teacher: "Answer in letters."})(student(), asked, settings, 4)
    assert [row.input_ids.tolist() for row in told] == [row.input_ids.tolist() for row in plain]  # the student is not
    same = [np.array_equal(a.top_logprobs, b.top_logprobs) for a, b in zip(plain, told, strict=True)]
    assert same == [row.domain == "general" for row in plain] and {*same} == {True, False}
