"""Figures as MLflow takes them, from the files that stages write."""

import csv
import json
import math
import re
from collections.abc import Iterator
from io import StringIO
from typing import Any

from q2t.lockfile import SUMMARY, Entry


def flatten(value: Any) -> dict[str, float]:
    """The finite numbers in nested maps, by dotted path; flags, lists and text are left out."""
    return {
        mlflow_name(path): float(leaf)
        for path, leaf in leaves(value)
        if isinstance(leaf, int | float) and not isinstance(leaf, bool) and math.isfinite(leaf)
    }


def curve_points(text: str) -> list[tuple[str, float, int]]:
    """Name, value and step of every figure in a training curve: a CSV file with a column `step` and one for each."""
    rows = [(int(row.pop("step")), row) for row in csv.DictReader(StringIO(text))]
    return [(f"train/{mlflow_name(k)}", float(v), step) for step, row in rows for k, v in row.items() if v]


def figures_of(entry: Entry, files: dict[str, str]) -> dict[str, float] | None:
    """What a live run of this entry has logged at its end: the metrics, and the last row of the curve; None where the
    curve is not known."""
    figures: dict[str, float] = {}
    for path in (out["path"] for out in entry.get("outs", [])):
        if path.endswith(".csv"):
            if path not in files:
                return None
            points = curve_points(files[path])
            figures |= {name: value for name, value, step in points if step == points[-1][2]}
        elif path in files and path != SUMMARY:
            figures |= flatten(json.loads(files[path]))
    return figures


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What nested maps hold, by dotted path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def mlflow_name(text: str) -> str:
    """A name that MLflow takes: evaluate@student becomes evaluate:student. It refuses some paths."""
    return re.sub(r"[^\w\-. :]", ":", text)
