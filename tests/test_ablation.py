"""The list of experiments: each changes parameters that exist, and its result becomes a row of a table."""

import hashlib
import json
import subprocess
import sys
from functools import reduce
from itertools import cycle
from operator import getitem
from pathlib import Path

import pytest
from dvc.repo import Repo
from filelock import FileLock
from ruamel.yaml import YAML

from q2t import ablation
from q2t.config import Params
from q2t.lockfile import lookup

EACH = pytest.mark.parametrize("experiment", ablation.experiments(), ids=lambda each: each.name)


PRESENT = YAML(typ="safe").load(Path("params.yaml"))


@EACH
def test_an_experiment_changes_valid_parameters(experiment):
    changed = experiment.changed(PRESENT)
    for key, value in experiment.changes.items():
        *path, last = key.removeprefix("+").split(".")
        assert (last in reduce(getitem, path, PRESENT)) != key.startswith("+"), key
        assert lookup(changed, key.removeprefix("+")) == value != lookup(PRESENT, key)
    assert experiment.target.removeprefix("evaluate@") in Params.model_validate(changed).evaluate.models


def test_controls_learn_from_equally_many_rows_and_sizes_from_all():
    alike = ablation.experiments("controls") + ablation.experiments("methods")
    assert len({each.changes["filter.max_rows"] for each in alike}) == 1
    assert all(list(each.changes) == ["prune.intermediate"] for each in ablation.experiments("sizes"))


def test_names_stay_apart_as_references_and_files():
    references = [each.reference for each in ablation.experiments()]
    assert len(set(references)) == len(references)
    assert all(reference.replace("-", "").isalnum() for reference in references)


def test_the_command_is_one_that_dvc_reads():
    changes = {"distill.alpha": 0.0, "+teachers.x": {"model": "models/teacher", "samples": 1}, "filter.teachers": ["x"]}
    changes |= {"distill.phases": [{"alpha": 1.0}, {"share": 0.1}]}
    words = ablation.Experiment("no labels", "evaluate@pruned", "prune", "models/student", changes).command
    assert words[:6] == ["dvc", "exp", "run", "--temp", "--name", "ablation-no-labels"]
    assert words[-1] == "evaluate@pruned"
    from dvc.utils.hydra import to_hydra_overrides

    assert to_hydra_overrides(words[7:-1:2])
    assert words[7:-1:2] == [
        "distill.alpha=0.0", '+teachers.x={model:"models/teacher",samples:1}', 'filter.teachers=["x"]',
        "distill.phases=[{alpha:1.0},{share:0.1}]",
    ]  # fmt: skip


def test_an_unknown_name_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"no ablation \['nothing'\]: there are default"):
        ablation.run(["default", "nothing"])


def write(root, group, **accuracies):
    """Results from the present models, problems and settings, and the dvc.lock and params.yaml that name these."""
    outs = [{"path": path, "md5": path} for path in ("models/teacher", "models/untrained", "models/student")]
    deps = [{"path": "data/prompts/test.jsonl", "md5": "asked"}, *outs]
    stages = {f"evaluate@{model}": {"cmd": "python", "deps": deps} for model in ("student", "pruned", "int8")}
    YAML().dump({"stages": {"all": {"outs": outs}, **stages}}, root / "dvc.lock")
    YAML().dump(PRESENT, root / "params.yaml")
    for each in ablation.experiments(group):
        if each.slug.replace("-", "_") in accuracies:
            accuracy = accuracies[each.slug.replace("-", "_")]
            row = {"rows": 7, "accuracy": accuracy, "interval": [0.2, 0.6], "retention": accuracy}
            row |= {"parameters": 2_000_000, "bytes": 8_000_000, "started_from": each.model}
            row |= {"retention_interval": [0.3, 0.7], "minutes": 5.04, "problems": "asked"}
            row |= {"settings": {key: each.changed(PRESENT)[key] for key in ("seed", "filter", "distill", "prune")}}
            path = root / "reports/ablations" / f"{each.slug}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row))


def test_the_controls_that_were_run_in_the_order_of_the_list(tmp_path):
    write(tmp_path, "controls")
    assert ablation.controls(tmp_path) == "None of them has been run yet."
    write(tmp_path, "controls", answers_unverified=0.25, default=0.5, seed_8=0.6)
    *_, first, second, third = ablation.controls(tmp_path).splitlines()
    assert first == "| default | 7 | 50.0% (20.0–60.0%) | 50.0% (30.0–70.0%) | 5.0 |"
    assert second.startswith("| seed 8 | 7 | 60.0%")
    assert third.startswith("| answers unverified | 7 | 25.0%")


def test_a_result_of_another_teacher_is_marked(tmp_path):
    seeds = {"default": 0.5, "seed_8": 0.6, "seed_9": 0.4}
    write(tmp_path, "controls", **seeds, cross_entropy_only=0.3)
    assert ablation.FOOTNOTE not in ablation.controls(tmp_path)
    path = tmp_path / "reports/ablations/default.json"
    path.write_text(path.read_text().replace("models/teacher", "another"))
    first, second, third, *_, said = ablation.controls(tmp_path).splitlines()[2:]
    assert first.startswith("| default † |")
    assert second.startswith("| seed 8 |") and third.startswith("| seed 9 |")
    assert said == ablation.FOOTNOTE  # and no spread of seeds from two teachers
    assert [line.split(" | ")[0] for line in ablation.methods(tmp_path).splitlines()[2:4]] == [
        "| cross-entropy only",
        "| default †",
    ]


def change(path, key, value):
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {key: row[key] | value if isinstance(value, dict) else value}))


@pytest.mark.parametrize(
    "key, value", [("settings", {"filter": {"max_rows": 1}}), ("settings", {"seed": 8}), ("problems", "others")]
)
def test_a_result_of_other_settings_or_problems_is_marked(key, value, tmp_path):
    write(tmp_path, "controls", default=0.5)
    assert "| default |" in ablation.controls(tmp_path)
    change(tmp_path / "reports/ablations/default.json", key, value)
    assert "| default † |" in ablation.controls(tmp_path)


def test_a_result_is_marked_once_params_yaml_says_something_else(tmp_path):
    write(tmp_path, "controls", default=0.5, seed_8=0.5)
    params = PRESENT | {"distill": PRESENT["distill"] | {"temperature": 5.0}}
    YAML().dump(params, tmp_path / "params.yaml")
    assert ablation.controls(tmp_path).count(" † |") == 2
    YAML().dump(PRESENT | {"tracking": None}, tmp_path / "params.yaml")
    assert ablation.controls(tmp_path).count(" † |") == 0


@pytest.mark.parametrize("teachers, told", [(("another",), True), (("another", "one more"), False)])
def test_seeds_of_one_earlier_teacher_show_their_spread(teachers, told, tmp_path):
    write(tmp_path, "controls", default=0.5, seed_8=0.62, seed_9=0.44)
    for path, teacher in zip((tmp_path / "reports/ablations").glob("*.json"), cycle(teachers), strict=False):
        path.write_text(path.read_text().replace("models/teacher", teacher))
    said = "(default, seed 8, seed 9) moves accuracy between 44.0% and 62.0%" in ablation.controls(tmp_path)
    assert said == told


@pytest.mark.parametrize(
    "key, value", [("settings", {"filter": {"max_rows": 1}}), ("settings", {"distill": {}}), ("problems", "others")]
)
def test_seeds_of_other_settings_show_no_spread(key, value, tmp_path):
    write(tmp_path, "controls", default=0.5, seed_8=0.62, seed_9=0.44)
    assert "moves accuracy" in ablation.controls(tmp_path)
    change(tmp_path / "reports/ablations/seed-9.json", key, value)
    assert "moves accuracy" not in ablation.controls(tmp_path)


def test_sizes_from_another_student_are_marked(tmp_path):
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/summary.json").write_text("{}")
    write(tmp_path, "sizes", pruned_to_256=0.3)
    path = tmp_path / "reports/ablations/pruned-to-256.json"
    path.write_text(path.read_text().replace("models/student", "another"))
    *_, row, _, said = ablation.sizes(tmp_path).splitlines()
    assert row.startswith("| pruned to 256 † |") and said == ablation.FOOTNOTE


def test_the_spread_is_told_once_all_its_seeds_were_run(tmp_path):
    write(tmp_path, "controls", default=0.5, seed_8=0.62, seed_9=0.44)
    assert ablation.controls(tmp_path).splitlines()[-2:] == [
        "",
        "The order of the rows alone (default, seed 8, seed 9) moves accuracy between 44.0% and 62.0%, mean 52.0%.",
    ]


def test_methods_stand_below_the_controls_that_they_are_compared_with(tmp_path):
    write(tmp_path, "controls", default=0.5, from_the_base=0.1, seed_8=0.6, cross_entropy_only=0.45)
    assert [line.split(" | ")[0] for line in ablation.methods(tmp_path).splitlines()[2:]] == [
        "| cross-entropy only",
        "| default",
        "| seed 8",
    ]
    write(tmp_path, "methods", reverse_KL=0.55, LoRA=0.3)
    assert [line.split(" | ")[0] for line in ablation.methods(tmp_path).splitlines()[5:]] == ["| reverse KL", "| LoRA"]


def test_other_orders_stand_below_the_quickstarts_student_and_say_how_far_they_differ(tmp_path):
    model = {"accuracy": 0.9, "interval": [0.8, 1.0], "parameters": 95_700_000, "bytes": 383_000_000}
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/summary.json").write_text(json.dumps({"student": model, "pruned": model, "int8": model}))
    write(tmp_path, "seeds", student_of_seed_8=0.8)
    assert [line.split(" | ")[0] for line in ablation.seeds(tmp_path).splitlines()[2:]] == [
        "| student",
        "| student of seed 8",
        "| int8",
    ]
    write(tmp_path, "seeds", student_of_seed_9=0.7)
    said = "The order of the rows alone (student, student of seed 8, student of seed 9) moves accuracy between "
    assert ablation.seeds(tmp_path).splitlines()[-1] == said + "70.0% and 90.0%, mean 80.0%."
    write(tmp_path, "final", int8_of_seed_8=0.6, int8_of_seed_9=0.75)
    assert ablation.seeds(tmp_path).splitlines()[-3:] == [
        said + "70.0% and 90.0%, mean 80.0%.",
        "",
        said.replace("student", "int8") + "60.0% and 90.0%, mean 75.0%.",
    ]
    change(tmp_path / "reports/ablations/student-of-seed-9.json", "problems", "others")
    lines = ablation.seeds(tmp_path).splitlines()
    assert ablation.FOOTNOTE in lines and not any(line.startswith(said) for line in lines)


def test_sizes_stand_below_the_quickstarts_own_models(tmp_path):
    model = {"accuracy": 0.9, "interval": [0.8, 1.0], "retention": 1.0, "retention_interval": [0.9, 1.1]}
    model |= {"parameters": 134_500_000, "bytes": 542_000_000, "lenient": {"accuracy": 1.0}}
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/summary.json").write_text(
        json.dumps({name: model for name in ("base", "pruned", "student", "teacher", "int8")})
    )
    write(tmp_path, "sizes", pruned_to_256=0.3)
    assert ablation.sizes(tmp_path).splitlines()[2:] == [
        "| teacher | 90.0% (80.0–100.0%) | – | 134.5M | 542 MB |",
        "| student | 90.0% (80.0–100.0%) | 100.0% (90.0–110.0%) | 134.5M | 542 MB |",
        "| pruned | 90.0% (80.0–100.0%) | 100.0% (90.0–110.0%) | 134.5M | 542 MB |",
        "| pruned to 256 | 30.0% (20.0–60.0%) | 30.0% (30.0–70.0%) | 2.0M | 8 MB |",
    ]


GRAPH = """
stages:
  train:
    cmd: python train.py
    deps: [train.py]
    params: [width]
    outs: [model, reports/answers/train.jsonl, reports/answers/teacher.jsonl]
    metrics: [reports/metrics: {cache: false}]
"""
TRAIN = """
import json
from pathlib import Path

width = int(Path("params.yaml").read_text().split()[1])
assert width != 13, "a width that breaks"
with open(Path(__import__("os").environ["DVC_ROOT"]) / ".q2t/ran", "a") as ran:
    ran.write(f"{width} ")
Path("model").write_text(f"{width}")
Path("reports/metrics").mkdir(parents=True, exist_ok=True)
known = {"accuracy": width / 100, "interval": [0, 1], "parameters": width, "bytes": width, "families": {}}
for name, row in {"evaluate_train": known, "filter": {"kept": 5}}.items():
    Path(f"reports/metrics/{name}.json").write_text(json.dumps(row))
Path("reports/answers").mkdir(exist_ok=True)
for name, right in {"train": width // 10, "teacher": 8 * (width != 14)}.items():
    rows = [{"domain": "target", "family": "led", "problem_id": str(n), "correct": n < right} for n in range(10)]
    Path(f"reports/answers/{name}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""
PARAMS = """width: 1
seed: 7
evaluate: {resamples: 100, confidence: 0.9}
tracking: {uri: "sqlite:///.q2t/mlflow.db", experiment: q2t}
"""
LISTED = """
sizes:
  training: train
  target: train
  model: model
  everywhere: {}
  experiments: {a 13: {width: 13}, a 14: {width: 14}, a 40: {width: 40}}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A graph of one stage, committed, and three experiments: one that fails, one whose teacher does, a good one."""
    ignored = "/.q2t\n/model\n/reports/answers\n"
    files = {"dvc.yaml": GRAPH, "train.py": TRAIN, "params.yaml": PARAMS, ".gitignore": ignored}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    listed = tmp_path / ".git/listed.yaml"
    for command in (
        ["git", "init", "-q"],
        ["git", "config", "user.name", "q2t"],
        ["git", "config", "user.email", "q2t@example.org"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    Repo.init(str(tmp_path)).close()
    for command in (["git", "add", "-A"], ["git", "commit", "-qm", "list"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    listed.write_text(LISTED)
    monkeypatch.setattr(ablation, "LIST", listed)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    return tmp_path


def test_one_that_fails_stops_no_other_and_nothing_stays_but_results(project):
    for _ in range(2):
        with pytest.raises(ValueError, match="run `q2t ablate 'a 13' 'a 14'` again"):
            ablation.run(root=project)
    assert (project / ".q2t/ran").read_text() == "14 40 "  # the second time it came out of DVC's cache
    row = json.loads((project / "reports/ablations/a-40.json").read_text())
    assert (row["accuracy"], row["retention"], row["rows"], row["bytes"]) == (0.4, 0.5, 5, 40)
    assert (row["settings"], row["problems"]) == ({"width": 40}, None)
    low, high = row["retention_interval"]
    assert low < 0.5 < high and row["minutes"] is None  # its stage shows itself nowhere
    assert [path.name for path in (project / "reports/ablations").iterdir()] == ["a-40.json"]
    refs = subprocess.run(["git", "for-each-ref", "refs/exps"], cwd=project, capture_output=True, text=True, check=True)
    assert refs.stdout == ""
    assert [path.name for path in (project / ".dvc/tmp/exps/standalone").iterdir()] == ["run"]


@pytest.mark.parametrize("evaluated, tokens, fits", [("one", 60, True), ("another", 60, False), ("one", 160, False)])
def test_a_teacher_that_was_not_evaluated_as_the_student_is_refused(evaluated, tokens, fits, tmp_path):
    """An experiment runs up to its target, and `evaluate@teacher` is not on the way there."""

    def entry(model: str, md5: str, most: int) -> dict:
        deps = [{"path": model, "md5": md5}, {"path": "data/prompts/test.jsonl", "md5": "test"}]
        return {
            "cmd": "python",
            "deps": deps,
            "params": {"params.yaml": {"evaluate.max_new_tokens": most, "teachers": {}}},
        }

    stages = {
        "specialize": {"outs": [{"path": "models/teacher", "md5": "one"}]},
        "evaluate@teacher": entry("models/teacher", evaluated, tokens),
        "evaluate@student": entry("models/student", "any", 60),
    }
    stages["evaluate@student"]["params"]["params.yaml"]["teachers"] = {"lessons": "more"}  # what it changes itself
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    Repo.init(str(tmp_path)).close()
    for model, right in {"student": 6, "teacher": 8}.items():
        rows = [{"domain": "target", "family": "led", "problem_id": str(n), "correct": n < right} for n in range(10)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        md5 = hashlib.md5(text.encode()).hexdigest()
        stages[f"evaluate@{model}"]["outs"] = [{"path": f"reports/answers/{model}.jsonl", "md5": md5}]
        path = tmp_path / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        path.parent.mkdir(parents=True)
        path.write_text(text)
    stages["distill"] = {"cmd": "python", "deps": []}
    # Of an earlier graph: dvc.lock keeps it.
    stages["distill@gone"] = {
        "outs": [{"path": "models/student/old", "md5": "gone"}],
        "params": {"params.yaml": {"teachers.gone": 1, "evaluate.max_new_tokens": 9}},
    }
    known = {"accuracy": 0.6, "interval": [0, 1], "parameters": 1, "bytes": 4, "families": {}}
    (tmp_path / "reports/metrics").mkdir(parents=True)
    for name, row in {"evaluate_student": known, "filter": {"kept": 5}}.items():
        (tmp_path / f"reports/metrics/{name}.json").write_text(json.dumps(row))
    YAML().dump({"stages": stages}, tmp_path / "dvc.lock")
    asked = PARAMS.replace("{resamples", "{max_new_tokens: 60, resamples")
    (tmp_path / "params.yaml").write_text(asked + "teachers: {lessons: more}\n")
    commit = ["git", "-c", "user.name=q2t", "-c", "user.email=q2t@example.org", "commit", "-qm", "ran"]
    for command in (["git", "add", "-A"], commit, ["git", "branch", "ablation-hot"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    changes = {"+teachers.lessons": "more"}
    experiment = ablation.Experiment("hot", "evaluate@student", "distill", "models/teacher", changes)
    if fits:
        row = ablation.result(experiment, tmp_path)
        assert (row["retention"], row["started_from"], row["problems"]) == (pytest.approx(0.75), "one", "test")
        assert row["settings"] == {"evaluate.max_new_tokens": 60, "teachers": {"lessons": "more"}}
    else:
        with pytest.raises(ValueError, match="evaluate@teacher was asked otherwise, or of another teacher: run `dvc"):
            ablation.result(experiment, tmp_path)


def test_a_name_as_its_file_has_it(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(ablation, "_succeeds", lambda each, root: not chosen.append(each.name))
    ablation.run(["pruned-to-384"], root=tmp_path)
    assert chosen == ["pruned to 384"]


def test_two_at_a_time_are_refused(tmp_path):
    (tmp_path / ".q2t").mkdir()
    with FileLock(tmp_path / ".q2t/ablate.lock"), pytest.raises(ValueError, match="another `q2t ablate` is running"):
        ablation.run(root=tmp_path)
