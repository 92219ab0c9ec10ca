"""DeepSeek-R1-0528-Qwen3-8B teaches gemma-3-4b-it, profile r1-gemma: every step on toys of these architectures."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from q2t.capability.general import PROMPTS
from q2t.compression.depth import block_influence, keep_layers
from q2t.compression.vocabulary import Trimmed, slice_embeddings, trim
from q2t.compression.width import cut, neuron_importance
from q2t.config import Compute, Online, Source
from q2t.config import load as load_params
from q2t.deployment import int8, onnx
from q2t.deployment.runtime import Request
from q2t.deployment.runtime import load as load_runtime
from q2t.distillation.batches import calibration
from q2t.distillation.course import learn
from q2t.distillation.labels import label
from q2t.distillation.loop import train
from q2t.distillation.online import OnlineTeacher
from q2t.distillation.rows import encode, prompts
from q2t.profile import apply
from q2t.records import Example
from q2t.sources import fetch, load_model, load_tokenizer, save_model

COMPUTE = Compute(threads=1, dtype="float32", device="cpu")
SETTINGS = load_params().distill.model_copy(update={"epochs": 16, "learning_rate": 5e-3})
QUESTIONS = [f"Which resistor for {volts} V and {current} mA?" for volts in (5, 9, 12) for current in (10, 15, 20, 25)]
ANSWERS = [f"<think>{i} / 10 = {i / 10}</think><answer>{i}70 Ω\n</answer>" for i in range(len(QUESTIONS))]
TEXTS = QUESTIONS + ANSWERS
SHAPE = dict(num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2)
GEMMA = """{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


def gemma_tokenizer() -> Any:
    """Of gemma's kind: BPE over ▁ for spaces, bytes for what has no token, and <bos> before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special + every_byte, show_progress=False)
    learner.train_from_iterator([text for text in [*QUESTIONS, *PROMPTS] if text.isascii()], trainer)
    state = json.loads(learner.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # there is none left: nothing is split
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=GEMMA, **names)


def r1_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<pad>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, *PROMPTS], trainer)
    names = {"bos_token": special[0], "eos_token": special[1], "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=R1, **names)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two models as the Hub has them, and as `fetch` brings them."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        Qwen3Config,
        Qwen3ForCausalLM,
        SiglipVisionConfig,
    )

    folder = tmp_path_factory.mktemp("models")
    ours, theirs = gemma_tokenizer(), r1_tokenizer()
    torch.manual_seed(0)
    vision = SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = Gemma3TextConfig(vocab_size=len(ours) + 8, hidden_size=32, intermediate_size=48, sliding_window=16, **SHAPE)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    gemma = Gemma3ForConditionalGeneration(config)
    gemma.generation_config.eos_token_id = [1, 5]
    save_model(gemma, ours, folder / "gemma-of-the-hub")
    shape = SHAPE | {"num_hidden_layers": 3}
    config = Qwen3Config(vocab_size=352, hidden_size=24, intermediate_size=32, tie_word_embeddings=False, **shape)
    knowing = train(Qwen3ForCausalLM(config), encode(theirs, examples("nobody")), SETTINGS, seed=0, **places(folder))
    save_model(knowing, theirs, folder / "r1-of-the-hub")
    for name in ("gemma", "r1"):
        fetch(name, Source(path=str(folder / f"{name}-of-the-hub")), folder / name)
    return {path.name: path for path in folder.iterdir()}


def places(folder: Path) -> dict[str, Any]:
    return {"compute": COMPUTE, "checkpoints": folder / "checkpoints", "curve": folder / "curve.csv"}


def examples(teacher: str) -> list[Example]:
    return [
        Example(id=f"e{i}", problem_id=f"p{i}", family="led", domain="target", teacher=teacher, question=q, text=text)
        for i, (q, text) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]


def smaller(folder: Path, rows: list[Example]) -> tuple[Any, Trimmed]:
    """The student as `initialize` makes it."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    model, kept = keep_layers(model, 5, block_influence(model, calibration(encode(tokenizer, rows))))
    assert kept[0] == 0 and kept[-1] == 5
    trimmed = trim(tokenizer, prompts(tokenizer, rows) + [row.text for row in rows], 420)
    return slice_embeddings(model, trimmed.kept), trimmed


def test_the_vision_tower_is_dropped_and_a_text_ends_with_its_turn(folders: dict[str, Path]) -> None:
    whole, text = load_model(folders["gemma-of-the-hub"]), load_model(folders["gemma"])
    assert type(text).__name__ == "Gemma3ForCausalLM"
    ids = torch.tensor([[2, *range(260, 300)]])
    with torch.no_grad():
        torch.testing.assert_close(text(ids).logits, whole(ids).logits)
    tokenizer = load_tokenizer(folders["gemma"])
    assert tokenizer.eos_token == "<end_of_turn>"
    assert text.config.eos_token_id == 5 and text.generation_config.eos_token_id == [5, 1]
    assert load_tokenizer(folders["r1"]).eos_token == "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("name", ["gemma", "r1"])
def test_the_runtime_answers_as_transformers_does(name: str, folders: dict[str, Path]) -> None:
    """With a <bos> that stands once, and for gemma across the edge of its window."""
    runtime = load_runtime(folders[name], COMPUTE)
    asked = [runtime.prompt(question, system="Think first.") for question in QUESTIONS[:3]]
    answers = dict(
        pair
        for batch in runtime.generate([Request(p) for p in asked], max_new_tokens=24, batch_size=3)
        for pair in batch
    )
    model, tokenizer = load_model(folders[name]), load_tokenizer(folders[name])
    for place, prompt in enumerate(asked):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        assert (ids == tokenizer.bos_token_id).sum() == 1 and answers[place].prompt_tokens == ids.shape[1] > 16
        written = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert answers[place].text == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_gemmas_vocabulary_is_cut_and_its_text_is_not_resegmented(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["gemma"])
    with pytest.raises(ValueError, match="vocabulary: 300 tokens are too few"):
        trim(tokenizer, TEXTS, 300)
    trimmed = trim(tokenizer, TEXTS, 400)
    assert len(trimmed.tokenizer) == 400 < len(tokenizer)
    for text in [*TEXTS, "a Ω and a 電 of other texts"]:
        ids = trimmed.tokenizer(text, add_special_tokens=False).input_ids
        assert trimmed.tokenizer.decode(ids) == text
    assert trimmed.tokenizer("5 V").input_ids[0] == trimmed.to_student[2]  # <bos>, renumbered


def test_a_teacher_reads_what_it_wrote_behind_its_system_prompt(folders: dict[str, Path]) -> None:
    """And the student without."""
    rows, systems = examples("r1"), {"r1": "Think first.", "gemma": "Never."}
    tokenizer = load_tokenizer(folders["r1"])
    plain, told = encode(tokenizer, rows), encode(tokenizer, rows, systems)
    for without, behind in zip(plain, told, strict=True):
        text = tokenizer.decode(behind.input_ids[: behind.prompt_length])
        assert "Think first." in text and "Never." not in text
        assert without.input_ids[without.prompt_length :].tolist() == behind.input_ids[behind.prompt_length :].tolist()

    shared: dict[str, Any] = {"top_k": 8, "batch_size": 4, "to_student": None, "student_tokenizer": tokenizer}
    model = load_model(folders["r1"])
    labelled = [label(model, tokenizer, rows, **shared, systems=given)[0] for given in ({}, systems)]
    assert labelled[0].input_ids.tolist() == labelled[1].input_ids.tolist()
    with torch.no_grad():
        ids = torch.tensor(told[0].input_ids[None]).long()
        said = model(ids).logits[0, told[0].prompt_length - 1 : -1].log_softmax(-1).topk(8).values
    torch.testing.assert_close(torch.tensor(labelled[1].top_logprobs).float(), said, rtol=1e-3, atol=1e-3)
    assert (labelled[0].top_logprobs != labelled[1].top_logprobs).any()

    student = load_tokenizer(folders["gemma"])
    online = Online(teacher=str(folders["r1"]), spans="uld")
    given = encode(student, rows), rows
    teacher = OnlineTeacher(
        online, load_model(folders["gemma"]), student, *given, seed=0, compute=COMPUTE, systems=systems
    )
    assert [teacher.rows[row.id].input_ids.tolist() for row in told] == [row.input_ids.tolist() for row in told]


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_evaluate_tells_the_teacher_alone_the_format(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage up to where it asks."""
    from stages import evaluate

    class Asked(Exception):
        pass

    def answer(*_: Any, system: str) -> None:
        raise Asked(system)

    shutil.copy("params.yaml", tmp_path)
    apply("r1-gemma", tmp_path / "params.yaml")
    params = load_params(tmp_path / "params.yaml")
    monkeypatch.setattr(evaluate, "load", lambda: params)
    monkeypatch.setattr(evaluate, "seed_everything", lambda *_: None)
    monkeypatch.setattr(evaluate, "stage_run", nullcontext)
    monkeypatch.setattr(evaluate, "read_jsonl", lambda *_: [])
    monkeypatch.setattr(evaluate.runtime, "load", lambda *_: None)
    monkeypatch.setattr(evaluate.harness, "answer", answer)
    monkeypatch.setattr("sys.argv", ["evaluate", model])
    with pytest.raises(Asked) as caught:
        evaluate.main()
    assert caught.value.args == (params.teachers["expert"].system if model == "teacher" else "",)


def test_from_r1_to_an_int8_gemma(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = examples("r1")
    model, trimmed = smaller(folders["gemma"], rows)
    save_model(model, trimmed.tokenizer, tmp_path / "untrained")
    student = load_tokenizer(tmp_path / "untrained")

    # Rows that gemma wrote itself have labels; those of R1 are learnt by its words, and by spans of equal text.
    own = label(
        load_model(folders["gemma"]),
        load_tokenizer(folders["gemma"]),
        examples("gemma"),
        top_k=8,
        batch_size=4,
        to_student=torch.tensor(trimmed.to_student),
        student_tokenizer=student,
    )
    assert all(row.top_ids.shape == (row.completion_tokens, 8) for row in own)
    online = Online(teacher=str(folders["r1"]), spans="matched")
    given = SETTINGS.model_copy(update={"online": online})

    def distil(start: Any, folder: Path) -> list[dict[str, float]]:
        learnt = learn(start, student, encode(student, rows), rows, trimmed.to_student, given, **places(folder))
        save_model(learnt, student, folder / "model")
        header, *lines = (folder / "curve.csv").read_text().splitlines()
        return [dict(zip(header.split(","), map(float, line.split(",")), strict=True)) for line in lines]

    curve = distil(load_model(tmp_path / "untrained"), tmp_path / "student")
    for term in ("cross_entropy", "spans", "numerals"):
        assert 0 < curve[-1][term] < 0.8 * curve[0][term]
    importance = neuron_importance(model := load_model(tmp_path / "student/model"), calibration(encode(student, rows)))
    healed = distil(cut(model, 32, importance), tmp_path / "pruned")
    assert healed[-1]["loss"] < healed[0]["loss"]

    pruned = tmp_path / "pruned/model"
    onnx.export(pruned, tmp_path / "onnx")
    asked = prompts(student, rows)[:2]
    assert onnx.deviation(pruned, tmp_path / "onnx", asked) < 1e-3
    int8.quantize(tmp_path / "onnx", tmp_path / "int8", int8.RECIPES[0])
    exact, rounded = (load_runtime(tmp_path / name, COMPUTE) for name in ("onnx", "int8"))
    ids = torch.tensor(student([asked[0]], add_special_tokens=False).input_ids)
    assert 0 < (exact.engine.logits(ids) - rounded.engine.logits(ids)).abs().max() < 0.5
