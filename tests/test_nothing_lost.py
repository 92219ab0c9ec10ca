"""Nothing that was paid for is lost: stages killed at any moment, or out of room, end with the bytes of an
uninterrupted run.

Stages run as DVC runs them: the outs deleted first, DVC_ROOT and DVC_STAGE set.
"""

import errno
import json
import random
import shutil
import time
from dataclasses import dataclass, field
from hashlib import sha256

import pytest
from smoke import Stages, copy

from q2t.stage import DONE, checkpoints, run

KILLS = {"specialize": 1, "generate@expert": 5, "distill": 5, "prune": 5, "export": 4}
"""The specialist takes longest; tests/teachers/test_specialist.py stops it at eight more moments."""
UPSTREAM = (
    "fetch@tiny pose specialize generate@expert generate@base filter initialize label distill prune export".split()
)


@dataclass
class Interrupted(Stages):
    """Stages that are stopped, and what an uninterrupted run of each came to."""

    seconds: dict[str, float] = field(default_factory=dict)
    expected: dict[str, dict[str, str]] = field(default_factory=dict)

    def written(self, stage: str) -> dict[str, str]:
        """The SHA-256 of every file of the outs."""
        paths = [self.folder / out for out in self.outs[stage]]
        files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        return {str(file.relative_to(self.folder)): sha256(file.read_bytes()).hexdigest() for file in files}

    def kept(self, stage: str) -> list[str]:
        """What a run that starts now would go on from: checkpoints, or answers."""
        work = self.folder / ".q2t" / stage
        lines = [line for journal in work.glob("*/answers.jsonl") for line in journal.read_text().split("\n")[:-1]]
        whole = [path.name for path in work.glob("*/step-*") if not path.suffix]
        return whole + lines

    def forget(self, stage: str) -> None:
        shutil.rmtree(self.folder / ".q2t" / stage, ignore_errors=True)

    def assert_as_if_uninterrupted(self, stage: str) -> None:
        assert self.written(stage) == self.expected[stage]
        assert not list((self.folder / "models").rglob("*.partial"))
        assert [path.suffix for path in (self.folder / ".q2t" / stage).glob("*")] in ([], [DONE])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = copy(tmp_path_factory.mktemp("copy"))
    made = Interrupted(folder, folder.with_name("log"))
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
        fresh, start = not pipeline.kept(stage), time.monotonic()
        process = pipeline.start(stage)
        process.join(moments.uniform(0.2, 1) * pipeline.seconds[stage])  # before that it imports
        process.kill()  # SIGKILL
        process.join()
        if process.exitcode == 0:  # what was kept made it faster than the uninterrupted run
            pipeline.assert_as_if_uninterrupted(stage)
            pipeline.forget(stage)
            if fresh:  # the machine was busier when the uninterrupted one was timed
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


def test_killed_before_dvc_has_recorded_its_outs_a_stage_does_not_train_again(pipeline):
    def last_checkpoint():
        (file,) = (pipeline.folder / ".q2t" / stage).glob(f"*{DONE}/step-*/weights.safetensors")
        return file.stat().st_mtime_ns

    stage = "distill"
    pipeline.forget(stage)
    pipeline.finish(stage)  # and DVC, which would hash the outs now, is killed; on its next run it deletes them
    written = last_checkpoint()
    pipeline.finish(stage)
    assert last_checkpoint() == written
    pipeline.assert_as_if_uninterrupted(stage)
    pipeline.finish("export")  # which DVC begins once `distill` is recorded
    assert not pipeline.kept(stage)


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Makes this process that of another stage, as DVC starts it."""
    from q2t import lockfile

    def begin(stage, temperature=1):
        monkeypatch.setenv("DVC_STAGE", stage)
        monkeypatch.setattr(lockfile, "entry_before", lambda *_: {"cmd": "train", "params": {"T": temperature}})
        run(lambda: None)

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    begin("distill")
    return begin


def checkpoint_of(stage, name):
    """One checkpoint in the stage's folder, beside those that were kept; returns the names of these."""
    with checkpoints(stage) as folder:
        kept = sorted(path.name for path in folder.iterdir())
        (folder / name).mkdir()
    return kept


@pytest.mark.parametrize("address", ["distill", "../dvc.yaml:distill"])
def test_checkpoints_outlive_their_stage_until_another_begins(begin, tmp_path, monkeypatch, address):
    assert checkpoint_of("distill", "step-4") == []
    begin(address)
    assert checkpoint_of("distill", "step-8") == ["step-4"]
    monkeypatch.delenv("DVC_STAGE")
    run(lambda: None)  # by hand
    assert checkpoint_of("distill", "step-12") == ["step-4", "step-8"]
    begin("prune")
    assert not list((tmp_path / ".q2t/distill").iterdir())


def test_only_the_newest_checkpoints_of_a_stage_are_kept(begin, tmp_path):
    for temperature in (1, 2, 3):
        begin("distill", temperature)
        assert checkpoint_of("distill", "step-4") == []
    assert len(list((tmp_path / ".q2t/distill").iterdir())) == 1


def test_a_kill_while_checkpoints_are_deleted_leaves_no_half_of_one(begin, tmp_path, monkeypatch):
    def killed(path, **options):
        raise KeyboardInterrupt

    checkpoint_of("distill", "step-4")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        begin("prune")
    begin("distill")
    assert checkpoint_of("distill", "step-8") == []
    begin("prune")
    assert not list((tmp_path / ".q2t/distill").iterdir())


def test_checkpoints_outlive_a_failure(begin):
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
def test_what_a_user_can_put_right_is_one_line_and_a_bug_keeps_its_traceback(begin, error, line):
    def main():
        raise error

    with pytest.raises(SystemExit if line else type(error), match=line) as caught:
        run(main)
    assert not line or "\n" not in caught.value.code
