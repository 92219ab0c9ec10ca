import subprocess
import sys
from pathlib import Path

import pytest

from q2t.config import Compute, Scratch, Source
from q2t.deployment.onnx import export
from q2t.evaluation import cost
from q2t.records import Problem, write_jsonl
from q2t.sources import fetch

SHAPE = Scratch(vocabulary=310, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2)
COMPUTE = Compute(threads=1, dtype="float32", device="cpu")
QUESTIONS = ["What is a fox?", "Count to five."]
FIGURES = {"tokens_per_second", "first_token_ms", "peak_memory_mb"}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    fetch("tiny", Source(scratch=SHAPE), root / "torch", QUESTIONS * 9)
    export(root / "torch", root / "onnx")
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    """A repository with this one's params.yaml and two test problems, and no model."""
    (tmp_path / "params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
    problems = [
        Problem(id=str(i), family="gain", domain="target", split="test", inputs={}, question=q, check={})
        for i, q in enumerate(QUESTIONS)
    ]
    (tmp_path / cost.QUESTIONS).parent.mkdir(parents=True)
    write_jsonl(tmp_path / cost.QUESTIONS, problems)
    return tmp_path


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_model_is_measured_in_a_process_of_its_own(folder, kind):
    ballast = bytearray(b"x") * 1_300_000_000  # this process's peak is not the model's
    figures = cost.measure_model(folder / kind, COMPUTE, QUESTIONS)
    del ballast
    assert figures.keys() == FIGURES
    assert figures["tokens_per_second"] > 1
    assert 0 < figures["first_token_ms"] < 60_000
    assert 50 < figures["peak_memory_mb"] < 1200


def test_a_slow_start_is_no_slow_decoding(folder, monkeypatch):
    """Medians over the questions, the warm-up apart, of TOKENS tokens each."""
    times = iter([(9.0, 9.0), (0.1, 2.0), (0.2, 4.0), (0.3, 100.0)])
    monkeypatch.setattr(cost, "_ask", lambda runtime, question: next(times))
    seeded: list = []  # for real it would hold for all tests of this process
    monkeypatch.setattr(cost, "seed_everything", lambda seed, compute: seeded.append(compute))
    figures = cost._measure_here(folder / "onnx", COMPUTE, ["a", "b", "c"])
    assert figures["tokens_per_second"] == cost.TOKENS / 4
    assert figures["first_token_ms"] == 200.0
    assert seeded == [COMPUTE], "threads and instructions are those of the stages"


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(ValueError, match="can't be measured.*no model folder"):
        cost.measure_model(tmp_path, COMPUTE, QUESTIONS)


def test_models_that_are_there_are_measured(root, monkeypatch, capsys):
    for name in ("models/teacher", "models/int8", "models/student"):
        (root / name).mkdir(parents=True)
    for name in ("models/teacher", "models/int8"):  # the student's folder is a pointer's: no config
        (root / name / "config.json").touch()
    asked = []

    def measured(folder, compute, questions):
        asked.append((folder, questions))
        return {"tokens_per_second": 10.0 * len(asked)}

    monkeypatch.setattr(cost, "measure_model", measured)
    rows = cost.measure(root)
    assert rows == [
        {"model": "teacher", "tokens_per_second": 10.0},
        {"model": "int8", "tokens_per_second": 20.0},
    ]
    assert asked == [(root / "models/teacher", QUESTIONS), (root / "models/int8", QUESTIONS)]
    skipped = capsys.readouterr().err.splitlines()
    assert "skipped student: there is no model in models/student" in skipped
    assert not any("teacher" in line for line in skipped)


def test_the_peak_stays_when_memory_is_given_back():
    code = "from q2t.evaluation.cost import peak_memory_mb as peak; before = peak()\n"
    code += "ballast = bytearray(b'x') * 300_000_000; del ballast; print(peak() - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert 280 < float(done.stdout) < 320


def test_a_failing_model_is_named(root, folder, monkeypatch):
    (root / "models").mkdir()
    (root / "models/teacher").mkdir()
    (root / "models/teacher/config.json").write_text("{}")
    with pytest.raises(ValueError, match="evaluate.models.teacher: .*can't be measured"):
        cost.measure(root)


def test_without_questions_it_says_how_to_get_them(root):
    (root / cost.QUESTIONS).unlink()
    with pytest.raises(ValueError, match="dvc pull data/prompts"):
        cost.measure(root)
