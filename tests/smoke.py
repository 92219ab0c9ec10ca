"""Copies of this repository under the smoke profile, and its stages in them: by DVC, or each in a fork."""

import multiprocessing
import os
import resource
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PRELOADED = (
    "torch transformers transformers.models.llama.modeling_llama trl datasets accelerate pandas mlflow dvc.repo "
    "dvc.stage.serialize great_expectations onnxruntime.quantization optimum.exporters.onnx"
).split()


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder)}


def run(folder: Path, *command: str, check: bool = True) -> str:
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]] if (BIN / command[0]).exists() else list(command),
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def copy(folder: Path) -> Path:
    """A repository of its own with this one's files, tracked or new, under the smoke profile, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    ).stdout.split(b"\0")
    for name in filter(None, listed):
        source = ROOT / os.fsdecode(name)
        # dvc.lock and reports are the quickstart's: a smoke run starts without.
        if source.is_file() and not os.fsdecode(name).startswith(("dvc.lock", "reports/")):
            target = folder / os.fsdecode(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    run(folder, "git", "init", "-q")
    run(folder, "git", "config", "user.email", "test@example.com")
    run(folder, "git", "config", "user.name", "test")
    run(folder, "q2t", "profile", "smoke")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "smoke")
    return folder


def child(folder: str, name: str, command: list[str], log: str, disk_fills: bool) -> None:
    """Run `python -m MODULE ARGUMENTS` of this folder. With `disk_fills`, there is no more room from the first
    checkpoint, or the first answers, on."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ |= {"DVC_ROOT": folder, "DVC_STAGE": name}
    sys.path.insert(0, folder)
    from q2t.distillation import loop
    from q2t.teachers import specialist
    from q2t.teachers.journal import Journal

    assert Path(loop.__file__).is_relative_to(folder)
    # A smoke run is over before the first checkpoint would be due.
    loop.train = partial(loop.train, save_every=4)  # type: ignore[assignment]
    specialist.specialize = partial(specialist.specialize, save_every=10)  # type: ignore[assignment]

    replace, append = os.replace, Journal.append

    def no_file_grows_beyond(room: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    def replace_and_fill(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name.startswith("step-"):
            no_file_grows_beyond(100_000)

    def append_and_fill(journal: Journal, rows: Any) -> None:
        append(journal, rows)
        no_file_grows_beyond(journal.path.stat().st_size + 1000)

    if disk_fills:
        os.replace, Journal.append = replace_and_fill, append_and_fill  # type: ignore[assignment, method-assign]
    module, *arguments = command
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@dataclass
class Stages:
    """A copy of the repository whose stages can be started, one at a time, without DVC.

    They run in forks of a server that has imported the heavy libraries: most of a smoke run is imports.
    """

    folder: Path
    log: Path
    commands: dict[str, list[str]] = field(init=False)
    """By stage, each after those that it needs."""
    outs: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        from dvc.repo import Repo
        from dvc.stage import PipelineStage

        with Repo(str(self.folder)) as repo:
            stages = [stage for stage in repo.index.stages if isinstance(stage, PipelineStage)]
        self.commands = {stage.name: stage.cmd.removeprefix("python -m ").split() for stage in stages}
        self.outs = {stage.name: [out.def_path for out in stage.outs] for stage in stages}

    def start(self, stage: str, disk_fills: bool = False) -> Any:
        for out in self.outs[stage]:  # as DVC does
            path = self.folder / out
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        arguments = (str(self.folder), stage, self.commands[stage], str(self.log), disk_fills)
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(PRELOADED)
        process = forks.Process(target=child, args=arguments)
        with pytest.MonkeyPatch.context() as patched:  # the first start starts the server
            patched.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
            patched.setenv("OMP_NUM_THREADS", "1")
            process.start()
        return process

    def finish(self, stage: str) -> None:
        process = self.start(stage)
        process.join()
        assert process.exitcode == 0, self.log.read_text()
