"""What the README's section Pull says, on a small repository with this one's settings and a folder as its remote."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

STAGE = """\
import sys
from pathlib import Path

version = Path("params.yaml").read_text()
for out in sys.argv[1:]:
    Path(out).mkdir(parents=True)
    Path(out, "model.onnx").write_bytes(f"weights {version}".encode() * 1000)
    Path(out, "config.json").write_text("{}")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a command in a folder, with DVC's and git's own settings out of the way."""
    site = tmp_path_factory.mktemp("site")
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(site),
        "GIT_CONFIG_GLOBAL": os.devnull,
    }

    def run(folder: Path, *command: str) -> str:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, run) -> tuple[Path, dict[str, dict[str, bytes]]]:
    """A repository that registered one version of the student and then pushed another, and both versions' files."""
    folder = tmp_path_factory.mktemp("shared")
    graph = YAML(typ="safe").load(ROOT / "dvc.yaml")
    outs = [graph["artifacts"]["student"]["path"], "data/prompts"]
    stage = {"cmd": f"python stage.py {' '.join(outs)}", "deps": ["stage.py"], "params": ["seed"], "outs": outs}
    run(folder, "git", "init", "-q")
    run(folder, "git", "config", "user.name", "q2t")
    run(folder, "git", "config", "user.email", "q2t@example.org")
    run(folder, "dvc", "init", "-q")
    for name in (".dvc/config", ".gitignore"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "stage.py").write_text(STAGE)
    YAML().dump({"artifacts": graph["artifacts"], "stages": {"make": stage}}, folder / "dvc.yaml")
    run(folder, "dvc", "remote", "add", "-d", "storage", str(tmp_path_factory.mktemp("storage")))
    versions = {}
    for version in ("v0.1.0", "v0.2.0"):
        (folder / "params.yaml").write_text(f"seed: '{version}'\n")
        run(folder, "dvc", "repro")
        run(folder, "git", "add", "-A")
        run(folder, "git", "commit", "-qm", version)
        run(folder, "gto", "register", "student", "--version", version)
        run(folder, "dvc", "push")
        versions[version] = contents(folder / outs[0])
    assert versions["v0.1.0"] != versions["v0.2.0"]
    shutil.rmtree(folder / ".dvc/cache")  # from here on the remote is the only place that has both
    assert run(folder, "git", "tag").split() == ["student@v0.1.0", "student@v0.2.0"]
    return folder, versions


@pytest.fixture
def clone(shared, run, tmp_path) -> Path:
    run(tmp_path, "git", "clone", "-q", str(shared[0]), "clone")
    assert not (tmp_path / "clone/models").exists()
    return tmp_path / "clone"


def test_pull_brings_all_data_and_models_of_a_commit(shared, clone, run):
    run(clone, "dvc", "pull")
    for part in ("data", "models"):
        assert contents(clone / part) == contents(shared[0] / part) != {}
    assert run(clone, "git", "status", "--porcelain") == ""


def test_a_clone_goes_on_without_running_or_pulling_what_is_up_to_date(clone, run):
    assert "Running stage" not in run(clone, "dvc", "repro", "--pull", "--allow-missing")
    assert not (clone / "models").exists()


def test_get_brings_one_model_without_a_clone(shared, run, tmp_path):
    folder, versions = shared
    run(tmp_path, "dvc", "get", folder.as_uri(), "models/int8", "-o", "student")
    assert contents(tmp_path / "student") == versions["v0.2.0"]


def test_a_version_is_a_tag_that_brings_its_own_bytes(shared, run, tmp_path):
    folder, versions = shared
    run(tmp_path, "dvc", "artifacts", "get", folder.as_uri(), "student", "--rev", "v0.1.0", "-o", "student")
    assert contents(tmp_path / "student") == versions["v0.1.0"]
