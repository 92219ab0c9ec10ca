"""Nothing that was paid for is lost: stages killed at any moment, or out of room, end with the bytes of an
uninterrupted run.

Stages run in forks of a server that has imported the heavy libraries, or twenty kills would be twenty minutes of
imports. They run as DVC runs them: the outs deleted first, DVC_ROOT and DVC_STAGE set.
"""

import errno
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import copy

KILLS = {"specialize": 2, "generate@expert": 4, "distill": 5, "prune": 5, "export": 4}
"""The specialist takes longest; tests/teachers/test_specialist.py stops it at eight more moments."""
UPSTREAM = (
    "fetch@tiny pose specialize generate@expert generate@base filter initialize label distill prune export".split()
)
PRELOADED = (
    "torch transformers transformers.models.llama.modeling_llama trl datasets accelerate pandas mlflow dvc.repo "
    "dvc.stage.serialize great_expectations onnxruntime.quantization optimum.exporters.onnx"
).split()


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
class Pipeline:
    """A copy of the repository whose stages can be started, one at a time."""

    folder: Path
    log: Path
    commands: dict[str, list[str]] = field(default_factory=dict)
    outs: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    """What an uninterrupted run wrote, by stage."""

    def start(self, stage: str, disk_fills: bool = False) -> Any:
        for out in self.outs[stage]:  # as DVC does
            path = self.folder / out
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        arguments = (str(self.folder), stage, self.commands[stage], str(self.log), disk_fills)
        process = multiprocessing.get_context("forkserver").Process(target=child, args=arguments)
        process.start()
        return process

    def finish(self, stage: str) -> None:
        process = self.start(stage)
        process.join()
        assert process.exitcode == 0, self.log.read_text()

    def written(self, stage: str) -> dict[str, str]:
        """The SHA-256 of every file of the outs."""
        paths = [self.folder / out for out in self.outs[stage]]
        files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        return {str(file.relative_to(self.folder)): sha256(file.read_bytes()).hexdigest() for file in files}

    def kept(self, stage: str) -> list[str]:
        """What a run that starts now would go on from: checkpoints, or answers."""
        work = self.folder / ".q2t" / stage
        lines = [line for journal in work.glob("*/answers.jsonl") for line in journal.read_text().split("\n")[:-1]]
        whole = [path.name for path in work.glob("*/step-*") if not path.suffix and not path.parent.suffix]
        return whole + lines

    def forget(self, stage: str) -> None:
        shutil.rmtree(self.folder / ".q2t" / stage, ignore_errors=True)

    def assert_as_if_uninterrupted(self, stage: str) -> None:
        assert self.written(stage) == self.expected[stage]
        assert not list((self.folder / "models").rglob("*.partial"))
        assert not list((self.folder / ".q2t" / stage).glob("*"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    folder = copy(tmp_path_factory.mktemp("copy"))
    made = Pipeline(folder, folder.with_name("log"))
    with Repo(str(folder)) as repo:
        for stage in repo.index.stages:
            if isinstance(stage, PipelineStage):
                made.commands[stage.name] = stage.cmd.removeprefix("python -m ").split()
                made.outs[stage.name] = [out.def_path for out in stage.outs]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patched.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        for stage in UPSTREAM:
            start = time.monotonic()
            made.finish(stage)
            made.seconds[stage] = time.monotonic() - start
            made.expected[stage] = made.written(stage)
    return made


@pytest.mark.parametrize("stage", KILLS)
def test_killed_at_random_moments_a_stage_ends_with_the_same_bytes(pipeline, stage):
    pipeline.forget(stage)
    moments = random.Random(stage)
    kills = resumed = 0
    for _ in range(5 * KILLS[stage]):
        process = pipeline.start(stage)
        start = time.monotonic()
        process.join(moments.uniform(0.1, 1) * pipeline.seconds[stage])
        process.kill()  # SIGKILL
        process.join()
        if process.exitcode == 0:  # what was kept made it faster than the uninterrupted run
            pipeline.assert_as_if_uninterrupted(stage)
            pipeline.forget(stage)
            pipeline.seconds[stage] = min(pipeline.seconds[stage], time.monotonic() - start)
            continue
        assert process.exitcode == -9, pipeline.log.read_text()
        kills += 1
        resumed += bool(pipeline.kept(stage))
        if kills >= KILLS[stage] and (resumed or stage == "export"):
            break
    else:
        pytest.fail(f"{kills} kills, {resumed} of them with something to go on from")
    pipeline.finish(stage)
    pipeline.assert_as_if_uninterrupted(stage)


def fails_for_want_of_room(pipeline, stage):
    process = pipeline.start(stage, disk_fills=True)
    process.join()
    said = pipeline.log.read_text()
    assert process.exitcode == 1, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith(stage.split("@")[0] + ": no room on the disk; make some and run again")


def test_a_disk_that_is_full_at_the_second_checkpoint_costs_nothing_before_it(pipeline):
    stage = "distill"  # tests/teachers/test_specialist.py does the same to the specialist
    pipeline.forget(stage)
    fails_for_want_of_room(pipeline, stage)
    assert pipeline.kept(stage) == ["step-4"]
    pipeline.finish(stage)
    pipeline.assert_as_if_uninterrupted(stage)


def test_a_full_disk_and_damaged_lines_cost_no_other_answer(pipeline):
    stage = "generate@expert"
    out = pipeline.folder / "data/generations/expert.jsonl"
    expected = out.read_text().splitlines()
    pipeline.forget(stage)
    fails_for_want_of_room(pipeline, stage)
    assert not out.exists()
    (journal,) = (pipeline.folder / ".q2t" / stage).glob("*/answers.jsonl")
    first, second, *others = journal.read_bytes().splitlines(keepends=True)
    assert others
    # An answer that no model would give shows that the journal's is taken, and the model not asked again.
    told = json.loads(first) | {"text": "told before"}
    damaged = [json.dumps(told, sort_keys=True).encode() + b"\n", b'{"id": 5}\n', *others[:-1], others[-1][:-20]]
    journal.write_bytes(b"".join(damaged))
    pipeline.finish(stage)
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows.pop(told["id"]) == told
    assert list(rows.values()) == [row for row in map(json.loads, expected) if row["id"] != told["id"]]
    assert json.loads(second)["id"] in rows


def test_a_kill_while_checkpoints_are_deleted_leaves_no_half_of_one(tmp_path, monkeypatch):
    from q2t import lockfile
    from q2t.stage import checkpoints

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(lockfile, "entry_before", lambda *_: {"cmd": "train"})
    remove = shutil.rmtree

    def killed(path, **options):
        if Path(path).exists():
            raise KeyboardInterrupt
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt), checkpoints("distill") as folder:
        (folder / "step-4").mkdir()
    monkeypatch.setattr(shutil, "rmtree", remove)
    with checkpoints("distill") as again:
        assert again == folder
        assert not list(again.iterdir())
    assert not list(folder.parent.iterdir())


def test_checkpoints_outlive_a_failure(tmp_path, monkeypatch):
    from q2t import lockfile
    from q2t.stage import checkpoints

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(lockfile, "entry_before", lambda *_: {"cmd": "train"})
    with pytest.raises(OSError), checkpoints("distill") as folder:
        (folder / "step-4").mkdir()
        raise OSError(errno.ENOSPC, "full")
    assert (folder / "step-4").exists()


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("bad value"), ": bad value$"),
        (OSError(errno.ENOSPC, "No space left on device"), "no room on the disk.*No space left"),
        (RuntimeError("I/O error: Disk quota exceeded (os error 122)"), "no room on the disk.*quota"),
        (ValueError(), ": $"),
        (RuntimeError("os error 2"), None),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
    ],
)
def test_what_a_user_can_put_right_is_one_line_and_a_bug_keeps_its_traceback(error, line):
    from q2t.stage import run

    def main():
        raise error

    with pytest.raises(SystemExit if line else type(error), match=line) as caught:
        run(main)
    assert not line or "\n" not in caught.value.code
