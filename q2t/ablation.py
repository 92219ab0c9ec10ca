"""Experiments that change one thing of the quickstart at a time: what each part is worth, how far chance
moves accuracy, and accuracy by size.

An MLflow database dies with its machine, so what an experiment comes to is a small file in git, and the tables in the
README are made from these files.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock, Timeout

from q2t.evaluation.retention import Correct, retention, retention_interval
from q2t.lockfile import LOCK, PARAMS, cached, lookup, out_hashes, read_files, read_yaml, upstream
from q2t.records import write_json
from q2t.report import NOTHING, percent
from q2t.report.summary import by_family, estimate, markdown_table, verdicts
from q2t.tracking import minutes

LIST = Path(__file__).with_name("ablations.yaml")
RESULTS = Path("reports/ablations")
SIZES = ("teacher", "student", "pruned")
"""The models of the quickstart itself in the table of sizes; its quantised ones have pruned's parameters."""

SEEDS = {"student": "seeds", "int8": "final"}
"""By the quickstart's model, the group with those of other orders of the rows."""

BASIC = ("cross-entropy only", "default", "seed 8", "seed 9")
"""Controls that the table of methods begins with: the default and its spread."""

TEACHER = "models/teacher"
EARLIER = " †"
"""Behind the name of a result that today's run would not come to: it started from another model than dvc.lock has now,
was asked other problems, or ran with other parameters than params.yaml and ablations.yaml have now."""
FOOTNOTE = (
    "† of an earlier run: from another model, which its retention is against too, or with other problems or settings "
    "than now. `make ablations` runs it again."
)
PROBLEMS = "data/prompts/test.jsonl"


@dataclass(frozen=True)
class Experiment:
    """One of ablations.yaml."""

    name: str
    target: str
    """The stage that it is run up to: evaluate@MODEL."""
    training: str
    """The stage that trains this model."""
    model: str
    """The folder of the quickstart's model that it starts from."""
    changes: dict[str, Any]
    """Dotted parameters and their values; a leading "+" adds one that params.yaml does not have."""

    @property
    def slug(self) -> str:
        """The name, as files and references can have it."""
        return re.sub(r"\W+", "-", self.name)

    @property
    def reference(self) -> str:
        return f"ablation-{self.slug}"

    @property
    def command(self) -> list[str]:
        """What runs it, in a copy of the workspace."""
        sets = [word for key, value in self.changes.items() for word in ("--set-param", f"{key}={_hydra(value)}")]
        return ["dvc", "exp", "run", "--temp", "--name", self.reference, *sets, self.target]

    def changed(self, params: dict[str, Any]) -> dict[str, Any]:
        """All of params.yaml, as the experiment has it."""
        changed = deepcopy(params)
        for key, value in self.changes.items():
            *path, last = key.removeprefix("+").split(".")
            reduce(getitem, path, changed)[last] = value
        return changed


def experiments(group: str | None = None) -> list[Experiment]:
    """All that ablations.yaml lists, or those of one group."""
    return [
        Experiment(name, listed["target"], listed["training"], listed["model"], listed["everywhere"] | changes)
        for key, listed in _groups().items()
        if group in (None, key)
        for name, changes in listed["experiments"].items()
    ]


def run(names: Iterable[str] = (), root: Path = Path(".")) -> None:
    """Run these experiments, or all, one after another, and write reports/ablations/NAME.json for each.

    A name may be the one of its file.

    One that fails stops no other. What DVC has in its cache is not computed again, so that a run that was
    interrupted goes on where it was.

    Raises:
        ValueError: an unknown name, experiments that fail, or another run that has not ended yet.
    """
    names, listed = list(dict.fromkeys(names)), experiments()
    known = {name: each for each in listed for name in (each.name, each.slug)}
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"no ablation {unknown}: there are {', '.join(each.name for each in listed)}")
    lock = root / ".q2t/ablate.lock"
    lock.parent.mkdir(exist_ok=True)
    try:
        # DVC would let two run side by side, and they would take each other's checkpoints.
        with FileLock(lock, timeout=0):
            chosen = [known[name] for name in names] or listed
            failed = [each.name for each in chosen if not _succeeds(each, root)]
    except Timeout:
        raise ValueError("another `q2t ablate` is running here: wait until it ends") from None
    if failed:
        again = " ".join(f"'{name}'" for name in failed)
        raise ValueError(f"failed, see above: run `q2t ablate {again}` again when it is mended")


def _succeeds(experiment: Experiment, root: Path) -> bool:
    """Run it and write its result; of the experiment itself only what is in DVC's cache stays."""
    forget = ["dvc", "exp", "remove", experiment.reference]
    _dvc(root, forget, quiet=True)  # what a kill left: DVC would keep it, and refuse the new one
    if _dvc(root, experiment.command):
        return False
    try:
        write_json(root / RESULTS / f"{experiment.slug}.json", result(experiment, root))
    except ValueError as error:
        print(f"{experiment.name}: {error}", file=sys.stderr)
        return False
    finally:
        _dvc(root, forget, quiet=True)
    return True


def result(experiment: Experiment, root: Path) -> dict[str, Any]:
    """What the model of this experiment knows, beside its teacher, and what that hangs on: the hashes of the model that
    it started from and of the problems, and the parameters of all stages up to its evaluation.

    `minutes` are those of its training and its evaluation, as MLflow has them; experiments share what comes before.

    Raises:
        ValueError: it lacks a file, its teacher was not evaluated as it was itself, or solves nothing, so that there is
            nothing to retain.
    """
    model = experiment.target.removeprefix("evaluate@")
    paths = {"filter": "reports/metrics/filter.json", "evaluated": f"reports/metrics/evaluate_{model}.json"}
    texts = read_files(root, experiment.reference, paths | {LOCK: LOCK, PARAMS: PARAMS})
    stages, params = read_yaml(texts[LOCK], LOCK)["stages"], read_yaml(texts[PARAMS], PARAMS)
    own = {key.removeprefix("+").partition(".")[0] for key in experiment.changes}
    beside = "evaluate@teacher"
    if beside in stages and _asked(stages, beside, own) != _asked(stages, experiment.target, own):
        raise ValueError(f"{beside} was asked otherwise, or of another teacher: run `dvc repro`, and this again")
    evaluated = json.loads(texts["evaluated"])
    correct, known = (_correct(stages, each, root) for each in (model, "teacher"))
    if (kept := retention(correct, known)) is None:
        raise ValueError("the teacher solves no problem: train it longer, or on easier ones")
    drawn = {key: params["evaluate"][key] for key in ("resamples", "confidence")} | {"seed": params["seed"]}
    return {
        "name": experiment.name,
        "changes": experiment.changes,
        "started_from": out_hashes(stages)[experiment.model],
        "problems": _problems(stages, experiment),
        "settings": _settings(stages, experiment, params),
        "rows": json.loads(texts["filter"])["kept"],
        "retention": kept,
        "retention_interval": retention_interval(correct, known, **drawn),
        "families": {family: counts["correct"] / counts["total"] for family, counts in evaluated["families"].items()},
        "minutes": minutes({each: stages[each] for each in (experiment.training, experiment.target)}, root),
    } | {key: evaluated[key] for key in ("accuracy", "interval", "parameters", "bytes")}


def _problems(stages: dict[str, Any], experiment: Experiment) -> str | None:
    """The hash of the test problems, with their answers and tolerances; None if the stage has not run."""
    deps = stages.get(experiment.target, {}).get("deps", [])
    return next((dep["md5"] for dep in deps if dep["path"] == PROBLEMS), None)


def _settings(stages: dict[str, Any], experiment: Experiment, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of all stages up to the experiment's target, as dvc.lock has them.

    Which keeps stages of earlier graphs: one with a key that `params` no longer has is left out.
    """
    entries = [stages[name].get("params", {}).get(PARAMS, {}) for name in upstream(stages, experiment.target)]
    current = [entry for entry in entries if all(lookup(params, key) is not None for key in entry)]
    return {key: value for entry in current for key, value in entry.items()}


def _correct(stages: dict[str, Any], model: str, root: Path) -> Correct:
    """Which problems a model of an experiment answered right."""
    path = f"reports/answers/{model}.jsonl"
    md5 = out_hashes(stages).get(path)
    answers = cached(md5, root) if md5 else None
    if answers is None:
        raise ValueError(f"DVC's cache has not this {path}: run `dvc pull {path}` or `dvc repro`, and this again")
    return by_family(verdicts(answers))


def _asked(stages: dict[str, Any], stage: str, own: set[str]) -> list[Any]:
    """What the figures of an evaluation hang on beside its model, and the teacher if that is another than there is.

    Args:
        own: sections that the experiment changes.
    """
    entry, made = stages.get(stage, {}), out_hashes(stages)
    deps = [(dep["path"], dep["md5"]) for dep in entry.get("deps", []) if not dep["path"].startswith("models/")]
    teachers = [dep["md5"] for dep in entry.get("deps", []) if dep["path"] == TEACHER]
    params = entry.get("params", {}).get("params.yaml", {})
    return [
        deps,
        {key: value for key, value in params.items() if key not in own},
        teachers not in ([], [made.get(TEACHER)]),
    ]


def controls(root: Path = Path(".")) -> str:
    """The table of what each part is worth, and a sentence on the spread; a sentence where nothing was run.

    Here and in the other tables, EARLIER marks a result that today's run would not come to.
    """
    rows = _results("controls", root)
    spread = _groups()["controls"]["spread"]
    lines = [_accuracies(rows)]
    found = [row for name, row in rows.items() if name.removesuffix(EARLIER) in spread]
    beside_seed = [_beside_seed(row) for row in found]
    if len(found) == len(spread) and all(each == beside_seed[0] for each in beside_seed):
        lines += ["", _moved(spread, [row["accuracy"] for row in found])]
    return "\n".join(lines)


def _moved(names: Sequence[str], accuracies: Sequence[float]) -> str:
    return (
        f"The order of the rows alone ({', '.join(names)}) moves accuracy between {percent(min(accuracies))} and "
        f"{percent(max(accuracies))}, mean {percent(fmean(accuracies))}."
    )


def _beside_seed(row: dict[str, Any]) -> list[Any]:
    """What a result hangs on, without the seed of the rows' order."""
    settings = row["settings"]
    return [row["started_from"], row["problems"], settings | {"distill": settings["distill"] | {"seed": None}}]


def methods(root: Path = Path(".")) -> str:
    """The table of ways to distil, below the two that are controls as well."""
    basic = _results("controls", root)
    beside = {name: basic[name] for first in BASIC for name in (first, first + EARLIER) if name in basic}
    return _accuracies(beside | _results("methods", root))


def _accuracies(rows: dict[str, Any]) -> str:
    if not rows:
        return "None of them has been run yet."
    lines = ["| Experiment | Rows | Accuracy | Retention | Minutes |", "|:--|--:|--:|--:|--:|"]
    for name, row in rows.items():
        cells = [
            name,
            str(row["rows"]),
            estimate(row["accuracy"], row["interval"]),
            estimate(row["retention"], row.get("retention_interval")),
            f"{row['minutes']:.1f}" if row.get("minutes") else NOTHING,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + _footnote(rows)


def _footnote(names: Iterable[str]) -> str:
    return f"\n\n{FOOTNOTE}" if any(name.endswith(EARLIER) for name in names) else ""


def sizes(root: Path = Path(".")) -> str:
    """The table of accuracy by size: models of reports/summary.json, and what was run of the group `sizes`."""
    return _table(_with_quickstart(SIZES, "sizes", root))


def seeds(root: Path = Path(".")) -> str:
    """The table of the quickstart's students and those of other orders of the rows; and how far apart they are."""
    found = {group: _with_quickstart((model,), group, root) for model, group in SEEDS.items()}
    lines = [_table({name: row for rows in found.values() for name, row in rows.items()})]
    for model, group in SEEDS.items():
        rows = found[group]
        if {model, *(each.name for each in experiments(group))} == set(rows):
            lines += ["", _moved(list(rows), [row["accuracy"] for row in rows.values()])]
    return "\n".join(lines)


def _with_quickstart(names: Sequence[str], group: str, root: Path) -> dict[str, Any]:
    """Models of the quickstart, from reports/summary.json, and what was run of a group."""
    models = json.loads((root / "reports/summary.json").read_text(encoding="utf-8"))
    return {name: models[name] for name in names if name in models} | _results(group, root)


def _table(rows: dict[str, Any]) -> str:
    figures = ("accuracy", "interval", "retention", "retention_interval", "parameters", "bytes")
    table = markdown_table({name: {key: row.get(key) for key in figures} for name, row in rows.items()})
    return table + _footnote(rows)


def _groups() -> dict[str, Any]:
    groups: dict[str, Any] = read_yaml(LIST.read_text(encoding="utf-8"), LIST)
    return groups


def _results(group: str, root: Path) -> dict[str, Any]:
    """By name the results of those that were run, in the order of ablations.yaml."""
    lock, params = (read_yaml((root / name).read_text(encoding="utf-8"), name) for name in (LOCK, PARAMS))
    stages = lock["stages"]
    found = {}
    for each in experiments(group):
        path = root / RESULTS / f"{each.slug}.json"
        if path.is_file():
            row, now = json.loads(path.read_text(encoding="utf-8")), each.changed(params)
            again = (
                row["started_from"] == out_hashes(stages).get(each.model)
                and row["problems"] == _problems(stages, each)
                and all(lookup(now, key) == value for key, value in row["settings"].items())
            )
            found[each.name + ("" if again else EARLIER)] = row
    return found


def _dvc(root: Path, words: list[str], quiet: bool = False) -> int:
    output = subprocess.DEVNULL if quiet else None
    # Not subprocess.run: on Ctrl-C it kills DVC, which would leave its copy of the workspace behind.
    with subprocess.Popen([sys.executable, "-m", *words], cwd=root, stdout=output, stderr=output) as process:
        return process.wait()


def _hydra(value: Any) -> str:
    """A value as DVC's --set-param reads it (Hydra's override grammar): JSON, but for quotes around keys."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return json.dumps(value, separators=(",", ":"))
