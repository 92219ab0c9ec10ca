"""Two processes that share the steps of a run, or the weights too, started by `accelerate launch` as the docs say."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import teacher_beside
from safetensors.torch import load_model

from q2t.config import Adapter, Distill, OnPolicy, Phase
from q2t.distillation import loop, sharding
from q2t.sources import save_model

ON_POLICY = OnPolicy(teacher="models/teacher", max_new_tokens=8, batch_size=4, top_k=4)
ROWS = 20
"""In steps of eight, each of two micro-batches but the last: it leaves the second process nothing to do."""
CHILD = f"""
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from conftest import SETTINGS, make_rows, teacher_beside, tiny_model, weights
from q2t.config import Compute, Distill
from q2t.distillation import checkpoint, loop, sharding
folder, at, more = Path(sys.argv[1]), int(sys.argv[3]), json.loads(sys.argv[4])
at_once = more.pop("at_once", 1)
loop.batches.at_once = lambda *_, **__: at_once
plan, away = loop.phases.plan, more.pop("away", None)
def taking_back(*given, **named):
    if away and os.environ["RANK"] == "0":
        time.sleep(2)
        (folder / away).rename(folder / "checkpoints")
    return plan(*given, **named)
loop.phases.plan = taking_back
save = checkpoint.save
def dying(checkpoints, step, objective, *rest, write):
    own = sum(getattr(p, "_local_tensor", p).numel() for p in objective.parameters())
    (folder / f"shares-{{os.environ['RANK']}}").write_text(f"{{sharding.is_sharded(objective)}} {{own}}")
    save(checkpoints, step, objective, *rest, write=write)
    if step == at and write:
        os.kill(os.getpid(), {int(signal.SIGKILL)})
checkpoint.save = dying
def sampler(model, chosen, asked, phase, journal):
    (folder / f"sampled-{{os.environ['RANK']}}").touch()
    return make_rows(9, seed=phase)
compute = Compute(threads=1, dtype="float32", device="cpu")
model, rows, teacher, asked = tiny_model(), make_rows({ROWS}, unlabelled_every=5), None, more.pop("online", None)
settings = Distill.model_validate(SETTINGS.model_dump() | {{"batch_size": 8, **more}})
if asked:
    settings, model, rows, teacher = teacher_beside(folder.parent / "teacher", asked, settings, compute)
model = loop.train(model, rows, settings, seed=3, compute=compute, teacher=teacher, sampler=sampler,
    checkpoints=folder / "checkpoints", curve=folder / "curve.csv", save_every=2)
assert loop.torch.distributed.get_world_size() == 2
weights(model, folder / f"model-{{os.environ['RANK']}}")
"""


def launch(folder: Path, die_at: int = 0, sharded: bool = False, **more: Any) -> subprocess.CompletedProcess[str]:
    """A run of two processes, its settings but for `more` those of the other tests."""
    here = Path(__file__).parent
    script = folder / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    root = here.parents[1]
    configuration = root / "q2t/launch" / ("fsdp2.yaml" if sharded else "ddp.yaml")
    # Port 0 is any that is free.
    how = ["--config_file", str(configuration), "--num_processes", "2", "--main_process_port", "0"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *how]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [*accelerate, str(script), str(folder), str(here), str(die_at), json.dumps(more)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as starter:
        try:
            out, error = starter.communicate(timeout=600)
        except subprocess.TimeoutExpired:  # two processes that don't do the same steps wait for each other for good
            os.killpg(starter.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, starter.returncode, out, error)


def succeed(*given: Any, **named: Any) -> None:
    done = launch(*given, **named)
    assert done.returncode == 0, done.stderr[-3000:]


def curve(folder: Path) -> list[list[float]]:
    return [list(map(float, line.split(","))) for line in (folder / "curve.csv").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    succeed(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    succeed(folder, sharded=True)
    return folder


@pytest.mark.parametrize("which", ["two", "shards"])
def test_two_processes_learn_as_one(
    which: str, request: pytest.FixtureRequest, model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    together = request.getfixturevalue(which)
    whole = loop.train(
        model(),
        rows(ROWS, unlabelled_every=5),
        settings.model_copy(update={"batch_size": 8}),
        seed=3,
        compute=compute,
        checkpoints=tmp_path / "checkpoints",
        curve=tmp_path / "curve.csv",
    )
    alone, both = curve(tmp_path), curve(together)
    assert len(alone) == 6
    assert both == [pytest.approx(line, rel=1e-4) for line in alone]
    assert (together / "model-0").read_bytes() == (together / "model-1").read_bytes()
    learnt = model()
    load_model(learnt, together / "model-0")
    for ours, theirs in zip(learnt.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sharded", [False, True])
def test_so_they_do_with_two_micro_batches_in_a_pass(
    sharded: bool, model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    """As on a GPU. In the second step of each epoch, one micro-batch is left, and the second process idles."""
    changes = {"batch_size": 16}
    succeed(tmp_path, sharded=sharded, at_once=2, **changes)
    loop.train(
        model(),
        rows(ROWS, unlabelled_every=5),
        settings.model_copy(update=changes),
        seed=3,
        compute=compute,
        checkpoints=tmp_path / "alone",
        curve=tmp_path / "alone" / "curve.csv",
    )
    alone, both = curve(tmp_path / "alone"), curve(tmp_path)
    assert len(alone) == 4
    assert both == [pytest.approx(line, rel=1e-4) for line in alone]


@pytest.mark.parametrize(
    "more",
    [
        {"adapter": {"kind": "lora", "rank": 4, "modules": ["q_proj", "down_proj"]}},
        {"sparsity": 0.01},
        {"phases": [{}, {"epochs": 1, "on_policy": ON_POLICY.model_dump()}]},
    ],
    ids=["adapter", "sparsity", "on policy"],
)
def test_so_they_do_in_what_shards_refuse(
    more: dict[str, Any], model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    succeed(tmp_path, **more)
    given = Distill.model_validate(settings.model_dump() | {"batch_size": 8, **more})
    own = {"sampler": lambda model, chosen, asked, phase, journal: rows(9, seed=phase)}
    places = {"checkpoints": tmp_path / "alone", "curve": tmp_path / "alone" / "curve.csv"}
    loop.train(model(), rows(ROWS, unlabelled_every=5), given, seed=3, compute=compute, **own, **places)
    alone, both = curve(tmp_path / "alone"), curve(tmp_path)
    assert len(alone) == (8 if "phases" in more else 6)
    assert both == [pytest.approx(line, rel=1e-4) for line in alone]
    assert (tmp_path / "model-0").read_bytes() == (tmp_path / "model-1").read_bytes()
    sampled = [path.name for path in tmp_path.glob("sampled-*")]
    assert sampled == ["sampled-0"] * ("phases" in more), "one process asks, and the other reads what came of it"


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_resume_to_the_same_bytes(sharded: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    together = request.getfixturevalue("shards" if sharded else "two")
    assert launch(tmp_path, die_at=4, sharded=sharded).returncode != 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-4"]
    succeed(tmp_path, sharded=sharded)
    for name in ("curve.csv", "model-0", "model-1"):
        assert (tmp_path / name).read_bytes() == (together / name).read_bytes()


def test_no_process_resumes_before_the_first_has_taken_the_checkpoints_back(two: Path, tmp_path: Path) -> None:
    assert launch(tmp_path, die_at=4).returncode != 0
    (tmp_path / "checkpoints").rename(tmp_path / "kept")
    succeed(tmp_path, away="kept")
    for name in ("curve.csv", "model-0", "model-1"):
        assert (tmp_path / name).read_bytes() == (two / name).read_bytes()


def test_a_process_keeps_its_share_alone(two: Path, shards: Path) -> None:
    whole = [(two / f"shares-{rank}").read_text().split() for rank in (0, 1)]
    shares = [(shards / f"shares-{rank}").read_text().split() for rank in (0, 1)]
    assert [kind for kind, _ in whole + shares] == ["False", "False", "True", "True"]
    assert sum(int(size) for _, size in shares) == int(whole[0][1]) == int(whole[1][1])
    assert all(int(size) < 0.6 * int(whole[0][1]) for _, size in shares)


def test_shards_learn_what_whole_weights_learn(
    model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    """With weights that have no gradient, and layers that run twice."""
    more: dict[str, Any] = {"gradient_checkpointing": True, "freeze": ["*embed_tokens*"], "balance": True}
    folders = [tmp_path / "shards", tmp_path / "whole"]
    for folder in folders:
        folder.mkdir()
    succeed(folders[0], sharded=True, **more)
    loop.train(
        model(),
        rows(ROWS, unlabelled_every=5),
        settings.model_copy(update={"batch_size": 8, **more}),
        seed=3,
        compute=compute,
        checkpoints=tmp_path / "checkpoints",
        curve=folders[1] / "curve.csv",
    )
    assert curve(folders[0]) == [pytest.approx(line, rel=1e-4) for line in curve(folders[1])]


@pytest.mark.parametrize(
    "sharded, asked",
    [
        (False, {"hidden": [[0, 0], [2, 2]], "logits": True}),
        (True, {"spans": "matched"}),  # with layers that run twice, as profile r1-gemma has it
    ],
)
def test_a_teacher_beside_says_the_same_to_two_processes(
    sharded: bool, asked: Any, model: Any, tokenizer: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    specials = [("<|im_start|>", "<|endoftext|>", "<|im_end|>")] if "spans" in asked else []
    save_model(model(5, 259), tokenizer(*specials), tmp_path / "teacher")
    changes = {"batch_size": 8, "gradient_checkpointing": sharded}
    folders = [tmp_path / name for name in ("both", "killed", "alone")]
    for folder in folders:
        folder.mkdir()
    succeed(folders[0], sharded=sharded, online=asked, **changes)
    assert launch(folders[1], die_at=4, sharded=sharded, online=asked, **changes).returncode != 0
    succeed(folders[1], sharded=sharded, online=asked, **changes)
    for name in ("curve.csv", "model-0", "model-1"):
        assert (folders[1] / name).read_bytes() == (folders[0] / name).read_bytes()
    settings, student, rows, teacher = teacher_beside(
        tmp_path / "teacher", asked, settings.model_copy(update=changes), compute
    )
    places = {"checkpoints": folders[2] / "checkpoints", "curve": folders[2] / "curve.csv"}
    loop.train(student, rows, settings, seed=3, compute=compute, teacher=teacher, **places)
    alone, both = curve(folders[2]), curve(folders[0])
    assert len(alone) == 6
    assert both == [pytest.approx(line, rel=1e-4, abs=1e-7) for line in alone]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"adapter": Adapter(kind="ia3", modules=["k_proj"])}, "adapter"),
        ({"sparsity": 0.1}, "sparsity"),
        ({"phases": [Phase(), Phase(on_policy=ON_POLICY)]}, "on_policy"),
    ],
)
def test_what_needs_whole_weights_is_refused_in_shards(change: dict[str, Any], named: str, settings: Any) -> None:
    with pytest.raises(ValueError, match=f"^{named}: needs the student's weights whole"):
        sharding.check(settings.model_copy(update=change))
