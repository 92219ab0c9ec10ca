"""Run as: python -m stages.label. The training rows and their writers -> data/soft_labels, in the student's ids."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from q2t import quality
from q2t.config import Params, load
from q2t.determinism import seed_everything
from q2t.distillation.alignment import difference
from q2t.distillation.labels import Beside, label, write
from q2t.distillation.rows import Row, encode
from q2t.records import Example, read_jsonl, write_json
from q2t.sources import POINTER, fingerprint, load_model, load_tokenizer
from q2t.stage import run
from q2t.tracking import stage_run

STUDENT = Path("models/untrained")

logger = logging.getLogger(__name__)


def main() -> None:
    params = load()
    settings = params.label
    seed_everything(params.seed, params.compute)
    with stage_run("label") as tracked:
        examples = read_jsonl(Path("data/filtered/examples.jsonl"), Example)
        student = load_tokenizer(STUDENT)
        to_student = json.loads((STUDENT / "vocabulary_map.json").read_text())
        labelled: dict[str, Row] = {}
        fingerprints: dict[str, str] = {}
        mixed: dict[str, str] = {}
        for name in params.filter.teachers:
            folder = Path(params.teachers[name].model)
            written = [example for example in examples if example.teacher == name]
            if (folder / POINTER).exists():
                # An endpoint gives its words only: these rows are learnt by the task loss.
                rows = encode(student, written)
            elif other := difference(student, tokenizer := load_tokenizer(folder), to_student):
                logger.warning(
                    "teachers.%s: %s. Its words alone are learnt from; online.spans compares probabilities too",
                    name,
                    other,
                )
                rows = encode(student, written)
            else:
                others = settings.beside_writer(params.teachers[name].model) if written else {}
                rows = label(
                    load_model(folder, params.compute.dtype).to(params.compute.device),
                    tokenizer,
                    written,
                    top_k=settings.top_k,
                    batch_size=settings.batch_size,
                    to_student=torch.tensor(to_student),
                    student_tokenizer=student,
                    systems=params.systems,
                    beside=[_beside(params, other, student, to_student) for other in others],
                )
                fingerprints[name] = fingerprint(folder)
                mixed |= {f"{name}+{weight:g} {other}": fingerprint(Path(other)) for other, weight in others.items()}
            labelled |= {row.id: row for row in rows}
        if settings.beside and not mixed:
            raise ValueError("label.beside has no effect: no other model wrote rows that get labels. Leave it out")
        rows = [labelled[example.id] for example in examples]
        quality.validate("soft_labels", quality.label_frame(rows), quality.labels())
        target = Path("data/soft_labels/labels.parquet")
        write(target, rows, top_k=settings.top_k, teachers=fingerprints | mixed)
        tokens = sum(row.completion_tokens for row in rows)
        metrics = {"rows": len(rows), "tokens": tokens, "bytes_per_token": target.stat().st_size / tokens}
        write_json(Path("reports/metrics/label.json"), metrics)
        tracked.metrics(metrics)


def _beside(params: Params, folder: str, student: Any, to_student: list[int]) -> Beside:
    """The model in `folder`, to be mixed into others' labels, for which it needs their tokens."""
    try:
        tokenizer = load_tokenizer(Path(folder))
    except ValueError as error:
        raise ValueError(f"label.beside: {error}") from None
    if other := difference(student, tokenizer, to_student):
        raise ValueError(
            f"label.beside: {folder}: {other}. Only teachers of the same tokens can be mixed: leave it out"
        )
    model = load_model(Path(folder), params.compute.dtype).to(params.compute.device)
    return Beside(model, tokenizer, params.told.get(folder, ""), params.label.beside[folder])


if __name__ == "__main__":
    run(main)
