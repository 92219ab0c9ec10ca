"""Quantized models against the float32 ones, and the gate."""

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

from q2t.config import Compute, Scratch, Source
from q2t.deployment.int8 import RECIPES, gate, quantize
from q2t.deployment.onnx import export
from q2t.deployment.runtime import ONNX_FILE, load
from q2t.sources import fetch, fingerprint, load_model, load_tokenizer, save_model

COMPUTE = Compute(threads=1, dtype="float32", device="cpu")
# Wide enough that weights outweigh the graph; 100 is no multiple of a block, as a pruned layer may be.
SHAPE = Scratch(vocabulary=310, hidden=192, intermediate=100, layers=2, heads=4, kv_heads=2)
TEXTS = ["What is a fox?", "Name three rivers in Europe and say where they end.", "Hi", "Count to five."]


@pytest.fixture(scope="module", params=["tied", "not tied"])
def folder(request, tmp_path_factory) -> Path:
    """An ONNX model folder, of a model whose weights have a trained one's size."""
    root = tmp_path_factory.mktemp("models")
    fetch("tiny", Source(scratch=SHAPE), root / "scratch", corpus=TEXTS * 4)
    model = load_model(root / "scratch")
    if request.param == "not tied":
        model.config.tie_word_embeddings = False
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(model.lm_head.weight.shape, generator=generator) * 0.02
        model.lm_head.weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    save_model(model, load_tokenizer(root / "scratch"), root / "torch")
    export(root / "torch", root / "onnx")
    return root / "onnx"


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def logits(folder: Path) -> torch.Tensor:
    runtime = load(folder, COMPUTE)
    return torch.cat([runtime.engine.logits(runtime.tokenizer(t, return_tensors="pt").input_ids) for t in TEXTS])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_shrinks_the_model_and_keeps_most_answers(folder, tmp_path, recipe):
    quantize(folder, tmp_path / "int8", recipe)
    graph = onnx.load(tmp_path / "int8" / ONNX_FILE).graph
    assert sum(len(tensor.raw_data) for tensor in graph.initializer) < 0.3 * (folder / ONNX_FILE).stat().st_size
    assert not [tensor.name for tensor in graph.initializer if tensor.data_type == 1 and len(tensor.raw_data) > 9000]
    whole, small = logits(folder), logits(tmp_path / "int8")
    assert 0 < float((whole - small).abs().max()) < 0.2 * float(whole.std())
    assert (whole.argmax(-1) == small.argmax(-1)).float().mean() > 0.9


def test_each_recipe_is_more_careful_than_the_one_before(folder, tmp_path):
    whole, errors = logits(folder), []
    for place, recipe in enumerate(RECIPES):
        quantize(folder, tmp_path / str(place), recipe)
        errors.append(float((whole - logits(tmp_path / str(place))).pow(2).mean()))
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == len(RECIPES)


def test_tied_embeddings_are_one_matrix_still(folder, tmp_path):
    quantize(folder, tmp_path / "int8", RECIPES[0])
    graph = onnx.load(tmp_path / "int8" / ONNX_FILE).graph
    (gather,) = [n for n in graph.node if n.op_type == "Gather" and n.input[0].endswith("embed_tokens.weight.int8")]
    (head,) = [n for n in graph.node if n.output[0] == "logits"]
    tied = load_model(folder.with_name("torch")).config.tie_word_embeddings
    assert (head.input[1] == gather.input[0]) == tied


def test_a_quantized_folder_is_a_model_folder_of_deterministic_bytes(folder, tmp_path):
    for place, recipe in enumerate(RECIPES):
        quantize(folder, tmp_path / str(place), recipe)
    code = "import sys; from pathlib import Path; from q2t.deployment.int8 import RECIPES, quantize\n"
    code += "for i, r in enumerate(RECIPES): quantize(Path(sys.argv[1]), Path(sys.argv[2]) / f'{i}again', r)"
    command = [sys.executable, "-c", code, str(folder), str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True)
    for place in range(len(RECIPES)):
        assert fingerprint(tmp_path / f"{place}again") == fingerprint(tmp_path / str(place))
        for path in folder.iterdir():
            other = tmp_path / str(place) / path.name
            assert path.name == ONNX_FILE or other.read_bytes() == path.read_bytes()


def test_the_gate_takes_the_first_recipe_that_passes(folder, tmp_path):
    scores = iter([0.69, 0.71])
    target = tmp_path / "int8"
    chosen = gate(folder, target, lambda f: next(scores), reference=0.8, recovery=0.88)
    assert (chosen.recipe, chosen.accuracy, chosen.bytes) == (RECIPES[1].name, 0.71, size(target))
    quantize(folder, tmp_path / "expected", RECIPES[1])
    assert fingerprint(target) == fingerprint(tmp_path / "expected")
    assert {path.name for path in tmp_path.iterdir()} == {"int8", "expected"}


def test_the_gate_scores_what_it_publishes(folder, tmp_path):
    seen = []

    def accuracy_of(candidate: Path) -> float:
        assert not (tmp_path / "int8").exists()
        seen.append(fingerprint(candidate))
        return 1.0

    gate(folder, tmp_path / "int8", accuracy_of, reference=1.0, recovery=1.0)
    assert seen == [fingerprint(tmp_path / "int8")]


def test_the_gate_fails_with_the_figures_of_all(folder, tmp_path):
    scores = iter([0.11, 0.22])
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "kept").touch()
    with pytest.raises(ValueError, match="export.recovery 0.95") as failure:
        gate(folder, tmp_path / "int8", lambda f: next(scores), reference=0.8, recovery=0.95)
    text = str(failure.value)
    assert all(recipe.name in text for recipe in RECIPES)
    assert all(figure in text for figure in ("0.1100", "0.2200", "0.8000", "0.7600", " MB"))
    assert [path.name for path in tmp_path.rglob("*")] == ["int8", "kept"]


def test_weights_past_the_limit_of_a_graph_lie_beside_it(folder, tmp_path, monkeypatch):
    """As those of a model of billions, for which protobuf can't even count its bytes."""
    quantize(folder, tmp_path / "one", RECIPES[0])
    monkeypatch.setattr("q2t.deployment.int8.MAXIMUM_WEIGHTS", 10_000)
    quantize(folder, tmp_path / "two", RECIPES[0])
    graph, weights = (tmp_path / "two" / name for name in (ONNX_FILE, f"{ONNX_FILE}.data"))
    assert weights.stat().st_size > 10_000 and graph.stat().st_size < (tmp_path / "one" / ONNX_FILE).stat().st_size / 2
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "two"))
