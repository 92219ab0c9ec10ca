"""reports/summary.json: the headline figures of every model, and the table made from them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from q2t.evaluation.retention import retention, retention_interval, wilson_interval
from q2t.report import NOTHING, millions, percent, publish, size, span

TEACHER = "teacher"
LENIENT = "worked examples"
"""How a lenient measurement is named: by what the model sees first."""


def build(reports: Path, models: Iterable[str], *, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
    """Write and return reports/summary.json: models in the given order, sorted keys within.

    Reads metrics/evaluate_MODEL.json and answers/MODEL.jsonl under `reports`. Retention is paired over the
    target problems, so every model has to have answered the same ones. A model that was measured leniently too has
    `lenient` (accuracy, interval, families) and `chance`, the accuracy of blind guesses (accuracy, families).

    Raises:
        ValueError: no model is the teacher, or a model answered other problems than the teacher.
    """
    names = list(models)
    if TEACHER not in names:
        raise ValueError(f"evaluate.models: {names} has no {TEACHER!r} to compare with; add it")
    answered = {name: verdicts(reports / "answers" / f"{name}.jsonl") for name in names}
    known = by_family(answered[TEACHER])
    summary = {}
    for name in names:
        if answered[name].keys() != answered[TEACHER].keys():
            raise ValueError(
                f"answers/{name}.jsonl: its problems are not the teacher's, so retention is undefined; "
                "run dvc repro to evaluate both on one test split"
            )
        metrics = json.loads((reports / "metrics" / f"evaluate_{name}.json").read_text(encoding="utf-8"))
        kept = by_family(answered[name])
        entry = {key: metrics[key] for key in ("accuracy", "interval", "parameters", "embedding_parameters")}
        entry |= {key: metrics.get(key) for key in ("bytes", "forgetting", "truncated")}
        entry["retention"] = retention(kept, known)
        entry["retention_interval"] = retention_interval(
            kept, known, resamples=resamples, confidence=confidence, seed=seed
        )
        entry["families"] = _families(metrics["families"], confidence)
        entry["held_out"] = _share(metrics["held_out"], confidence) if metrics["held_out"]["total"] else None
        if "lenient" in metrics:
            entry["chance"] = {"accuracy": fmean(metrics["chance"].values()), "families": metrics["chance"]}
            lenient = {key: metrics["lenient"][key] for key in ("accuracy", "interval")}
            entry["lenient"] = lenient | {"families": _families(metrics["lenient"]["families"], confidence)}
        summary[name] = dict(sorted(entry.items()))
    publish(reports / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def measured(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Everything with an accuracy: the models and, behind its model, each lenient measurement of one."""
    rows: dict[str, Mapping[str, Any]] = {}
    for name, model in summary.items():
        rows[name] = model
        if "lenient" in model:
            rows[f"{name}, {LENIENT}"] = model["lenient"] | {key: model[key] for key in ("bytes", "parameters")}
    return rows


def chance(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The accuracy of blind guesses; None if no model was measured leniently. It is the same for all models."""
    return next((model["chance"] for model in summary.values() if "chance" in model), None)


def load(reports: Path) -> dict[str, Any]:
    """reports/summary.json, its models in the order of the report."""
    summary: dict[str, Any] = json.loads((reports / "summary.json").read_text(encoding="utf-8"))
    return summary


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def markdown_table(summary: dict[str, Any]) -> str:
    """The models as a Markdown table."""
    lines = ["| Model | Accuracy | Retention | Parameters | Size |", "|:--|--:|--:|--:|--:|"]
    for name, model in measured(summary).items():
        kept = "" if name == TEACHER else estimate(model.get("retention"), model.get("retention_interval"))
        cells = [
            name,
            estimate(model["accuracy"], model["interval"]),
            kept or NOTHING,
            millions(model.get("parameters")),
            size(model.get("bytes")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    guesses = chance(summary)
    if guesses:
        lines.append(f"| chance | {percent(guesses['accuracy'])} | {NOTHING} | {NOTHING} | {NOTHING} |")
    return "\n".join(lines)


def estimate(value: float | None, interval: Sequence[float] | None) -> str:
    """A share with its interval in brackets, where it has one; "" for none."""
    if value is None:
        return ""
    return f"{percent(value)} ({span(interval)})" if interval else percent(value)


def _families(counted: Mapping[str, Mapping[str, int]], confidence: float) -> dict[str, dict[str, Any]]:
    return {family: _share(counts, confidence) for family, counts in sorted(counted.items())}


def _share(counts: Mapping[str, int], confidence: float) -> dict[str, Any]:
    """Counts with their accuracy and Wilson interval."""
    return {
        "accuracy": counts["correct"] / counts["total"],
        "correct": counts["correct"],
        "interval": wilson_interval(counts["correct"], counts["total"], confidence),
        "total": counts["total"],
    }


def verdicts(answers: Path) -> dict[tuple[str, str], bool]:
    """(family, problem id) to correct, for the target problems."""
    return {
        (row["family"], row["problem_id"]): bool(row["correct"])
        for row in read_rows(answers)
        if row["domain"] == "target"
    }


def by_family(found: dict[tuple[str, str], bool]) -> dict[str, list[bool]]:
    """Family to verdicts in the order of problem ids."""
    families: dict[str, list[bool]] = {}
    for (family, _), correct in sorted(found.items()):
        families.setdefault(family, []).append(correct)
    return families
