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
        written = {name: [row for row in examples if row.teacher == name] for name in params.filter.teachers}
        tokenizers = {name: _tokenizer(params, name, student, to_student) for name in written}
        beside = {
            name: sorted(settings.beside_writer(params.teachers[name].model).items())
            for name in written
            if written[name] and tokenizers[name] is not None
        }
        if settings.beside and not any(beside.values()):
            raise ValueError("label.beside has no effect: no other model wrote rows that get labels. Leave it out")
        others = {folder: _tokenizer_beside(folder, student, to_student) for folder in settings.beside}
        labelled: dict[str, Row] = {}
        fingerprints: dict[str, str] = {}
        for name, own in written.items():
            if tokenizers[name] is None:
                rows = encode(student, own)
            else:
                folder, mixed = Path(params.teachers[name].model), beside.get(name, [])
                rows = label(
                    _load(params, folder),
                    tokenizers[name],
                    own,
                    top_k=settings.top_k,
                    batch_size=settings.batch_size,
                    to_student=torch.tensor(to_student),
                    student_tokenizer=student,
                    systems=params.systems,
                    beside=[
                        Beside(_load(params, Path(other)), others[other], params.told.get(other, ""), weight)
                        for other, weight in mixed
                    ],
                )
                fingerprints[name] = fingerprint(folder)
                fingerprints |= {f"{name}+{weight:g} {other}": fingerprint(Path(other)) for other, weight in mixed}
            labelled |= {row.id: row for row in rows}
        rows = [labelled[example.id] for example in examples]
        quality.validate("soft_labels", quality.label_frame(rows), quality.labels())
        target = Path("data/soft_labels/labels.parquet")
        write(target, rows, top_k=settings.top_k, teachers=fingerprints)
        tokens = sum(row.completion_tokens for row in rows)
        metrics = {"rows": len(rows), "tokens": tokens, "bytes_per_token": target.stat().st_size / tokens}
        write_json(Path("reports/metrics/label.json"), metrics)
        tracked.metrics(metrics)


def _tokenizer(params: Params, name: str, student: Any, to_student: list[int]) -> Any:
    """The teacher's; None if its words alone are learnt from, by the task loss."""
    folder = Path(params.teachers[name].model)
    if (folder / POINTER).exists():
        return None  # all that an endpoint gives
    tokenizer = load_tokenizer(folder)
    if other := difference(student, tokenizer, to_student):
        logger.warning(
            "teachers.%s: %s. Its words alone are learnt from; online.spans compares probabilities too", name, other
        )
        return None
    return tokenizer


def _tokenizer_beside(folder: str, student: Any, to_student: list[int]) -> Any:
    """That of a model to be mixed into others' labels, for which it needs their tokens."""
    try:
        tokenizer = load_tokenizer(Path(folder))
    except ValueError as error:
        raise ValueError(f"label.beside: {error}") from None
    if other := difference(student, tokenizer, to_student):
        raise ValueError(
            f"label.beside: {folder}: {other}. Only teachers of the same tokens can be mixed: leave it out"
        )
    return tokenizer


def _load(params: Params, folder: Path) -> Any:
    return load_model(folder, params.compute.dtype).to(params.compute.device)


if __name__ == "__main__":
    run(main)
