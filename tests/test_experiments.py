"""Experiments as people run them: queued, compared, launched as two processes. Minutes each: `pytest -m slow`."""

import csv
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from smoke import copy, environment, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke profile, run and committed."""
    folder = copy(tmp_path_factory.mktemp("first"))
    run(folder, "dvc", "repro")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "run")
    return folder


def shown(folder: Path) -> dict[str, dict[str, str]]:
    """Rows of `dvc exp show`, by name."""
    rows = csv.DictReader(StringIO(run(folder, "dvc", "exp", "show", "--csv")))
    return {row["Experiment"] or row["rev"]: row for row in rows}


def test_queued_experiments_are_compared_and_keep_their_rows(first: Path) -> None:
    from mlflow import MlflowClient

    run(first, "dvc", "exp", "run", "--queue", "-n", "hot", "-S", "distill.temperature=4")
    run(first, "dvc", "exp", "run", "--queue", "-n", "labels", "-S", "distill.alpha=1.0")
    start = [sys.executable, "-m", "dvc", "queue", "start", "-j", "1"]  # the worker keeps its output open
    with (first / ".q2t/queue.log").open("w") as log:
        subprocess.run(start, cwd=first, env=environment(first), stdout=log, stderr=log, check=True)
    deadline = time.monotonic() + 900
    while (status := run(first, "dvc", "queue", "status")).count("Success") < 2:
        assert "Failed" not in status and time.monotonic() < deadline, status
        time.sleep(5)

    rows = shown(first)
    assert (rows["hot"]["distill.temperature"], rows["labels"]["distill.temperature"]) == ("4", "2.0")
    assert rows["labels"]["distill.alpha"] == "1.0"
    figures = {name: row["student.forgetting.bits_per_byte"] for name, row in rows.items()}
    assert len({figures["hot"], figures["labels"], figures["workspace"]}) == 3
    assert run(first, "git", "status", "--porcelain") == ""  # and the workspace is as it was

    client = MlflowClient(f"sqlite:///{first}/.q2t/mlflow.db")
    (experiment,) = [each for each in client.search_experiments() if each.name == "q2t"]

    def stages(temperature: str) -> list[str]:
        query = f"params.`distill.temperature` = '{temperature}' AND tags.`q2t.stage` = 'distill'"
        return [each.info.status for each in client.search_runs([experiment.experiment_id], query)]

    assert stages("4") == ["FINISHED"]  # it showed itself while it ran, in a folder that is gone
    for name in ("hot", "labels"):
        run(first, "q2t", "track", "--rev", name)
    pipelines = client.search_runs([experiment.experiment_id], "tags.`q2t.kind` = 'pipeline'")
    assert {each.data.params["distill.alpha"] for each in pipelines} == {"0.7", "1.0"}
    assert stages("4") == ["FINISHED"]  # adopted, and not made again

    run(first, "dvc", "exp", "apply", "hot")
    assert "distill.temperature" in run(first, "dvc", "params", "diff")
    assert "student.accuracy" in run(first, "dvc", "metrics", "diff", "--all", "--targets", "reports/summary.json")
    run(first, "dvc", "plots", "diff", "-o", ".q2t/plots")
    page = (first / ".q2t/plots/index.html").read_text()
    assert all(f'"rev": "{rev}", "filename": "distill.csv"' in page for rev in ("HEAD", "workspace"))
    run(first, "git", "checkout", "-q", ".")
    run(first, "dvc", "checkout")


LAUNCHED = {
    "specialize": {"rel": 1e-3, "abs": 1e-4},  # its curve has four decimals
    "distill": {"rel": 1e-4, "abs": 1e-6},
    "prune": {"rel": 0.2, "abs": 0.01},
}
"""The stages that several processes share, and how near their curves come to one's."""


@pytest.mark.parametrize("configuration", ["ddp", "fsdp2"])
def test_two_processes_run_the_stages_as_one_does(first: Path, configuration: str) -> None:
    """The launcher that the README names, under DVC: both processes reach the end, and one of them publishes."""
    alone = {name: list(csv.reader((first / f"reports/curves/{name}.csv").open())) for name in LAUNCHED}
    launch = (
        f"accelerate launch --config_file q2t/launch/{configuration}.yaml --num_processes 2 --main_process_port 0 -m"
    )
    # One by one, or distill would learn from what the new expert answers, which has other last bits.
    run(first, "dvc", "exp", "run", "-n", configuration, "-S", f"launch={launch}", "--single-item", *LAUNCHED)
    stages = YAML(typ="safe").load(first / "dvc.lock")["stages"]
    assert all(stages[name]["cmd"] == f"{launch} stages.{name}" for name in LAUNCHED)
    for name, (header, *lines) in alone.items():
        with (first / f"reports/curves/{name}.csv").open() as file:
            found, *together = csv.reader(file)
        assert found == header and len(together) == len(lines)
        # AdamW divides by the gradient's own size, so that rounding grows from step to step. `prune` starts from what
        # `distill` has become, whose neurons may rank otherwise: its loss is near.
        for ours, theirs in zip(together[:6], lines[:6], strict=True):
            assert list(map(float, ours)) == pytest.approx(list(map(float, theirs)), **LAUNCHED[name])
    assert (first / "models/pruned/model.safetensors").is_file()
    run(first, "git", "checkout", "-q", ".")
    run(first, "dvc", "checkout")
