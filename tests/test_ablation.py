"""The list of controls: each changes parameters that exist, and its result becomes a row of the table."""

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from q2t import ablation
from q2t.config import Params

EACH = pytest.mark.parametrize("name", ablation.experiments())


@EACH
def test_an_experiment_changes_valid_parameters(name):
    params = YAML(typ="safe").load(Path("params.yaml"))
    before = json.dumps(params)
    for key, value in ablation.experiments()[name].items():
        *path, last = key.removeprefix("+").split(".")
        section = params
        for part in path:
            section = section[part]
        assert (last in section) != key.startswith("+"), key
        section[last] = value
    Params.model_validate(params)
    assert json.dumps(params) != before


def test_names_stay_apart_as_references_and_files():
    references = [ablation.command(name, {})[5] for name in ablation.experiments()]
    assert len(set(references)) == len(references)
    assert all(reference.replace("-", "").isalnum() for reference in references)


def test_the_command_is_one_that_dvc_reads():
    changes = {"distill.alpha": 0.0, "+teachers.x": {"model": "models/teacher", "samples": 1}, "filter.teachers": ["x"]}
    words = ablation.command("no labels", changes)
    assert words[:6] == ["dvc", "exp", "run", "--temp", "--name", "ablation-no-labels"]
    assert words[-1] == "evaluate@student"
    from dvc.utils.hydra import to_hydra_overrides

    assert to_hydra_overrides(words[7:-1:2])
    assert words[7:-1:2] == [
        "distill.alpha=0.0", '+teachers.x={model:"models/teacher",samples:1}', 'filter.teachers=["x"]'
    ]  # fmt: skip


def test_an_unknown_name_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"no ablation \['nothing'\]: there are default"):
        ablation.run(["default", "nothing"])


def test_the_table_has_what_was_run_in_the_order_of_the_list(tmp_path):
    for name, accuracy in (("answers unverified", 0.25), ("default", 0.5)):
        row = {"name": name, "rows": 7, "accuracy": accuracy, "interval": [0.2, 0.6], "retention": accuracy}
        path = tmp_path / "reports/ablations" / f"{name.replace(' ', '-')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row))
    *_, first, second = ablation.markdown_table(tmp_path).splitlines()
    assert first == "| default | 7 | 50.0% (20.0–60.0%) | 50.0% |"
    assert second.startswith("| answers unverified | 7 | 25.0%")
