"""MLflow as a view of what DVC stores: every run here can be put together again from committed files.

A stage that executes shows itself live (`stage_run`). A stage that DVC skips or restores from its run cache
executes nothing, so `track` reads params.yaml, dvc.lock and the metric files, and adds what is missing. Runs
are found by content, never by stored ids:

    tag q2t.lock    a pipeline run: SHA-256 of dvc.lock's stages and the parameters
    tag q2t.entry   a stage's run: SHA-256 of its name and entry in dvc.lock
    tag q2t.inputs  a stage's live run: SHA-256 of its name, command, dependencies and parameters, all of them
                    known before the outs are; `track` adopts it by this tag

A stage that two pipelines share is one run, the child of the first, and both name it in a tag q2t.stage.NAME.
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from q2t.evaluation.cost import peak_memory_mb
from q2t.figures import curve_points, figures_of, flatten, leaves, mlflow_name
from q2t.lockfile import PARAMS, SUMMARY, Entry, Result, digest, entry_before, inputs_key, read_result
from q2t.stage import is_main
from q2t.store import Store, init_store, spared, without_secret

COMMIT = "mlflow.source.git.commit"
HEADLINE = ("accuracy", "retention", "parameters", "bytes")
"""A model's figures that a pipeline run shows, as MODEL.FIGURE. The others are in the runs of `evaluate`: all of
them together are 200 columns, among which nobody finds these."""


class StageRun:
    """What a stage sees of its own run. Nothing here raises: what can't be logged is warned about."""

    def __init__(self) -> None:
        self._store: Store | None = None
        self._id = ""
        self._began = time.monotonic()

    def metrics(self, values: dict[str, Any], step: int = 0) -> None:
        """Log every number in the (nested) values."""
        if self._store:
            with spared("metrics"):
                _log_metrics(self._store, self._id, flatten(values), step)

    def curve(self, path: Path) -> None:
        """Log a training curve: a CSV file with a column `step` and one column for each figure."""
        if self._store:
            with spared(f"the curve {path}"):
                _log_curve(self._store, self._id, path.read_text(encoding="utf-8"))

    def _start(self, stage: str, root: Path) -> None:
        entry: Entry = {}
        with spared(f"the inputs of {stage}"):
            entry = entry_before(stage, root)
        store, known = init_store(root), {"q2t.inputs": inputs_key(stage, entry)} if entry else {}
        self._id = store.create(stage, {"q2t.kind": "stage", "q2t.stage": stage} | known)
        self._store = store
        _log_entry(store, self._id, entry)
        self._began = time.monotonic()

    def _end(self, status: str) -> None:
        if self._store:
            with spared("the end of the run"):
                cost = {"seconds": round(time.monotonic() - self._began, 1), "peak_memory_mb": peak_memory_mb()}
                _log_metrics(self._store, self._id, cost)
                self._store.client.set_terminated(self._id, status)


@contextmanager
def stage_run(stage: str, root: Path = Path(".")) -> Iterator[StageRun]:
    """A live run around the body of a stage, with the parameters and data that DVC hands it.

    At the end it says what the stage cost: the metrics `seconds`, of this process alone where a stage was interrupted
    and went on, and `peak_memory_mb`. Of several processes, the first one has a run.
    A failure of tracking is a warning and never costs a result; an exception of the body passes through.
    """
    run = StageRun()
    if not is_main():
        yield run
        return
    with spared(f"the start of {stage}"):
        run._start(stage, root)
    try:
        yield run
    except BaseException:
        run._end("FAILED")
        raise
    run._end("FINISHED")


def track(root: Path = Path("."), rev: str | None = None) -> str:
    """Show one result of the whole pipeline in MLflow, and return its run id. Doing it again changes nothing.

    Args:
        rev: a commit, tag, branch or DVC experiment to read the result from; the workspace if None.

    Raises:
        ValueError: the revision is unknown, a file is missing, the files belong to different results, or MLflow fails.
    """
    result, store = read_result(root, rev), init_store(root)
    from mlflow import MlflowException

    try:
        return _tracked(result, store)
    except MlflowException as error:
        raise ValueError(without_secret(f"MLflow: {error}").splitlines()[0]) from None


def _tracked(result: Result, store: Store) -> str:
    run_id = _find(store, "q2t.lock", result.key)
    if run_id is None:
        summary = json.loads(result.files[SUMMARY])
        run_id = store.create(_title(result.key, summary), {"q2t.kind": "pipeline", "q2t.lock": result.key})
        _log_params(store, run_id, result.params)
        _log_summary(store, run_id, summary)
        for stage, entry in result.stages.items():
            child = _child(store, run_id, stage, entry, result.files)
            store.client.set_tag(run_id, mlflow_name(f"q2t.stage.{stage}"), child)
        store.client.set_terminated(run_id)
    # The first commit that holds the result, which later ones, of other code, hold too.
    if result.commit and COMMIT not in store.client.get_run(run_id).data.tags:
        store.client.set_tag(run_id, COMMIT, result.commit)
    return run_id


def log_timings(models: list[dict[str, Any]], root: Path = Path(".")) -> list[dict[str, Any]]:
    """Add what `q2t measure` measured to the pipeline run, as often as it is measured.

    Returns:
        A row for each stage of the result as it last ran, in that order: `stage`, `minutes`, `peak_memory_mb`. A stage
        that DVC restored and that never ran here has none.
    """
    stages: list[dict[str, Any]] = []
    with spared("timings"):
        store, run_id = init_store(root), track(root)
        _log_metrics(store, run_id, flatten({"measured": {row["model"]: row for row in models}}))
        entries = read_result(root).stages.items()
        runs = [run for stage, entry in entries for run in _live_runs(store, inputs_key(stage, entry))[:1]]
        for run in sorted(runs, key=lambda run: run.info.start_time):
            cost = run.data.metrics
            if "seconds" in cost:
                row = {"stage": run.info.run_name, "minutes": round(cost["seconds"] / 60, 2)}
                stages.append(row | {"peak_memory_mb": cost["peak_memory_mb"]})
    return stages


def minutes(stages: dict[str, Entry], root: Path = Path(".")) -> float | None:
    """What these stages took when they last ran, together, an interrupted one since it went on; None where MLflow does
    not have all of them."""
    with spared("what stages took"):
        store = init_store(root)
        runs = [_live_runs(store, inputs_key(stage, entry)) for stage, entry in stages.items()]
        if all(runs):
            return round(sum(newest.data.metrics["seconds"] for newest, *_ in runs) / 60, 2)
    return None


def _child(store: Store, parent: str, stage: str, entry: Entry, files: dict[str, str]) -> str:
    """The run of this stage: found, adopted from a live run, or made from the files."""
    key = digest([stage, entry])
    if found := _find(store, "q2t.entry", key):
        if _is_gone(store, store.client.get_run(found).data.tags["mlflow.parentRunId"]):
            store.client.set_tag(found, "mlflow.parentRunId", parent)
        return found
    run_id = _live(store, inputs_key(stage, entry), figures_of(entry, files))
    made = run_id is None
    if run_id is None:
        run_id = store.create(stage, {"q2t.kind": "stage", "q2t.stage": stage, "q2t.entry": key})
        _log_entry(store, run_id, entry)
    logged = store.client.get_run(run_id).data.metrics  # a live run has some of them already
    for out in entry.get("outs", []):
        path, text = out["path"], files.get(out["path"])
        if path.startswith("models/"):
            _log_model(store, run_id, path, out["md5"])
        elif text and path.endswith(".csv") and not any(name.startswith("train/") for name in logged):
            _log_curve(store, run_id, text)
        elif text and path.endswith(".json") and path != SUMMARY:
            new = {k: v for k, v in flatten(json.loads(text)).items() if k not in logged}
            _log_metrics(store, run_id, new)
    store.client.set_tag(run_id, "mlflow.parentRunId", parent)
    store.client.set_tag(run_id, "q2t.entry", key)
    if made:  # a live run ended when its stage did
        store.client.set_terminated(run_id)
    return run_id


def _find(store: Store, tag: str, value: str) -> str | None:
    """The finished run with this tag. One that was interrupted is deleted, to be made again."""
    for run in store.client.search_runs([store.experiment], f"tags.`{tag}` = '{value}'"):
        if run.info.status == "FINISHED":
            return str(run.info.run_id)
        store.client.delete_run(run.info.run_id)
    return None


def _is_gone(store: Store, run_id: str) -> bool:
    """Whether a run was deleted, or deleted for good by `mlflow gc`."""
    from mlflow import MlflowException

    try:
        return bool(store.client.get_run(run_id).info.lifecycle_stage == "deleted")
    except MlflowException:
        return True


def _live(store: Store, inputs: str, figures: dict[str, float] | None) -> str | None:
    """The newest finished live run of these inputs that no result has adopted yet, and that logged these figures:
    on another processor, equal inputs come to others."""
    if figures is None:
        return None
    for run in _live_runs(store, inputs):
        logged = run.data.metrics
        if "q2t.entry" not in run.data.tags and all(figures[name] == logged[name] for name in figures.keys() & logged):
            return str(run.info.run_id)
    return None


def _live_runs(store: Store, inputs: str) -> list[Any]:
    """The finished live runs of these inputs, the newest first."""
    query = f"tags.`q2t.inputs` = '{inputs}' AND attributes.status = 'FINISHED'"
    found: list[Any] = store.client.search_runs([store.experiment], query, order_by=["attributes.start_time DESC"])
    return found


def _title(key: str, summary: dict[str, Any]) -> str:
    """The last model's accuracy and the result's key: MLflow's list of runs shows no metric unless told to."""
    from q2t.report import percent

    name, figures = list(summary.items())[-1]
    return f"{name} {percent(figures['accuracy'])} ({key[:8]})"


def _log_summary(store: Store, run_id: str, summary: dict[str, Any]) -> None:
    """The headline figures as metrics, and as the table that the run's page opens with, the last model first."""
    from q2t.report.summary import markdown_table

    models = dict(reversed(summary.items()))
    _log_metrics(store, run_id, flatten({k: {h: v.get(h) for h in HEADLINE} for k, v in models.items()}))
    store.client.set_tag(run_id, "mlflow.note.content", markdown_table(models))


def _log_entry(store: Store, run_id: str, entry: Entry) -> None:
    """The parameters and the data sets of a stage, the latter by their DVC hash."""
    from mlflow.entities import Dataset, DatasetInput

    _log_params(store, run_id, entry.get("params", {}).get(PARAMS, {}))
    data = [dep for dep in entry.get("deps", []) if dep["path"].startswith("data/")]
    sets = [Dataset(dep["path"], dep["md5"], "dvc", json.dumps({"path": dep["path"]})) for dep in data]
    if sets:
        store.client.log_inputs(run_id, [DatasetInput(each) for each in sets])


def _log_model(store: Store, run_id: str, path: str, md5: str) -> None:
    """A model by name and hash. Its bytes stay where they are: `dvc get` brings them."""
    tags = {"mlflow.model.isExternal": "true", "dvc.path": path, "dvc.md5": md5}
    name = re.sub(r"[^\w-]", "-", path.removeprefix("models/"))
    model = store.client.create_logged_model(store.experiment, name, run_id, tags)
    store.client.finalize_logged_model(model.model_id, "READY")


def _log_params(store: Store, run_id: str, params: dict[str, Any]) -> None:
    from mlflow.entities import Param

    texts = [Param(mlflow_name(k), v if isinstance(v, str) else json.dumps(v)) for k, v in leaves(params)]
    for start in range(0, len(texts), 100):  # MLflow takes 100 parameters and 1,000 metrics at a time
        store.client.log_batch(run_id, params=texts[start : start + 100])


def _log_metrics(store: Store, run_id: str, values: dict[str, float], step: int = 0) -> None:
    _log_points(store, run_id, [(name, value, step) for name, value in values.items()])


def _log_curve(store: Store, run_id: str, text: str) -> None:
    _log_points(store, run_id, curve_points(text))


def _log_points(store: Store, run_id: str, points: list[tuple[str, float, int]]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, step) for name, value, step in points]
    for start in range(0, len(metrics), 1000):
        store.client.log_batch(run_id, metrics=metrics[start : start + 1000])
