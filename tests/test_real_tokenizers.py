"""SmolLM2 teaches gemma-3-270m, the real ones: 330 MB to download, and gemma has a licence of its own."""

import csv
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cross_tokenizer import gemma, student_of
from q2t.config import Compute, Online, load
from q2t.distillation.course import learn
from q2t.distillation.rows import encode
from q2t.records import Example
from q2t.sources import fetch

pytestmark = pytest.mark.network

COMPUTE = Compute(threads=2, dtype="float32", device="cpu")
VOLTS, MILLIAMPERES = (5, 9, 12), (10, 25)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    fetch("smollm2", load().sources["smollm2"], root / "smollm2")
    gemma(root / "gemma")
    return {name: root / name for name in ("smollm2", "gemma")}


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    pairs = [(volts, current) for volts in VOLTS for current in MILLIAMPERES]
    fields: dict[str, Any] = {"family": "led", "domain": "target", "teacher": "expert", "weight": 1.0}
    return [
        Example(
            id=f"{i:016x}",
            problem_id=f"{i:016x}",
            question=f"Which resistor limits an LED of 2 V to {current} mA at {volts} V?",
            text=f"<think>({volts} - 2) / 0.0{current} = {(volts - 2) / current * 1000:.4g}</think>"
            f"<answer>{(volts - 2) / current * 1000:.4g} Ω</answer>",
            **fields,
        )
        for i, (volts, current) in enumerate(pairs)
    ]


def test_spans_of_equal_text_are_learnt_from(folders: dict[str, Path], examples: list[Example], tmp_path: Path) -> None:
    online = Online(teacher=str(folders["smollm2"]), spans="matched")
    settings = load().distill.model_copy(update={"epochs": 6, "batch_size": 3, "learning_rate": 2e-4, "online": online})
    student, trimmed = student_of(folders["gemma"], examples)
    rows = encode(trimmed.tokenizer, examples)
    curve = tmp_path / "curve.csv"
    places = {"checkpoints": tmp_path / "checkpoints", "curve": curve}
    learn(student, trimmed.tokenizer, rows, examples, trimmed.to_student, settings, compute=COMPUTE, **places)
    steps = [{key: float(value) for key, value in line.items()} for line in csv.DictReader(curve.open())]
    assert len(steps) == 12
    for term in ("cross_entropy", "spans", "numerals"):
        first, last = (sum(step[term] for step in part) for part in (steps[:4], steps[-4:]))
        assert last < 0.7 * first, (term, first, last)
