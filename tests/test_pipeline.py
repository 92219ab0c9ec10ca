"""The real thing: `dvc repro` of the smoke profile, in a temporary copy of the repository."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from endpoint import chat, serving
from ruamel.yaml import YAML
from smoke import Stages, copy, environment, run

from q2t.capability.families import make_families
from q2t.distillation import labels
from q2t.records import Problem, read_jsonl


def locked(folder: Path) -> dict:
    return YAML(typ="safe").load(folder / "dvc.lock")["stages"]


def outs(folder: Path) -> dict[str, str]:
    return {out["path"]: out["md5"] for stage in locked(folder).values() for out in stage.get("outs", [])}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = copy(tmp_path_factory.mktemp("first"))
    listed = folder / "q2t/ablations.yaml"  # of problems that the pipeline has answers to, and fewer rows
    text = listed.read_text().replace("capability.questions: 30", "capability.questions: 60")
    listed.write_text(text.replace("filter.max_rows: 200", "filter.max_rows: 40"))
    assert "| int8 |" in run(folder, "dvc", "repro")  # it ends with the table
    run(folder, "q2t", "track")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "run")
    return folder


def test_the_pipeline_learns_and_leaves_git_clean(first):
    assert run(first, "git", "status", "--porcelain") == ""
    summary = json.loads((first / "reports/summary.json").read_text())
    assert set(summary) == {"base", "teacher", "untrained", "student", "pruned", "onnx", "int8"}
    assert summary["base"]["accuracy"] == 0
    assert summary["teacher"]["accuracy"] > 0.2
    assert summary["student"]["accuracy"] > summary["untrained"]["accuracy"]
    assert summary["pruned"]["parameters"] < summary["student"]["parameters"] < summary["teacher"]["parameters"]
    assert summary["int8"]["bytes"] < summary["onnx"]["bytes"]
    for figure in ("accuracy", "interval", "retention", "families", "embedding_parameters", "forgetting"):
        assert all(figure in model for model in summary.values())
    page = (first / "reports/index.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_int8_student_answers(first):
    command = [sys.executable, "-m", "q2t.cli", "ask", "Read the colour code green blue brown."]
    done = subprocess.run(command, cwd=first, env=environment(first), stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip()


def test_measure_prints_and_keeps_what_models_and_stages_cost(first):
    others = [first / "models" / name for name in ("sources/tiny", "teacher", "untrained", "pruned", "onnx")]
    for folder in others:  # one of each engine will do
        (folder / "config.json").rename(folder / "away")
    try:
        said = run(first, "q2t", "measure")
    finally:
        for folder in others:
            (folder / "away").rename(folder / "config.json")
    found = json.loads((first / "reports/timings.json").read_text())
    assert [row["model"] for row in found["models"]] == ["student", "int8"]
    assert all(row["tokens_per_second"] > 0 for row in found["models"])
    assert {row["stage"] for row in found["stages"]} == set(locked(first))
    assert "skipped teacher: there is no model" in said and all(name in said for name in locked(first))
    assert run(first, "git", "status", "--porcelain") == ""


def test_a_second_repro_runs_nothing(first):
    start = time.monotonic()
    assert "Running stage" not in run(first, "dvc", "repro")
    # Five seconds on an idle machine; a busy one gets slack, a stage that runs would take longer still.
    assert time.monotonic() - start < 20


def test_a_second_copy_gives_the_same_bytes(first, tmp_path):
    """In another folder, and in forks instead of new processes; DVC takes the hashes, and runs the report, which
    shows them."""
    second = Stages(copy(tmp_path / "second"), tmp_path / "log")
    *computed, report = second.commands
    for stage in computed:
        second.finish(stage)
    run(second.folder, "dvc", "commit", "-f", *computed)
    assert run(second.folder, "dvc", "repro").count("Running stage") == 1
    assert report == "report" and outs(second.folder) == outs(first)


def test_what_was_generated_before_is_found_when_its_out_is_deleted(first):
    out = "data/generations/expert.jsonl"
    written, params = (first / out).read_bytes(), (first / "params.yaml").read_text()
    (first / out).unlink()
    script = (
        f"import sys; from q2t.stage import published; sys.stdout.write(published({out!r}, needed=False).read_text())"
    )
    try:
        assert run(first, "python", "-c", script).encode() == written
        bare = (
            f"from q2t import lockfile, stage; lockfile.cached = lambda *_: None; stage.published({out!r}, needed=True)"
        )
        done = subprocess.run([sys.executable, "-c", bare], cwd=first, capture_output=True, text=True)
        assert f"its answers would be paid for again: `dvc pull {out}` first" in done.stderr
        more = params.replace("samples: 2,", "samples: 3,", 1)
        assert more != params
        (first / "params.yaml").write_text(more)
        done = subprocess.run([sys.executable, "-c", bare], cwd=first, capture_output=True, text=True)
        assert "would be paid for again" in done.stderr  # the first two of each question
        (first / "params.yaml").write_text(params.replace("seed: 7", "seed: 8", 1))
        run(first, "python", "-c", bare)  # other questions, which nobody has answered yet
    finally:
        (first / "params.yaml").write_text(params)
        (first / out).write_bytes(written)


def test_a_teacher_beside_is_mixed_into_what_the_other_wrote(first):
    """By hand, so that dvc.lock and the cache stay as they were."""
    import pyarrow.parquet as pq

    out, before = first / "data/soft_labels/labels.parquet", (first / "params.yaml").read_text()
    alone = pq.read_table(out)
    try:
        (first / "params.yaml").write_text(before.replace("beside: {}", "beside: {models/sources/tiny: 0.25}"))
        run(first, "python", "-m", "stages.label")
        mixed = pq.read_table(out)
    finally:
        (first / "params.yaml").write_text(before)
        run(first, "dvc", "checkout", "--force", "label")
        run(first, "git", "checkout", "reports")
    assert b"teacher.expert+0.25 models/sources/tiny" in mixed.schema.metadata.keys() - alone.schema.metadata.keys()
    assert mixed["input_ids"] == alone["input_ids"] and mixed["tail_logprob"] != alone["tail_logprob"]
    assert pq.read_table(out) == alone and run(first, "git", "status", "--porcelain") == ""


def test_an_endpoint_is_asked_once_and_learnt_from_by_its_words(first, monkeypatch):
    """By hand, as above; it gives the worked solutions."""
    before = (first / "params.yaml").read_text()
    (family,) = make_families(["bands"], [])
    solutions = {
        problem.question: "<think>{}</think><answer>{}</answer>".format(*family.solve(problem.inputs))
        for problem in read_jsonl(first / "data/prompts/questions.jsonl", Problem)
    }
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        with serving() as server:
            server.script = lambda request, _: chat(solutions[request["messages"][-1]["content"]])
            (first / "models/gpt").mkdir()
            (first / "models/gpt/pointer.json").write_text(json.dumps({"base_url": server.url, "model": "gpt"}))
            answers_it = before.replace("model: models/teacher,", "model: models/gpt,", 1)
            assert answers_it != before
            (first / "params.yaml").write_text(answers_it)
            run(first, "python", "-m", "stages.generate", "expert")
            asked, out = len(server.requests), first / "data/generations/expert.jsonl"
            assert asked == len(out.read_text().splitlines()) == 2 * len(solutions)
            out.unlink()  # as DVC does
            run(first, "python", "-m", "stages.generate", "expert")
            assert len(server.requests) == asked == len(out.read_text().splitlines())
        run(first, "python", "-m", "stages.filter")
        run(first, "python", "-m", "stages.label")
        rows = labels.read(first / "data/soft_labels/labels.parquet")
        assert len(rows) == len(solutions) and not any(len(row.top_ids) for row in rows)
        mixed = answers_it.replace("beside: {}", "beside: {models/sources/tiny: 0.25}")
        (first / "params.yaml").write_text(mixed)
        done = subprocess.run([sys.executable, "-m", "stages.label"], cwd=first, capture_output=True, text=True)
        assert "label.beside has no effect" in done.stderr
    finally:
        (first / "params.yaml").write_text(before)
        shutil.rmtree(first / "models/gpt")
        run(first, "dvc", "checkout", "--force", "generate@expert", "filter", "label")
        run(first, "git", "checkout", "reports")
    assert run(first, "git", "status", "--porcelain") == ""


def test_every_stage_shows_itself_with_its_inputs(first):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{first}/.q2t/mlflow.db")
    (experiment,) = [each for each in client.search_experiments() if each.name == "q2t"]
    stages = client.search_runs([experiment.experiment_id], "tags.`q2t.kind` = 'stage'")
    assert {each.info.run_name for each in stages} >= locked(first).keys()
    assert [each.info.run_name for each in stages if "q2t.inputs" not in each.data.tags] == []


def test_an_ablation_leaves_a_row_for_the_table_and_the_workspace_as_it_was(first):
    before = locked(first)
    said = run(first, "q2t", "ablate", "lessons instead of answers")
    row = json.loads((first / "reports/ablations/lessons-instead-of-answers.json").read_text())
    assert row["changes"]["filter.teachers"] == ["lessons", "base"]
    assert f"| lessons instead of answers | {row['rows']} |" in said
    assert row["rows"] == 40  # max_rows of the 300 lessons
    assert locked(first) == before
    (first / "reports/ablations/lessons-instead-of-answers.json").unlink()
    assert run(first, "git", "status", "--porcelain") == ""


def test_another_temperature_reruns_only_what_follows(first):
    before = locked(first)
    ran = run(first, "dvc", "exp", "run", "-S", "distill.temperature=4")
    run(first, "q2t", "track")
    stages = {line.split("'")[1] for line in ran.splitlines() if line.startswith("Running stage")}
    assert stages == {
        "distill", "prune", "export", "evaluate@student", "evaluate@pruned", "evaluate@onnx", "evaluate@int8", "report",
    }  # fmt: skip
    assert locked(first)["label"] == before["label"]

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{first}/.q2t/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "q2t"]
    rows = client.search_runs([experiment.experiment_id], "tags.`q2t.kind` = 'pipeline'")
    assert len(rows) == 2
    one, other = (row.data.params for row in rows)
    assert {key for key in one if one[key] != other[key]} == {"distill.temperature"}
    assert all("student.accuracy" in row.data.metrics for row in rows)


def test_repro_at_an_older_commit_restores_its_results(first):
    hotter = (first / "models/student/model.safetensors").read_bytes()
    run(first, "git", "commit", "-qam", "hotter")
    run(first, "git", "checkout", "-q", "HEAD~1")
    assert "temperature: 4" not in (first / "params.yaml").read_text()
    assert "Running stage" not in run(first, "dvc", "repro")
    assert (first / "models/student/model.safetensors").read_bytes() != hotter
    assert "up to date" in run(first, "dvc", "status")
    assert run(first, "git", "status", "--porcelain") == ""
