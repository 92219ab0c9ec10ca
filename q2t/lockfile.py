"""A result as DVC recorded it: params.yaml, dvc.lock and the small files that git holds, of any commit."""

import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARAMS, LOCK, SUMMARY = "params.yaml", "dvc.lock", "reports/summary.json"
Reader = Callable[[str], str]
Entry = dict[str, Any]
"""One stage in dvc.lock: cmd, deps, params, outs."""


@dataclass(frozen=True)
class Result:
    """What one run of the pipeline came to."""

    params: dict[str, Any]
    """All of params.yaml but `tracking`: where a result is shown is no part of it."""
    stages: dict[str, Entry]
    files: dict[str, str]
    """The text of the summary, the metrics and, where DVC's cache has them, the curves."""
    commit: str | None
    """The commit that holds this dvc.lock; None if the workspace's is not committed."""

    @property
    def key(self) -> str:
        """SHA-256 of the stages and the parameters."""
        return digest([self.stages, self.params])


def read_result(root: Path, rev: str | None = None) -> Result:
    """The result in the workspace, or at a commit, tag, branch or DVC experiment.

    Raises:
        ValueError: the revision is unknown, a file is missing, or the files belong to different results.
    """
    commit = _known(root, rev) if rev else _commit(root, "HEAD")
    read = _reader(root, commit if rev else None)
    params, locked = read_yaml(read(PARAMS), PARAMS), read_yaml(read(LOCK), LOCK)["stages"]
    params.pop("tracking", None)
    stages = {}
    for name in _stage_names(root, commit if rev else None):  # dvc.lock keeps stages of earlier graphs
        if name not in locked:
            raise ValueError(f"{name} has not run: run `dvc repro` first")
        stages[name] = locked[name]
    if commit and _git(root, "show", f"{commit}:./{LOCK}") != read(LOCK):
        commit = None
    return Result(params, stages, _files(root, params, stages, read), commit)


def read_files(root: Path, rev: str, paths: dict[str, str]) -> dict[str, str]:
    """The text of files that git holds at a commit, tag, branch or DVC experiment; by the names given to their paths.

    Raises:
        ValueError: the revision is unknown or has no such file.
    """
    read = _reader(root, _known(root, rev))
    return {name: read(path) for name, path in paths.items()}


def _git(root: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True)
    return done.stdout.decode() if done.returncode == 0 else None


def _commit(root: Path, rev: str) -> str | None:
    """The full hash of a revision; DVC keeps experiments where `git rev-parse` does not look."""
    found = _git(root, "rev-parse", "--verify", "--quiet", f"{rev}^{{commit}}")
    found = found or _git(root, "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{rev}")
    commits = set(found.split()) if found else set()
    if len(commits) > 1:
        raise ValueError(
            f"{rev!r} is the name of {len(commits)} experiments: give one's hash, as `dvc exp list -A` shows it"
        )
    return commits.pop() if commits else None


def _known(root: Path, rev: str) -> str:
    if (commit := _commit(root, rev)) is None:
        raise ValueError(f"unknown revision {rev!r}: give a commit, tag, branch or DVC experiment")
    return commit


def _stage_names(root: Path, commit: str | None) -> list[str]:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    with Repo(str(root), rev=commit) as repo:
        return sorted(stage.name for stage in repo.index.stages if isinstance(stage, PipelineStage))


def entry_before(stage: str, root: Path) -> Entry:
    """The stage's entry in dvc.lock as DVC will write it, less the outs' hashes."""
    from dvc.repo import Repo
    from dvc.stage.serialize import to_single_stage_lockfile

    with Repo(str(root)) as repo:
        loaded = repo.stage.load_one(name=stage)
        loaded.save_deps()
        return dict(to_single_stage_lockfile(loaded))


def out_hashes(stages: dict[str, Entry]) -> dict[str, str]:
    """MD5 of every out that dvc.lock's stages name, by path."""
    return {out["path"]: out["md5"] for entry in stages.values() for out in entry.get("outs", [])}


def upstream(stages: dict[str, Entry], stage: str) -> list[str]:
    """The stages that this one hangs on, itself first, by what they read and put out."""
    found = [stage]
    for each in found:  # which grows
        read = [dep["path"] for dep in stages[each].get("deps", [])]
        for name, entry in stages.items():
            if name not in found and any(_overlap(out["path"], dep) for out in entry.get("outs", []) for dep in read):
                found.append(name)
    return found


def _overlap(one: str, other: str) -> bool:
    """Whether two paths are one, or one lies in the other."""
    return f"{one}/".startswith(f"{other}/") or other.startswith(f"{one}/")


def inputs_key(stage: str, entry: Entry) -> str:
    """SHA-256 of all that is known of a stage before its outs are."""
    deps = sorted((dep["path"], dep.get("md5")) for dep in entry.get("deps", []))
    return digest([stage, entry["cmd"], deps, entry.get("params", {})])


def cached(md5: str, root: Path = Path(".")) -> Path | None:
    """The file of this hash in DVC's cache; None if it isn't there."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        path = Path(repo.cache.local.oid_to_path(md5))
    return path if path.is_file() else None


def _files(root: Path, params: Any, lock: dict[str, Entry], read: Reader) -> dict[str, str]:
    """The text of dvc.lock's metrics, which git has, and of those curves that DVC's cache has, once everything is known
    to belong to one result."""
    outs = out_hashes(lock)
    for stage, entry in lock.items():
        for key, value in entry.get("params", {}).get(PARAMS, {}).items():
            if lookup(params, key) != value:
                raise ValueError(f"{stage} ran with another {key} than {PARAMS} has: run `dvc repro` first")
        for dep in entry.get("deps", []):
            if _made(dep, outs) != dep.get("md5"):
                raise ValueError(f"{stage} ran before {dep['path']} changed: run `dvc repro` first")
    files = {}
    for path, md5 in outs.items():
        if path.endswith(".csv"):
            if curve := cached(md5, root):
                files[path] = curve.read_bytes().decode()
        elif path == SUMMARY or re.fullmatch(r"reports/metrics/.*\.json", path):
            files[path] = read(path)
            if hashlib.md5(files[path].encode()).hexdigest() != md5:
                raise ValueError(f"{path} is not the file that {LOCK} names: run `dvc repro` first")
    return files


def _made(dep: dict[str, Any], outs: dict[str, str]) -> str | None:
    """The hash that a dependency has as what the stages put out; its own where no stage makes it.

    A folder of several stages' files has the hash that DVC gives it from theirs; "" if these are more than it held. A
    folder that holds other files too, or folders, is taken as it is.
    """
    own: str | None = dep.get("md5")
    prefix = dep["path"] + "/"
    inside = {path.removeprefix(prefix): md5 for path, md5 in outs.items() if path.startswith(prefix)}
    if not inside or any(md5.endswith(".dir") for md5 in inside.values()) or len(inside) < dep.get("nfiles", 0):
        return outs.get(dep["path"], own)
    if len(inside) > dep.get("nfiles", 0):
        return ""
    listed = [{"md5": md5, "relpath": path} for path, md5 in sorted(inside.items())]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


def _reader(root: Path, commit: str | None) -> Reader:
    """Reads a file's text from a commit, or from the workspace if that is None."""

    def read(path: str) -> str:
        if commit:
            text = _git(root, "show", f"{commit}:./{path}")
        else:
            text = (root / path).read_bytes().decode() if (root / path).is_file() else None
        if text is None:
            raise ValueError(f"{commit or 'the workspace'} has no {path}: run `dvc repro` first")
        return text

    return read


def lookup(params: Any, dotted: str) -> Any:
    """The parameter of a dotted name; None where there is none."""
    for key in dotted.split("."):
        params = params.get(key) if isinstance(params, dict) else None
    return params


def digest(value: Any) -> str:
    """SHA-256 of the value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def md5(path: Path) -> str:
    """Of a file, in hexadecimal, as DVC has it."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def read_yaml(text: str, name: object) -> dict[str, Any]:
    """The map that the file of this name holds.

    Raises:
        ValueError: no YAML, after a merge conflict for example, or no map.
    """
    from ruamel.yaml import YAML, YAMLError

    try:
        found = YAML(typ="safe").load(text)
    except YAMLError as error:
        raise ValueError(f"{name} is no YAML: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} is no YAML map: is it empty?")
    return found
