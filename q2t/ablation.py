"""Controls: one thing of the quickstart changed at a time, to see what it is worth.

An MLflow database dies with its machine, so what an experiment comes to is a small file in git, and the table in the
README is made from these files.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from q2t.lockfile import read_files, read_yaml
from q2t.records import write_json
from q2t.report import percent, span

LIST = Path(__file__).with_name("ablations.yaml")
RESULTS = Path("reports/ablations")
METRICS = {name: f"reports/metrics/{name}.json" for name in ("filter", "evaluate_student", "evaluate_teacher")}


def experiments() -> dict[str, dict[str, Any]]:
    """Name to changed parameters, of all that ablations.yaml lists."""
    listed = read_yaml(LIST.read_text(encoding="utf-8"))
    return {name: listed["everywhere"] | changes for name, changes in listed["experiments"].items()}


def command(name: str, changes: Mapping[str, Any]) -> list[str]:
    """What runs one of them, in a copy of the workspace: the student is trained and evaluated, and nothing after it."""
    sets = [word for key, value in changes.items() for word in ("--set-param", f"{key}={_hydra(value)}")]
    return ["dvc", "exp", "run", "--temp", "--name", _reference(name), *sets, "evaluate@student"]


def run(names: Iterable[str] = (), root: Path = Path(".")) -> None:
    """Run these experiments, or all, one after another, and write reports/ablations/NAME.json for each.

    Raises:
        ValueError: an unknown name, or an experiment that fails.
    """
    known = experiments()
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"no ablation {unknown}: there are {', '.join(known)}")
    for name in names or known:
        changes = known[name]
        # An experiment of the same name would be kept, and the new one refused.
        _dvc(root, ["dvc", "exp", "remove", _reference(name)], quiet=True)
        if _dvc(root, command(name, changes)):
            raise ValueError(f"ablation {name!r} failed: see above; run `q2t ablate {name!r}` again when it is mended")
        write_json(root / RESULTS / f"{_slug(name)}.json", result(name, changes, root))


def result(name: str, changes: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """What the student of this experiment knows, beside its teacher."""
    files = {key: json.loads(text) for key, text in read_files(root, _reference(name), METRICS).items()}
    student, teacher = files["evaluate_student"], files["evaluate_teacher"]
    return {
        "name": name,
        "changes": dict(changes),
        "rows": files["filter"]["kept"],
        "accuracy": student["accuracy"],
        "interval": student["interval"],
        "retention": student["accuracy"] / teacher["accuracy"],
        "families": {family: counts["correct"] / counts["total"] for family, counts in student["families"].items()},
    }


def markdown_table(root: Path = Path(".")) -> str:
    """The results in the order of ablations.yaml, those that were run; a sentence where none was."""
    header = ["| Experiment | Rows | Accuracy | Retention |", "|:--|--:|--:|--:|"]
    lines = []
    for name in experiments():
        path = root / RESULTS / f"{_slug(name)}.json"
        if path.is_file():
            row = json.loads(path.read_text(encoding="utf-8"))
            accuracy = f"{percent(row['accuracy'])} ({span(row['interval'])})"
            lines.append(f"| {name} | {row['rows']} | {accuracy} | {percent(row['retention'])} |")
    return "\n".join(header + lines) if lines else "None of them has been run yet."


def _dvc(root: Path, words: list[str], quiet: bool = False) -> int:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run([sys.executable, "-m", *words], cwd=root, stdout=output, stderr=output).returncode


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def _reference(name: str) -> str:
    return f"ablation-{_slug(name)}"


def _hydra(value: Any) -> str:
    """A value as DVC's --set-param reads it (Hydra's override grammar): JSON, but for quotes around keys."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra(each)}" for key, each in value.items()) + "}"
    return json.dumps(value, separators=(",", ":"))
