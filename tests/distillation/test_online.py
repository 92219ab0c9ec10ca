"""A teacher beside the student: what it adds to the loss, from folders, as a stage has them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from q2t.config import Online
from q2t.distillation import loop
from q2t.distillation.labels import encode
from q2t.distillation.online import OnlineTeacher
from q2t.sources import save_model

FEATURES = {"hidden": [[0, 0], [2, 2]], "attention": [[1, 1], [2, 2]]}
ORDER = ("<|im_start|>", "<|endoftext|>", "<|im_end|>")
"""Of special tokens, other than the student's: all bytes keep their ids, these don't."""


def network(seed: int, dtype: torch.dtype = torch.float64, **shape: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4) | shape
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=1,
        eos_token_id=1,
        attn_implementation="eager",
        **sizes,
    )
    return LlamaForCausalLM(config).to(dtype)


@pytest.fixture
def beside(tokenizer: Any, examples: Any, compute: Any, tmp_path: Path) -> Any:
    """Makes an OnlineTeacher of a model, and the rows that it knows."""

    def make(teacher: Any, student: Any, theirs: Any = None, **settings: Any) -> tuple[OnlineTeacher, list[Any]]:
        save_model(teacher, theirs or tokenizer(), tmp_path / "teacher")
        given, ours = examples(7), tokenizer()
        rows = encode(ours, given)
        online = Online(teacher=str(tmp_path / "teacher"), **settings)
        made = OnlineTeacher(online, student, ours, rows, given, seed=0, compute=compute)
        made.model.to(student.dtype)
        made.projections.to(student.dtype)
        return made, rows

    return make


def gradients(student: Any, teacher: OnlineTeacher, split: list[list[Any]], settings: Any, accelerator: Any) -> Any:
    student.zero_grad()
    losses = loop.accumulate(student, split, settings, accelerator, teacher)
    return losses, [parameter.grad.clone() for parameter in student.parameters()]


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    beside: Any, distance: str, settings: Any, accelerator: Any
) -> None:
    teacher, rows = beside(network(0), network(0), distance=distance, **FEATURES)
    losses, _ = gradients(network(0), teacher, [rows], settings, accelerator)
    assert (losses.hidden, losses.attention) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    losses, _ = gradients(network(1), teacher, [rows], settings, accelerator)
    assert losses.hidden > 0.1 and losses.attention > 0.01 and losses.spans == 0


@pytest.mark.parametrize(
    "given", [FEATURES, {"spans": "matched"}, {"spans": "uld"}], ids=["features", "matched", "uld"]
)
def test_the_split_into_micro_batches_changes_nothing(
    beside: Any, given: Any, tokenizer: Any, settings: Any, accelerator: Any
) -> None:
    student = network(0, hidden_size=16)
    teacher, rows = beside(network(1), student, tokenizer(ORDER) if "spans" in given else None, **given)
    whole = gradients(student, teacher, [rows], settings, accelerator)
    for size in (3, 1):
        split = [rows[i : i + size] for i in range(0, len(rows), size)]
        torch.testing.assert_close(gradients(student, teacher, split, settings, accelerator), whole)


def test_each_term_counts_by_its_weight_and_the_rows(beside: Any, settings: Any, accelerator: Any) -> None:
    student = network(0)
    weights = {"hidden_weight": 0.25, "attention_weight": 3.0}
    teacher, rows = beside(network(1), student, **FEATURES, **weights)
    alone = [gradients(student, teacher, [[row]], settings, accelerator)[0] for row in rows]
    together, _ = gradients(student, teacher, [rows], settings, accelerator)
    tokens = [row.completion_tokens for row in rows]
    expected = sum(
        n * row.weight * (0.25 * terms.hidden + 3.0 * terms.attention)
        for n, row, terms in zip(tokens, rows, alone, strict=True)
    )
    assert together.weighted_online == pytest.approx(expected / sum(tokens))
    plain = together.weighted_cross_entropy + together.weighted_distillation
    assert together.total == pytest.approx(plain + together.weighted_online)


def test_spans_of_the_same_bytes_compare_what_is_said(
    beside: Any, tokenizer: Any, settings: Any, accelerator: Any
) -> None:
    """The teacher is the student with its tokens in another order: what it says of each text is the same."""
    student, other = network(0), network(0)
    ours, theirs = tokenizer().get_vocab(), tokenizer(ORDER).get_vocab()
    order = list(range(300))
    for token, index in theirs.items():
        order[index] = ours[token]
    weight = student.model.embed_tokens.weight.detach()[order]
    other.model.embed_tokens.weight.data.copy_(weight)
    teacher, rows = beside(other, student, tokenizer(ORDER), spans="matched")
    losses, _ = gradients(student, teacher, [rows], settings, accelerator)
    assert losses.spans == pytest.approx(0, abs=1e-9)
    losses, _ = gradients(network(2), teacher, [rows], settings, accelerator)
    assert losses.spans > 0.1


def test_a_run_with_projections_resumes_to_the_same_bytes_and_learns(
    beside: Any, run: Any, settings: Any, compute: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: Any
) -> None:
    def train(folder: str, save_every: int = 2) -> Any:
        student = network(0, torch.float32, hidden_size=16)
        teacher, rows = beside(network(1, torch.float32), student, **FEATURES)
        given = settings.model_copy(update={"online": teacher.settings, "epochs": 12, "schedule": "constant"})
        more = {"teacher": teacher, "save_every": save_every}
        return run(lambda: student, lambda *_, **__: rows, given, compute, tmp_path / folder, **more)

    whole = train("whole", 1000)
    accumulate = loop.accumulate
    kill_at(5)
    with pytest.raises(KeyboardInterrupt):
        train("killed")
    monkeypatch.setattr(loop, "accumulate", accumulate)
    assert train("killed") == whole
    lines = [line.split(",") for line in whole[1].decode().splitlines()]
    assert lines[0] == [*loop.CURVE, *loop.ONLINE]
    for column in ("hidden", "attention"):
        values = [float(line[lines[0].index(column)]) for line in lines[1:]]
        assert sum(values[-4:]) < 0.8 * sum(values[:4])


def test_what_does_not_fit_is_refused_at_the_beginning(
    beside: Any, tokenizer: Any, compute: Any, tmp_path: Path
) -> None:
    student = network(0)
    with pytest.raises(ValueError, match="online.hidden: .* names teacher layer 3: choose from 0 to 2"):
        beside(network(1), student, hidden=[[1, 3]])
    with pytest.raises(ValueError, match="online.attention: .* names student layer 0: choose from 1 to 2"):
        beside(network(1), student, attention=[[0, 1]])
    with pytest.raises(ValueError, match=r"online.spans is for a teacher with other tokens"):
        beside(network(1), student, spans="uld")
    nowhere = Online(teacher=str(tmp_path / "nowhere"), hidden=[[1, 1]])
    with pytest.raises(ValueError, match="nowhere is no model folder"):
        OnlineTeacher(nowhere, student, tokenizer(), [], [], seed=0, compute=compute)
