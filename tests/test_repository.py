"""Guards of the house: the graph names what shapes its bytes, git and DVC share the files, versions fit."""

import ast
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
from dvc.repo import Repo
from dvc.stage import PipelineStage
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
# Their effect is in the tracked parameters, or in nothing that a stage writes for another one.
EXEMPT = {"q2t/config/__init__.py", "q2t/config/training.py", "q2t/tracking.py", "q2t/stage.py"}


def git(*arguments: str, stdin: str = "") -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, input=stdin, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def stages() -> list[PipelineStage]:
    """The stages of dvc.yaml as DVC resolves them: one for each item of a matrix."""
    with Repo(ROOT) as repo:
        found = [stage for stage in repo.index.stages if isinstance(stage, PipelineStage)]
    assert found, "dvc.yaml has no stages"
    return found


@cache
def imported(file: Path, root: Path) -> set[str]:
    """The files of q2t that running `file`, functions included, imports; enclosing packages too."""
    package = file.relative_to(root).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            for depth in range(1, len(parts) + 1) if parts[0] == "q2t" else ():
                path = Path(*parts[:depth])
                for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                    if (root / candidate).is_file():
                        found.add(candidate.as_posix())
    return found


def closure(stage: str, root: Path = ROOT) -> set[str]:
    """What of q2t shapes the bytes that a stage writes: the modules that it reaches, and their templates."""
    reached: set[str] = set()
    waiting = {f"stages/{stage}.py"}
    while waiting:
        file = waiting.pop()
        reached.add(file)
        waiting |= imported(root / file, root) - EXEMPT - reached
    templates = {t.relative_to(root).as_posix() for f in reached for t in (root / f).parent.glob("*.j2")}
    return {file for file in reached | templates if file.startswith("q2t/") and not only_says(root / file)}


@cache
def only_says(file: Path) -> bool:
    """True for an __init__.py that is empty but for a docstring: nothing in it can change a byte."""
    if file.name != "__init__.py":
        return False
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def inside(folder: str) -> list[str]:
    """The files of a package that is declared whole, less those that only say something."""
    files = [f for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".j2") and not only_says(f)]
    return [file.relative_to(ROOT).as_posix() for file in files]


def test_every_stage_declares_the_modules_that_shape_its_bytes(stages):
    wrong = set()
    for stage in stages:
        name = stage.name.split("@")[0]
        declared = {
            file
            for dep in stage.deps
            if dep.def_path.startswith("q2t/")
            for file in ([dep.def_path] if (ROOT / dep.def_path).is_file() else inside(dep.def_path))
        }
        needed = closure(name)
        if missing := needed - declared:
            wrong.add(f"{name} lacks {', '.join(sorted(missing))}")
        if superfluous := declared - needed:
            wrong.add(f"{name} does not import {', '.join(sorted(superfluous))}")
    assert not wrong, "deps in dvc.yaml:\n" + "\n".join(sorted(wrong))


def test_stages_that_several_processes_run_declare_how_these_are_started():
    graph = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    launched = {name for name, stage in graph.items() if stage.get("cmd", "").startswith("${launch} ")}
    assert launched == {name for name, stage in graph.items() if "q2t/launch" in stage.get("deps", [])}
    assert launched == {"specialize", "distill", "prune"}


def test_a_stage_has_one_name(stages):
    for stage in stages:
        name = stage.name.split("@")[0]
        assert re.match(rf"python -m stages\.{name}( |$)", stage.cmd), stage.cmd
        assert f"stages/{name}.py" in {dep.def_path for dep in stage.deps}, stage.name
    assert {stage.name.split("@")[0] for stage in stages} == {file.stem for file in (ROOT / "stages").glob("[!_]*.py")}


def test_closure_follows_functions_packages_and_templates_but_not_the_exempt(tmp_path):
    tree = {
        "stages/write.py": "def main():\n    from q2t.page import render\n    import q2t.config\n",
        "q2t/__init__.py": '"""Says what it is."""\n',
        "q2t/config/__init__.py": "import q2t.unseen\n",
        "q2t/unseen.py": "",
        "q2t/page/__init__.py": "from q2t import records\n",
        "q2t/page/render.py": "from . import chart\nfrom ..records import Row\nimport json\n",
        "q2t/page/chart.py": "",
        "q2t/page/page.html.j2": "",
        "q2t/records.py": "",
    }
    for name, text in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert closure("write", tmp_path) == {
        "q2t/page/__init__.py",
        "q2t/page/render.py",
        "q2t/page/chart.py",
        "q2t/page/page.html.j2",
        "q2t/records.py",
    }


def test_git_ignores_what_dvc_caches_and_nothing_else_that_stages_write(stages):
    outs = {out.def_path: out.use_cache for stage in stages for out in stage.outs}
    ignored = set(git("check-ignore", "--stdin", stdin="\n".join(outs)))
    assert {out for out, cached in outs.items() if cached} == ignored


REGISTRY = r"(pypi|pythonhosted)\.org|download\.pytorch|https?://[\w.:-]+/(simple|packages)/"
HOME = r"(?<![\w.])/(home|root|Users)/\w"


def test_no_file_names_a_registry_host_or_a_place_on_this_machine():
    private = re.compile(f"{REGISTRY}|{HOME}|{re.escape(str(ROOT))}")
    files = [ROOT / name for name in git("ls-files", "-co", "--exclude-standard")]
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for file in files
        if file.is_file()
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if private.search(line)
    ]
    assert not found, "\n".join(found)


def test_lock_is_exact_and_satisfies_pyproject():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {}
    for line in lines:
        if not line.startswith("#"):
            name, version = line.split("==")
            locked[canonicalize_name(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"])
    unmet = [str(w) for w in wanted if locked.get(canonicalize_name(w.name), "0") not in w.specifier]
    assert not unmet, f"requirements.lock does not satisfy {unmet}"
