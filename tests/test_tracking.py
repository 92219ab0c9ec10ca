import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow import MlflowException
from ruamel.yaml import YAML

from q2t import cli, tracking
from q2t.evaluation.cost import peak_memory_mb
from q2t.figures import figures_of, flatten
from q2t.lockfile import read_result
from q2t.store import init_store, spared

ROOT = Path(__file__).resolve().parents[1]

PARAMS = """\
seed: 1
distill: {temperature: 2.0, layers: [0, 2]}
tracking: {uri: "sqlite:///.q2t/mlflow.db", experiment: q2t}
"""
GRAPH = """\
stages:
  pose:
    cmd: python stages.py pose
    params: [seed]
    outs: [data/prompts.jsonl]
  distill:
    cmd: python stages.py distill
    deps: [stages.py, data/prompts.jsonl]
    params: [seed, distill]
    outs: [models/student, reports/curves/distill.csv]
    metrics: [reports/metrics/distill.json: {cache: false}]
  evaluate:
    matrix: {model: [student]}
    cmd: python stages.py evaluate
    deps: [models/student]
    metrics: [{"reports/metrics/evaluate_${item.model}.json": {cache: false}}]
  report:
    cmd: python stages.py report
    deps: [reports/metrics]
    metrics: [reports/summary.json: {cache: false}]
"""
# Only distill shows itself live: the other stages are put together from files.
STAGES = """\
import json, sys
from pathlib import Path
from ruamel.yaml import YAML

def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)

stage, params = sys.argv[1], YAML(typ="safe").load(Path("params.yaml"))
loss = params["distill"]["temperature"] / 10
if stage == "pose":
    write("data/prompts.jsonl", "{}\\n")
elif stage == "distill":
    from q2t.tracking import stage_run
    with stage_run("distill") as run:
        write("models/student/model.safetensors", f"weights {loss}")
        write("reports/curves/distill.csv", f"step,loss\\n0,1.0\\n10,{loss}\\n")
        write("reports/metrics/distill.json", json.dumps({"loss": loss}))
        run.curve(Path("reports/curves/distill.csv"))
        run.metrics({"loss": loss})
elif stage == "evaluate":
    write("reports/metrics/evaluate_student.json", json.dumps({"accuracy": 1 - loss}))
else:
    figures = {"accuracy": 1 - loss, "interval": [0, 1], "retention": None, "retention_interval": None}
    figures |= {"parameters": 90_000, "bytes": 400_000, "truncated": 0.1, "families": {"rc": {"accuracy": 1}}}
    write("reports/summary.json", json.dumps({"student": figures}))
"""


def run(*command: str, cwd: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "DVC_NO_ANALYTICS": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A pipeline that ran, was committed, and ran once more as a DVC experiment with another temperature."""
    root = tmp_path_factory.mktemp("project")
    for name, text in {"params.yaml": PARAMS, "dvc.yaml": GRAPH, "stages.py": STAGES}.items():
        (root / name).write_text(text)
    (root / ".gitignore").write_text("/.q2t\n/data\n/models\n/reports/curves\n")
    run("git", "init", "-q", cwd=root)
    run("git", "config", "user.name", "q2t", cwd=root)
    run("git", "config", "user.email", "q2t@example.org", cwd=root)
    run("dvc", "init", "-q", cwd=root)
    run("dvc", "repro", cwd=root)
    run("git", "add", "-A", cwd=root)
    run("git", "commit", "-q", "-m", "T = 2", cwd=root)
    run("dvc", "exp", "run", "-n", "hot", "-S", "distill.temperature=4", cwd=root)
    return root


@pytest.fixture(scope="module")
def runs(project):
    """Pipeline runs by revision, each tracked twice, and the number of runs after either time."""
    store = init_store(project)

    def count() -> int:
        return len(store.client.search_runs([store.experiment]))

    first = {"hot": tracking.track(project), "HEAD": tracking.track(project, "HEAD")}
    once = count()
    second = {"hot": tracking.track(project, "hot"), "HEAD": tracking.track(project, "HEAD")}
    return store.client, store.experiment, first, second, (once, count())


def test_tracking_twice_gives_the_same_runs(runs):
    _, _, first, second, (once, twice) = runs
    assert first == second and once == twice
    assert once == 2 + 4 + 3  # two pipelines; the experiment shares `pose`, the other three stages ran anew


def test_two_experiments_are_two_rows_that_differ_in_the_parameter(runs):
    client, _, first, _, _ = runs
    hot, cold = (client.get_run(first[rev]).data for rev in ("hot", "HEAD"))
    assert {k for k in hot.params if hot.params[k] != cold.params[k]} == {"distill.temperature"}
    assert hot.params["distill.temperature"] == "4" and cold.params["distill.layers"] == "[0, 2]"
    assert (hot.metrics["student.accuracy"], cold.metrics["student.accuracy"]) == (0.6, 0.8)


def test_a_pipeline_run_opens_with_its_headline_figures(runs):
    client, _, first, _, _ = runs
    hot = client.get_run(first["hot"]).data
    assert hot.metrics == {"student.accuracy": 0.6, "student.parameters": 90_000, "student.bytes": 400_000}
    assert hot.tags["mlflow.runName"] == f"student 60.0% ({hot.tags['q2t.lock'][:8]})"
    assert "| student | 60.0% (0.0–100.0%) |" in hot.tags["mlflow.note.content"]


def test_the_commit_is_named_where_it_holds_the_result(runs, project):
    client, _, first, _, _ = runs
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True).stdout.strip()
    assert client.get_run(first["HEAD"]).data.tags["mlflow.source.git.commit"] == head
    assert client.get_run(first["hot"]).data.tags["mlflow.source.git.commit"] != head


def test_a_later_commit_with_the_same_result_is_not_named(runs, project):
    client, _, first, _, _ = runs
    before = client.get_run(first["HEAD"]).data.tags["mlflow.source.git.commit"]
    run("git", "commit", "-q", "--allow-empty", "-m", "other code", cwd=project)
    try:
        assert tracking.track(project, "HEAD") == first["HEAD"]
        assert client.get_run(first["HEAD"]).data.tags["mlflow.source.git.commit"] == before
    finally:
        run("git", "reset", "-q", "--soft", "HEAD~1", cwd=project)


def test_a_live_run_is_adopted_with_its_curve_and_inputs(runs, project):
    client, experiment, first, _, _ = runs
    stage = client.get_run(client.get_run(first["HEAD"]).data.tags["q2t.stage.distill"])
    assert "q2t.inputs" in stage.data.tags  # only a live run has it
    assert stage.data.tags["mlflow.parentRunId"] == first["HEAD"]
    curve = client.get_metric_history(stage.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in curve] == [(0, 1.0), (10, 0.2)]
    assert len(client.get_metric_history(stage.info.run_id, "loss")) == 1
    assert stage.info.end_time < client.get_run(first["HEAD"]).info.start_time  # when the stage did
    lock = YAML(typ="safe").load(
        subprocess.run(["git", "show", "HEAD:dvc.lock"], cwd=project, capture_output=True).stdout
    )
    prompts = lock["stages"]["pose"]["outs"][0]["md5"]
    assert [(i.dataset.name, i.dataset.digest) for i in stage.inputs.dataset_inputs] == [
        ("data/prompts.jsonl", prompts)
    ]


def test_a_stage_without_a_live_run_is_made_from_files(runs):
    client, _, first, _, _ = runs
    stage = client.get_run(client.get_run(first["hot"]).data.tags["q2t.stage.evaluate:student"])
    assert stage.data.metrics == {"accuracy": 0.6} and stage.info.run_name == "evaluate@student"


def test_two_pipelines_share_the_stage_that_ran_once(runs):
    client, _, first, _, _ = runs
    shared = {client.get_run(first[rev]).data.tags["q2t.stage.pose"] for rev in first}
    assert len(shared) == 1


def test_models_are_named_and_not_copied(runs, project):
    client, experiment, _, _, _ = runs
    models = client.search_logged_models([experiment])
    assert [m.name for m in models] == ["student", "student"]
    assert len({m.tags["dvc.md5"] for m in models}) == 2 and {m.tags["dvc.path"] for m in models} == {"models/student"}
    assert not list((project / ".q2t").rglob("*.safetensors"))


def test_an_interrupted_run_is_made_again(runs, project):
    client, experiment, first, _, _ = runs
    tags = client.get_run(first["hot"]).data.tags
    client.delete_run(first["hot"])
    half = client.create_run(experiment, tags={"q2t.lock": tags["q2t.lock"]}).info.run_id
    again = tracking.track(project, "hot")
    assert again not in (half, first["hot"])
    assert client.get_run(half).info.lifecycle_stage == "deleted"
    assert client.get_run(again).data.tags["q2t.stage.distill"] == tags["q2t.stage.distill"]
    assert client.get_run(tags["q2t.stage.distill"]).data.tags["mlflow.parentRunId"] == again


def test_a_pipeline_run_that_is_gone_for_good_is_made_again(runs, project):
    """After `mlflow gc`, a stage's run names a parent that the store does not know."""
    client, _, first, _, _ = runs
    stage = client.get_run(first["HEAD"]).data.tags["q2t.stage.pose"]
    client.set_tag(stage, "mlflow.parentRunId", "0" * 32)
    client.delete_run(first["HEAD"])
    again = tracking.track(project, "HEAD")
    assert client.get_run(stage).data.tags["mlflow.parentRunId"] == again


@pytest.mark.parametrize(("loss", "adopted"), [(0.25, False), (0.4, True)])
def test_a_live_run_of_equal_inputs_that_came_to_something_else_is_not_adopted(loss, adopted, project, tmp_path):
    """As another processor's may, where several people share a server."""
    store = init_store(project)
    inputs = {"q2t.inputs": "key", "q2t.kind": "stage", "q2t.stage": "distill"}
    run_id = store.create("distill", inputs)
    store.client.log_metric(run_id, "train/loss", loss, step=10)
    store.client.log_metric(run_id, "seconds", 3.0)
    store.client.set_terminated(run_id)
    entry = {"outs": [{"path": "reports/curves/distill.csv"}]}
    figures = figures_of(entry, {"reports/curves/distill.csv": "step,loss,kl\n0,1.0,\n10,0.4,\n"})
    assert figures == {"train/loss": 0.4}
    assert figures_of(entry, {"reports/curves/distill.csv": "step,loss\n"}) == {}  # specialize.epochs: 0
    assert figures_of(entry, {}) is None and tracking._live(store, "key", None) is None
    assert tracking._live(store, "key", figures) == (run_id if adopted else None)
    store.client.delete_run(run_id)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "params.yaml",
            "temperature: 4",
            "temperature: 5",
            "distill ran with another distill than params.yaml",
        ),
        ("reports/summary.json", "0.6", "0.9", "summary.json is not the file that dvc.lock names"),
        ("dvc.yaml", "  report:", "  publish: {cmd: x}\n  report:", "publish has not run"),
    ],
)
def test_files_of_different_results_are_refused(project, file, old, new, message):
    text = (project / file).read_text()
    assert old in text
    (project / file).write_text(text.replace(old, new))
    try:
        with pytest.raises(ValueError, match=message):
            tracking.track(project)
    finally:
        (project / file).write_text(text)


def test_a_stage_that_ran_before_its_dependency_changed_is_refused(project):
    lock = (project / "dvc.lock").read_text()
    document = YAML(typ="safe").load(lock)
    document["stages"]["evaluate@student"]["deps"][0]["md5"] = "0" * 32
    YAML().dump(document, project / "dvc.lock")
    try:
        with pytest.raises(ValueError, match="evaluate@student ran before models/student changed"):
            tracking.track(project)
    finally:
        (project / "dvc.lock").write_text(lock)


def test_a_stage_that_ran_before_a_file_in_its_folder_changed_is_refused(project):
    """`dvc repro evaluate@student` leaves report's dependency, the folder of all metrics, as it was."""
    lock, path = (project / "dvc.lock").read_text(), project / "reports/metrics/evaluate_student.json"
    before = path.read_text()
    path.write_text('{"accuracy": 0.1}')
    changed = (hashlib.md5(text.encode()).hexdigest() for text in (before, path.read_text()))
    document = YAML(typ="safe").load(lock.replace(*changed))
    YAML().dump(document, project / "dvc.lock")
    try:
        with pytest.raises(ValueError, match="report ran before reports/metrics changed: run `dvc repro` first"):
            tracking.track(project)
    finally:
        (project / "dvc.lock").write_text(lock)
        path.write_text(before)


def test_a_name_of_two_experiments_is_refused(project):
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=project, capture_output=True, text=True, check=True).stdout.strip()
    for baseline in ("one", "other"):
        run("git", "update-ref", f"refs/exps/{baseline}/0/twice", commit, cwd=project)
    assert tracking.track(project, "twice") == tracking.track(project, "HEAD")  # one commit, whatever it hangs on
    run(
        "git",
        "-c",
        "user.name=q2t",
        "-c",
        "user.email=q2t@example.org",
        "commit",
        "-q",
        "--allow-empty",
        "-m",
        "x",
        cwd=project,
    )
    run("git", "update-ref", "refs/exps/other/0/twice", "HEAD", cwd=project)
    run("git", "reset", "-q", "--soft", "HEAD~1", cwd=project)
    with pytest.raises(ValueError, match="'twice' is the name of 2 experiments: give one's hash"):
        tracking.track(project, "twice")
    for baseline in ("one", "other"):
        run("git", "update-ref", "-d", f"refs/exps/{baseline}/0/twice", cwd=project)


def test_unknown_revision(project):
    with pytest.raises(ValueError, match="unknown revision 'nowhere'"):
        tracking.track(project, "nowhere")


def test_timings_are_added_to_the_pipeline_run_and_stages_say_what_they_took(runs, project):
    client, _, first, _, _ = runs
    distill = client.get_run(first["hot"]).data.tags["q2t.stage.distill"]
    peak = client.get_run(distill).data.metrics["peak_memory_mb"]
    client.log_metric(distill, "seconds", 90.0)
    stages = tracking.log_timings([{"model": "student", "tokens_per_second": 80.5}], project)
    assert client.get_run(tracking.track(project)).data.metrics["measured.student.tokens_per_second"] == 80.5
    # The others never showed themselves here, as if DVC had restored them.
    assert stages == [{"stage": "distill", "minutes": 1.5, "peak_memory_mb": peak}]
    assert peak > 20
    adopted = client.get_run(distill)
    again = client.create_run(adopted.info.experiment_id, tags={"q2t.inputs": adopted.data.tags["q2t.inputs"]}).info
    for name, value in {"seconds": 30.0, "peak_memory_mb": 100.0}.items():
        client.log_metric(again.run_id, name, value)
    client.set_tag(again.run_id, "mlflow.runName", "distill")
    client.set_terminated(again.run_id)  # `dvc repro --force`, to the same bytes
    stages = tracking.log_timings([], project)
    client.delete_run(again.run_id)
    assert stages == [{"stage": "distill", "minutes": 0.5, "peak_memory_mb": 100.0}]


def test_stages_of_an_experiment_took_what_their_newest_runs_did(runs, project):
    client, _, first, _, _ = runs
    stages = read_result(project, "hot").stages
    distill = client.get_run(first["hot"]).data.tags["q2t.stage.distill"]
    client.log_metric(distill, "seconds", 90.0)
    assert tracking.minutes({"distill": stages["distill"]}, project) == 1.5
    assert tracking.minutes({name: stages[name] for name in ("distill", "pose")}, project) is None  # it never ran live


@pytest.mark.parametrize("fails", [False, True])
def test_a_stage_logs_its_time_and_peak_memory(project, fails):
    with suppress(KeyError), tracking.stage_run("pose", project) as run:
        ballast = bytearray(b"x") * 300_000_000
        time.sleep(0.3)
        del ballast
        if fails:
            raise KeyError("body")
    cost = init_store(project).client.get_run(run._id).data.metrics
    assert 0.3 <= cost["seconds"] < 60 and 300 < cost["peak_memory_mb"] <= peak_memory_mb()


@pytest.fixture
def unreachable(project, free_port, monkeypatch):
    """The project while its params.yaml names a tracking server that is down, and the server's address."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    text, uri = (project / "params.yaml").read_text(), f"http://ada:s3cret@127.0.0.1:{free_port}"
    (project / "params.yaml").write_text(text.replace("sqlite:///.q2t/mlflow.db", uri))
    yield uri.replace("ada:s3cret", "***")
    (project / "params.yaml").write_text(text)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_track_without_its_server_is_one_line(project, unreachable):
    command = [sys.executable, "-m", "q2t.cli", "track"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"q2t: tracking.uri {unreachable}: no server answers: start it, or correct params.yaml\n"


def test_measure_without_its_server_warns_and_prints_still(project, unreachable, monkeypatch, capsys, caplog):
    monkeypatch.chdir(project)
    measured = {"model": "student", "tokens_per_second": 80.5, "first_token_ms": 40.2, "peak_memory_mb": 697.4}
    monkeypatch.setattr("q2t.evaluation.cost.measure", lambda root: [measured])
    began = time.monotonic()
    assert cli.main(["measure"]) == 0
    assert time.monotonic() - began < 60  # MLflow's own retries would take minutes
    assert "80.5" in capsys.readouterr().out
    (warning,) = caplog.messages
    assert unreachable in warning and "no server answers" in warning
    assert json.loads((project / "reports/timings.json").read_text())["stages"] == []


def test_queued_experiments_write_into_the_repository_they_came_from(project, tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.setenv("DVC_ROOT", str(project))
    store = init_store(tmp_path)
    assert store.experiment == init_store(project).experiment
    assert not (tmp_path / ".q2t").exists()


def test_a_deleted_experiment_is_one_line(project, tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text(PARAMS.replace("experiment: q2t", "experiment: gone"))
    monkeypatch.setenv("DVC_ROOT", str(project))
    store = init_store(tmp_path)
    store.client.delete_experiment(store.experiment)
    with pytest.raises(ValueError, match=f"'gone' was deleted in MLflow: .*restore -x {store.experiment}`, or name"):
        init_store(tmp_path)


def test_what_mlflow_says_hides_the_password(runs, project, monkeypatch, caplog):
    def fails(*_):
        raise MlflowException("API request to http://ada:s3cret@host:5000/api failed\nand more")

    with spared("metrics"):
        fails()
    assert "MLflow does not show metrics" in caplog.text and "http://***@host:5000/api" in caplog.text
    assert "s3cret" not in caplog.text
    monkeypatch.setattr(tracking, "_find", fails)
    with pytest.raises(ValueError, match=r"^MLflow: API request to http://\*\*\*@host:5000/api failed$"):
        tracking.track(project)


def test_a_store_that_is_broken_warns_and_costs_nothing(tmp_path, caplog):
    (tmp_path / "params.yaml").write_text('tracking: {uri: "sqlite:///params.yaml", experiment: q2t}')
    done = []
    with caplog.at_level(logging.WARNING), tracking.stage_run("distill", tmp_path) as run:
        run.metrics({"loss": 1.0})
        run.curve(tmp_path / "missing.csv")
        done.append(True)
    assert done and "MLflow does not show the start of distill" in caplog.text


def test_the_exception_of_the_body_passes_through_and_fails_the_run(project):
    with pytest.raises(KeyError, match="body"), tracking.stage_run("distill", project) as run:
        run.curve(project / "missing.csv")  # only a warning
        raise KeyError("body")
    store = init_store(project)
    failed = store.client.search_runs([store.experiment], "attributes.status = 'FAILED'")
    assert "distill" in {r.info.run_name for r in failed}


def test_flatten_keeps_finite_numbers_only():
    values = {"a": {"b": 1, "c": float("nan")}, "d": True, "e": [1], "f@g": 2.5, "h": None, "models/i/": 3}
    assert flatten(json.loads(json.dumps(values))) == {"a.b": 1.0, "f:g": 2.5, "models:i:": 3.0}
