"""The exported model against the torch model that it was made of."""

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

from q2t.config import Compute, Scratch, Source
from q2t.deployment.onnx import deviation, export, publishing
from q2t.deployment.runtime import ONNX_FILE, OnnxEngine, Request, TorchEngine, load
from q2t.sources import fetch, fingerprint, load_model, load_tokenizer, save_model

COMPUTE = Compute(threads=1, dtype="float32", device="cpu")
SHAPE = Scratch(vocabulary=310, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2)
QUESTIONS = ["What is a fox?", "Name three rivers in Europe and say where they end.", "Hi", "Count to five."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights of a trained model's size; as random_model makes them, every model repeats its last token."""
    root = tmp_path_factory.mktemp("models")
    fetch("tiny", Source(scratch=SHAPE), root / "scratch", corpus=QUESTIONS * 4)
    model = load_model(root / "scratch")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim == 2 else 1)
    save_model(model, load_tokenizer(root / "scratch"), root / "tiny")
    return root / "tiny"


@pytest.fixture(scope="module")
def exported(folder) -> Path:
    target = folder.with_name("onnx")
    export(folder, target)
    return target


def tokens(runtime, limit=16):
    requests = [Request(runtime.prompt(question)) for question in QUESTIONS]
    rows = [[] for _ in QUESTIONS]
    for step in runtime._steps(requests, limit, 0.0, 1.0):
        for row, token in step.items():
            rows[row].append(token)
    return rows


def test_logits_of_a_padded_batch_are_torchs_with_and_without_a_cache(folder, exported):
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    batch = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    assert batch.attention_mask.min() == 0
    results = []
    for engine in (TorchEngine(folder, COMPUTE), OnnxEngine(exported, COMPUTE)):
        with torch.inference_mode():
            positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
            first, past = engine(batch.input_ids, batch.attention_mask, positions, None)
            rows = torch.tensor([1, 3])
            past = engine.select(past, rows)
            mask = torch.cat([batch.attention_mask[rows], torch.ones(2, 1, dtype=torch.long)], dim=1)
            second, _ = engine(torch.tensor([[5], [6]]), mask, positions[rows, -1:] + 1, past)
        results.append((first, second))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_greedy_answers_are_torchs_with_rows_that_leave_early(folder, exported):
    ours, theirs = load(folder, COMPUTE), load(exported, COMPUTE)
    end = tokens(ours)[0][5]  # a token that one row comes to, and that ends it
    for runtime in (ours, theirs):
        runtime.ends = torch.tensor([end])
    expected = tokens(ours)
    lengths = {len(row) for row in expected}
    assert min(lengths) < 16 and len(lengths) > 1
    assert tokens(theirs) == expected


def test_deviation_is_the_distance_of_the_logits(folder, exported):
    assert 0 < deviation(folder, exported, QUESTIONS) < 1e-4
    model = load_model(folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # twice the logits
    save_model(model, load_tokenizer(folder), folder.with_name("twice"))
    engine = TorchEngine(folder, COMPUTE)
    ids = load_tokenizer(folder)(QUESTIONS[0], return_tensors="pt").input_ids
    with torch.inference_mode():
        logits, _ = engine(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None], None)
    assert deviation(folder.with_name("twice"), exported, QUESTIONS[:1]) >= float(logits.abs().max()) - 1e-3


def test_tied_embeddings_are_stored_once(folder, exported):
    shapes = [tuple(sorted(t.dims)) for t in onnx.load(exported / ONNX_FILE).graph.initializer]
    vocabulary, hidden = load_model(folder).get_input_embeddings().weight.shape
    assert shapes.count((hidden, vocabulary)) == 1


def test_the_folder_holds_the_model_folders_files(folder, exported):
    names = {path.name for path in folder.iterdir()} - {"model.safetensors"} | {ONNX_FILE}
    assert {path.name for path in exported.iterdir()} == names
    for name in names - {ONNX_FILE, "config.json"}:
        assert (exported / name).read_bytes() == (folder / name).read_bytes()
    assert '"dtype": "float32"' in (exported / "config.json").read_text()


def test_another_process_exports_the_same_bytes(folder, exported, tmp_path):
    code = "from pathlib import Path; from q2t.deployment.onnx import export; "
    code += f"export(Path({str(folder)!r}), Path({str(tmp_path / 'again')!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, capture_output=True)
    assert fingerprint(tmp_path / "again") == fingerprint(exported)


def test_a_model_in_bfloat16_is_exported_as_float32(folder, tmp_path):
    save_model(load_model(folder, "bfloat16"), load_tokenizer(folder), tmp_path / "half")
    export(tmp_path / "half", tmp_path / "onnx")
    assert deviation(tmp_path / "half", tmp_path / "onnx", QUESTIONS) < 1e-4


def test_a_folder_without_a_model_is_refused_and_nothing_is_published(tmp_path):
    with pytest.raises(ValueError, match="no model folder"):
        export(tmp_path, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_publishing_replaces_a_folder_only_by_a_whole_one(tmp_path):
    target = tmp_path / "deep" / "model"
    with publishing(target) as partial:
        (partial / "a").write_text("old")
    with pytest.raises(RuntimeError), publishing(target) as partial:
        (partial / "b").write_text("half")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["a"]
    with publishing(target) as partial:
        assert not list(partial.iterdir())
    assert not list(target.iterdir())
