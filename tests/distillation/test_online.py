"""A teacher beside the student: what it adds to the loss, from folders, as a stage has them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from q2t.config import Adapter, Online
from q2t.distillation import loop, objective, online
from q2t.distillation.batches import Batch, collate
from q2t.distillation.objective import Objective
from q2t.distillation.online import OnlineTeacher
from q2t.distillation.rows import encode
from q2t.distillation.weighting import EVEN, Scales
from q2t.records import Example
from q2t.sources import save_model

FEATURES = {"hidden": [[0, 0], [2, 2]], "attention": [[1, 1], [2, 2]]}
BYTES = 259
"""Tokens of the student's tokenizer; some networks here have rows beyond them, as a teacher's head may."""
ORDER = ("<|im_start|>", "<|endoftext|>", "<|im_end|>")
"""Of special tokens, other than the student's: all bytes keep their ids, these don't."""
LORA = Adapter(kind="lora", modules=["q_proj", "v_proj", "down_proj"])
KINDS = pytest.mark.parametrize(
    "given", [FEATURES, {"spans": "matched"}, {"spans": "uld"}], ids=["features", "matched", "uld"]
)
TEXTS = [
    "A divider of 4.7 kohm and 10 kohm halves no voltage: 12 V becomes 8.16 V.",
    "With 470 ohm and 100 nF the time constant is 47 µs.",
    "At 1200 V the current through 470 Ω is 2.55 A, which no small resistor stands.",
    "0",
    "Two resistors of 1200 ohm in parallel have 600 ohm, and in series 2400 ohm.",
]


def network(seed: int, dtype: torch.dtype = torch.float64, vocabulary: int = 300, **shape: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4) | shape
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
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
        asked = Online(teacher=str(tmp_path / "teacher"), **settings)
        made = OnlineTeacher(asked, student, ours, rows, given, seed=0, compute=compute)
        made.model.to(student.dtype)
        made.projections.to(student.dtype)
        return made, rows

    return make


def gradients(student: Any, teacher: OnlineTeacher, split: list[list[Any]], settings: Any, accelerator: Any) -> Any:
    student.zero_grad()
    settings = settings.model_copy(update={"online": teacher.settings})
    losses = loop.accumulate(Objective(student, teacher), split, settings, accelerator)
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
    louder = network(0)
    louder.model.embed_tokens.weight.data *= 2
    teacher, rows = beside(network(0), louder, distance=distance, hidden=[[0, 0]])
    losses, _ = gradients(louder, teacher, [rows], settings, accelerator)
    assert (losses.hidden > 1e-3) == (distance == "mse"), "to the cosine, a length is nothing"


def test_each_layer_learns_from_its_own_of_the_teacher(beside: Any, settings: Any, accelerator: Any) -> None:
    """The teacher is the student behind one more block, which changes nothing."""
    student, other = network(0), network(1, num_hidden_layers=3)
    weights = student.state_dict()
    for layer in (1, 0):
        part = f"model.layers.{layer}."
        of_layer = {key: value for key, value in weights.items() if key.startswith(part)}
        weights |= {key.replace(part, f"model.layers.{layer + 1}."): value for key, value in of_layer.items()}
    weights |= {key: torch.zeros_like(weights[key]) for key in weights if ".0." in key and "norm" not in key}
    other.load_state_dict(weights)
    shifted = {"hidden": [[0, 1], [1, 2], [2, 3]], "attention": [[1, 2], [2, 3]]}
    teacher, rows = beside(other, student, **shifted)
    losses, _ = gradients(student, teacher, [rows], settings, accelerator)
    assert (losses.hidden, losses.attention) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))


@pytest.mark.parametrize(
    "given", [FEATURES, {"spans": "matched"}, {"spans": "uld"}, {"logits": True}, {"logits": True} | FEATURES]
)
@pytest.mark.parametrize("changed", [False, True])
def test_the_split_into_micro_batches_changes_nothing(
    beside: Any, given: Any, changed: bool, tokenizer: Any, settings: Any, accelerator: Any
) -> None:
    if changed:  # what params.yaml may have beside it
        weighs = {"curriculum": 1.0, "reasoning": 0.3} if given == {"logits": True} else {}
        settings = settings.model_copy(update=weighs | {"teacher_only": ["general"]})
    student = network(0, vocabulary=BYTES if "logits" in given else 300, hidden_size=16)
    teacher, rows = beside(network(1), student, tokenizer(ORDER) if "spans" in given else None, **given)
    whole = gradients(student, teacher, [rows], settings, accelerator)
    for size in (3, 1):
        split = [rows[i : i + size] for i in range(0, len(rows), size)]
        torch.testing.assert_close(gradients(student, teacher, split, settings, accelerator), whole)


@KINDS
def test_prompts_and_padding_teach_nothing(
    beside: Any, given: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding is the end token, which also ends the completions: what stands there instead changes nothing."""
    student = network(0, hidden_size=16)
    teacher, rows = beside(network(1), student, tokenizer(ORDER) if "spans" in given else None, **given)
    outputs: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        outputs.append(output.last_hidden_state)

    def learn(padding: int) -> Any:
        def padded(some: list[Any]) -> Batch:
            batch = collate(some)
            for ids, row in zip(batch.input_ids, some, strict=True):
                ids[len(row.input_ids) :] = padding
            return batch

        monkeypatch.setattr(online, "collate", padded)
        student.zero_grad()
        batch = padded(rows)
        with student.base_model.register_forward_hook(keep):
            states = teacher.states(student, batch)
        teacher.loss(student, states, teacher.ask(rows, batch.input_ids.device), rows, batch).total.backward()
        reached = outputs[-1].grad.abs().sum(2) > 0
        assert torch.equal(reached, batch.predicts)
        return [parameter.grad.clone() for parameter in student.parameters()]

    torch.testing.assert_close(learn(padding=1), learn(padding=77))


@KINDS
def test_each_term_counts_by_its_weight_and_the_rows(
    beside: Any, given: Any, tokenizer: Any, settings: Any, accelerator: Any
) -> None:
    student = network(0)
    weights = {"hidden_weight": 0.25, "attention_weight": 3.0} if "hidden" in given else {"spans_weight": 0.5}
    teacher, rows = beside(network(1), student, tokenizer(ORDER) if "spans" in given else None, **given, **weights)
    alone = [gradients(student, teacher, [[row]], settings, accelerator)[0] for row in rows]
    together, _ = gradients(student, teacher, [rows], settings, accelerator)
    tokens = [row.completion_tokens for row in rows]
    expected = sum(
        n * row.weight * (0.25 * terms.hidden + 3.0 * terms.attention + 0.5 * terms.spans)
        for n, row, terms in zip(tokens, rows, alone, strict=True)
    )
    weighted = together.weighted_hidden + together.weighted_attention + together.weighted_spans
    assert weighted == pytest.approx(expected / sum(tokens))
    plain = together.weighted_cross_entropy + together.weighted_distillation
    assert together.total == pytest.approx(plain + weighted)


@KINDS
def test_balance_scales_each_term_by_its_own_factor(
    beside: Any, given: Any, tokenizer: Any, settings: Any, accelerator: Any
) -> None:
    student = network(0)
    teacher, rows = beside(network(1), student, tokenizer(ORDER) if "spans" in given else None, **given)
    plain, _ = gradients(student, teacher, [rows], settings, accelerator)
    settings = settings.model_copy(update={"online": teacher.settings})
    scales = Scales(hidden=3.0, attention=0.25, spans=7.0)
    scaled = loop.accumulate(Objective(student, teacher), [rows], settings, accelerator, scales)
    added = 0.0
    for term, factor in (("hidden", 3.0), ("attention", 0.25), ("spans", 7.0)):
        before, after = (getattr(losses, f"weighted_{term}") for losses in (plain, scaled))
        assert after == pytest.approx(factor * before) and getattr(scaled, term) == getattr(plain, term)
        added += after - before
    assert scaled.total - plain.total == pytest.approx(added) and added


def test_factors_follow_from_the_steps_before() -> None:
    assert loop._balance([]) == EVEN
    lines = [{"cross_entropy": "2", "kl": "4", "hidden": "0.5", "attention": "0", "spans": f"{n}e-9"} for n in (1, 2)]
    assert loop._balance(lines) == Scales(0.5, 4.0, 1.0, 100.0)


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


def test_its_whole_distribution_takes_the_place_of_stored_labels(beside: Any, settings: Any, accelerator: Any) -> None:
    """These rows have no labels, so that without `logits` all weight is on cross-entropy."""
    settings = settings.model_copy(update={"temperature": 2.0, "alpha": 0.7})
    teacher, rows = beside(network(1, vocabulary=BYTES), network(0, vocabulary=BYTES), logits=True)
    same, _ = gradients(network(1, vocabulary=BYTES), teacher, [rows], settings, accelerator)
    assert same.distillation == pytest.approx(0, abs=1e-9) and same.cross_entropy > 1
    for changes in ({}, {"curriculum": 1.0}, {"reasoning": 0.3}, {"teacher_only": ["general"]}):
        changed = settings.model_copy(update=changes)
        losses, _ = gradients(network(0, vocabulary=BYTES), teacher, [rows], changed, accelerator)
        task, distilled = by_definition(rows, changed)
        assert losses.weighted_distillation == pytest.approx(distilled)
        assert losses.weighted_cross_entropy == pytest.approx(task)
        assert losses.total == pytest.approx(distilled + task)


def by_definition(rows: list[Any], settings: Any) -> tuple[float, float]:
    """Weighted cross-entropy and T² KL of these networks, in nats a token."""
    task = distilled = 0.0
    temperature, models = settings.temperature, [network(seed, vocabulary=BYTES) for seed in (0, 1)]
    for row in rows:
        ids = torch.tensor(row.input_ids[None]).long()
        with torch.no_grad():
            student, teacher = (model(ids).logits[0, row.prompt_length - 1 : -1] for model in models)
        ce = torch.nn.functional.cross_entropy(student, ids[0, row.prompt_length :], reduction="none")
        q, p = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
        kl = temperature**2 * (p.exp() * (p - q)).sum(1)
        weight = torch.full_like(ce, row.weight)
        weight[: row.answer_start] *= settings.reasoning
        weight *= (1 - float((-ce.mean()).exp())) ** settings.curriculum
        alpha = 1.0 if row.domain in settings.teacher_only else settings.alpha
        task += (1 - alpha) * float(weight @ ce)
        distilled += alpha * float(weight @ kl)
    tokens = sum(row.completion_tokens for row in rows)
    return task / tokens, distilled / tokens


def test_its_distribution_teaches_no_prompt_and_no_padding(
    beside: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = network(0, vocabulary=BYTES)
    teacher, rows = beside(network(1), student, logits=True)
    settings = settings.model_copy(update={"online": teacher.settings})
    outputs: list[torch.Tensor] = []

    def learn(padding: int) -> Any:
        def padded(some: list[Any]) -> Batch:
            batch = collate(some)
            for ids, row in zip(batch.input_ids, some, strict=True):
                ids[len(row.input_ids) :] = padding
            return batch

        def keep(_: Any, __: Any, output: Any) -> None:
            output.last_hidden_state.retain_grad()
            outputs.append(output.last_hidden_state)

        for module in (online, objective.batches):
            monkeypatch.setattr(module, "collate", padded)
        student.zero_grad()
        with student.base_model.register_forward_hook(keep):
            Objective(student, teacher)(rows, settings, Scales())[0].backward()
        assert torch.equal(outputs[-1].grad.abs().sum(2) > 0, collate(rows).predicts)
        return [parameter.grad.clone() for parameter in student.parameters()]

    torch.testing.assert_close(learn(padding=1), learn(padding=77))


def test_a_trimmed_student_is_compared_at_the_tokens_of_its_teacher(
    examples: Any, settings: Any, accelerator: Any, compute: Any, tmp_path: Path
) -> None:
    from q2t.compression.vocabulary import trim
    from q2t.smollm import train_tokenizer

    given = examples(7)
    texts = [example.text + example.question for example in given]
    theirs = train_tokenizer([*texts * 3, "voltage divider resistor " * 9], 300)
    trimmed = trim(theirs, [*texts, "<|im_start|>user\nassistant\n<|im_end|>"], 285)
    assert trimmed.kept != list(range(len(trimmed.kept)))
    teacher, student = network(0), network(0)
    student.model.embed_tokens.weight.data[: len(trimmed.kept)] = teacher.model.embed_tokens.weight[trimmed.kept]
    save_model(teacher, theirs, tmp_path / "teacher")
    rows = encode(trimmed.tokenizer, given)
    asked = Online(teacher=str(tmp_path / "teacher"), **FEATURES)
    made = OnlineTeacher(asked, student, trimmed.tokenizer, rows, given, seed=0, compute=compute)
    made.model.double()
    losses, _ = gradients(student, made, [rows], settings, accelerator)
    assert (losses.hidden, losses.attention) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))

    # Its whole distribution is the one over the student's tokens: what the teacher says in others is left out.
    asked = Online(teacher=str(tmp_path / "teacher"), logits=True)
    student.resize_token_embeddings(len(trimmed.kept))
    made = OnlineTeacher(asked, student, trimmed.tokenizer, rows, given, seed=0, compute=compute)
    made.model.double()
    assert made.ids.tolist() == trimmed.kept
    losses, _ = gradients(student, made, [rows], settings, accelerator)
    assert losses.distillation == pytest.approx(0, abs=1e-9) and losses.cross_entropy > 1
    with pytest.raises(ValueError, match="online.logits: the teacher lacks the student's token"):
        online._in_teacher_ids(network(0, vocabulary=len(theirs)), theirs, trimmed.tokenizer)


def bpe(size: int, digits: bool, end: str, user: str) -> Any:
    """Merges learnt from TEXTS, those of digits too or not; both the end token and the template are its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytewise])
    backend.pre_tokenizer = bytewise if digits else apart
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", end], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token="<pad>")
    made.chat_template = "{% for m in messages %}" + user + "{{ m.content }}" + end + "{% endfor %}>"
    return made


@pytest.mark.parametrize("spans", ["matched", "uld"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qwen3_teaches_gemma3_in_tokens_of_its_own(spans: str, dtype: str, compute: Any, tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

    ours, theirs = bpe(290, True, "<end_of_turn>", "user "), bpe(340, False, "<|im_end|>", "Q: ")
    shape = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2)
    torch.manual_seed(0)
    teacher = Qwen3ForCausalLM(Qwen3Config(vocab_size=352, hidden_size=24, intermediate_size=32, **shape))
    config = Gemma3TextConfig(vocab_size=290, hidden_size=32, intermediate_size=48, sliding_window=16, **shape)
    student = Gemma3ForCausalLM(config)
    save_model(teacher, theirs, tmp_path / "teacher")
    given = [
        Example(id=f"e{i}", problem_id="p", family="f", domain="general", teacher="t", question="470 Ω?", text=text)
        for i, text in enumerate(TEXTS)
    ]
    rows = encode(ours, given)
    compute = compute.model_copy(update={"dtype": dtype})
    asked = Online(teacher=str(tmp_path / "teacher"), spans=spans)
    beside = OnlineTeacher(asked, student, ours, rows, given, seed=0, compute=compute)
    assert next(beside.model.parameters()).dtype == getattr(torch, dtype)

    def loss(some: list[Any]) -> Any:
        batch = collate(some)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            asked = beside.ask(some, batch.input_ids.device)
            return beside.loss(student, beside.states(student, batch), asked, some, batch)

    # Either side has spans of several tokens, and a row has other numbers of tokens on the two.
    alone = sum(loss([row]).spans for row in rows)
    torch.testing.assert_close(loss(rows).spans, alone, rtol=1e-2 if dtype == "bfloat16" else 1e-4, atol=0)
    optimizer, values = torch.optim.AdamW(student.parameters(), lr=0.01), []
    for _ in range(9):  # of spans alone; a run also learns the words
        terms = loss(rows)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        values.append(terms.spans.item())
    assert 0 < values[-1] < 0.9 * values[0]


@pytest.mark.parametrize(
    "asked, adapter, falling",
    [
        (FEATURES, None, ("hidden", "attention")),
        (FEATURES | {"logits": True}, None, ("hidden", "attention", "kl")),
        (FEATURES | {"logits": True}, LORA, ("hidden", "attention", "kl")),
        ({"spans": "matched", "spans_weight": 50.0}, None, ("spans",)),  # against words that a random teacher denies
        ({"spans": "uld", "spans_weight": 50.0}, None, ("spans",)),
    ],
    ids=["features", "logits", "adapter", "matched", "uld"],
)
def test_a_run_with_a_teacher_beside_resumes_to_the_same_bytes_and_learns(
    asked: dict[str, Any],
    adapter: Any,
    falling: tuple[str, ...],
    beside: Any,
    tokenizer: Any,
    run: Any,
    settings: Any,
    compute: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: Any,
) -> None:
    def train(folder: str, save_every: int = 2) -> Any:
        student = network(0, torch.float32, BYTES, hidden_size=16)
        teacher, rows = beside(
            network(1, torch.float32), student, tokenizer(ORDER) if "spans" in asked else None, **asked
        )
        given = settings.model_copy(update={"online": teacher.settings, "epochs": 12, "schedule": "constant"})
        given = given.model_copy(update={"adapter": adapter, "balance": adapter is not None})
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
    assert lines[0] == [*loop.CURVE, *loop.MOVING, *loop.ONLINE]
    for column in falling:
        values = [float(line[lines[0].index(column)]) for line in lines[1:]]
        assert sum(values[-4:]) < (0.9 if adapter else 0.8) * sum(values[:4])


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
    with pytest.raises(ValueError, match="online.teacher: .*nowhere is no model folder"):
        OnlineTeacher(nowhere, student, tokenizer(), [], [], seed=0, compute=compute)


def test_a_text_that_the_teacher_reads_otherwise_is_refused_before_training(beside: Any, tokenizer: Any) -> None:
    from tokenizers import normalizers

    theirs = tokenizer(ORDER)
    theirs.backend_tokenizer.normalizer = normalizers.Replace("k ohm", "kohm")
    with pytest.raises(ValueError, match="row e0: from byte .* the student's tokens spell .* online.spans"):
        beside(network(1), network(0), theirs, spans="matched")


def test_a_system_prompt_that_the_teacher_beside_would_not_see_is_refused(
    tokenizer: Any, examples: Any, compute: Any, tmp_path: Path
) -> None:
    save_model(network(1), tokenizer(), tmp_path / "teacher")
    given, settings = examples(4), Online(teacher=str(tmp_path / "teacher"), hidden=[[1, 1]])
    rows = encode(tokenizer(), given)
    with pytest.raises(ValueError, match="t answered behind its `system` prompt"):
        OnlineTeacher(settings, network(0), tokenizer(), rows, given, seed=0, compute=compute, systems={"t": "Hear."})
    given[0] = given[0].model_copy(update={"teacher": "another"})
    OnlineTeacher(settings, network(0), tokenizer(), rows[:1], given, seed=0, compute=compute, systems={"t": "Hear."})
