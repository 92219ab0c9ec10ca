"""The specialist: it learns, and stopped at any moment it ends with the bytes of an uninterrupted run."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from transformers import Trainer, TrainerState

from q2t.config import Compute, Scratch, Source, Specialize
from q2t.distillation import batches
from q2t.records import Problem
from q2t.sources import fetch, load_model, load_tokenizer
from q2t.teachers.specialist import specialize

STEPS, MICRO_BATCHES = 14, 28
SETTINGS = Specialize(source="tiny", epochs=2, learning_rate=0.01, batch_size=8, warmup=0.1, weight_decay=0.01)
LESSONS = [
    Problem(
        id=f"{i:016x}",
        family="bands",
        domain="target",
        split="lessons",
        inputs={"i": i},
        question=f"Say {'so ' * (i % 7)}{i}.",
        check={},
        solution="so " * (i * 5 % 11) + f"{i}",
    )
    for i in range(54)  # 108 rows of two epochs: the last step is half a one
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    shape = Scratch(vocabulary=300, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2)
    fetch("tiny", Source(scratch=shape), folder)
    return folder


def run(source, checkpoints, dtype="float32", save_every=5, lessons=LESSONS, batch_size=8):
    model, curve = specialize(
        load_model(source),
        load_tokenizer(source),
        lessons,
        SETTINGS.model_copy(update={"batch_size": batch_size}),
        seed=3,
        compute=Compute(threads=1, dtype=dtype, device="cpu"),
        checkpoints=checkpoints,
        save_every=save_every,
    )
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}, curve


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    return {
        dtype: run(source, tmp_path_factory.mktemp("whole"), dtype, save_every=100) for dtype in ("float32", "bfloat16")
    }


def test_the_curve_has_a_row_for_every_five_steps_and_the_rest_and_falls(whole):
    _, curve = whole["float32"]
    assert [row["step"] for row in curve] == [5, 10, 14]
    assert all(set(row) == {"step", "loss", "learning_rate", "gradient_norm"} for row in curve)
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_micro_batches_in_one_pass_change_no_step(source, whole, tmp_path, monkeypatch):
    """As on a GPU, which takes several."""
    passes, loss = [], Trainer.training_step
    monkeypatch.setattr(
        Trainer,
        "training_step",
        lambda self, model, inputs, *rest: passes.append(len(inputs["input_ids"])) or loss(self, model, inputs, *rest),
    )
    found = []
    monkeypatch.setattr(batches, "at_once", lambda count, *_, logits=0: found.append(logits) or count)
    _, curve = run(source, tmp_path)
    assert found == [12 * len(load_tokenizer(source))]
    assert len(passes) == STEPS and max(passes) == 8
    assert [row["loss"] for row in curve] == pytest.approx([row["loss"] for row in whole["float32"][1]], rel=1e-3)


def test_a_model_whose_logits_are_more_than_a_product_is_refused(source, tmp_path):
    model = load_model(source)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="a llama has logits with final_logit_softcapping"):
        specialize(
            model,
            load_tokenizer(source),
            LESSONS[:8],
            SETTINGS,
            seed=3,
            compute=Compute(threads=1, dtype="float32", device="cpu"),
            checkpoints=tmp_path,
        )


def test_a_run_of_few_steps_has_a_curve_too(source, tmp_path):
    _, curve = run(source, tmp_path, lessons=LESSONS[:9])
    assert [row["step"] for row in curve] == [3]
    assert 0 < curve[0]["loss"] < 10


@pytest.mark.parametrize(("step", "what"), [(1, "loss is nan at step 2"), (3, "gradient is nan at step 3")])
def test_a_run_that_falls_apart_stops(source, tmp_path, monkeypatch, step, what):
    """A gradient that is not finite makes all weights so, and the next loss."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def broken(parameters, *arguments, **named):
        parameters = list(parameters)
        steps.append(parameters)
        if len(steps) == step:
            parameters[0].grad[0] = torch.nan
        return clip(parameters, *arguments, **named)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    with pytest.raises(ValueError, match=f"specialize: the {what}: lower specialize.learning_rate"):
        run(source, tmp_path, lessons=LESSONS[:9])


def test_a_norm_that_overflows_is_found_in_the_curve(source, tmp_path, monkeypatch):
    """The gradient is finite and the loss goes on; a row in the middle of the curve is the one that shows it."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def overflowing(*arguments, **named):
        steps.append(clip(*arguments, **named))
        return torch.tensor(torch.inf) if len(steps) == 5 else steps[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflowing)
    with pytest.raises(ValueError, match="specialize: the gradient is inf at step 5: lower specialize.learning_rate"):
        run(source, tmp_path, lessons=LESSONS[:28])
    assert len(steps) > 5


def stop_at(patched, owner, name, call, error):
    """The given call of a function ends with the error instead."""
    original, calls = getattr(owner, name), []

    def mortal(*arguments, **named):
        calls.append(arguments)
        if len(calls) == call:
            raise error
        return original(*arguments, **named)

    patched.setattr(owner, name, mortal)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
MOMENTS = {
    "before the first checkpoint": (Trainer, "training_step", 3, KeyboardInterrupt(), []),
    "between checkpoints": (Trainer, "training_step", 16, KeyboardInterrupt(), ["step-5"]),
    "within a step": (torch.nn.utils, "clip_grad_norm_", 8, KeyboardInterrupt(), ["step-5"]),
    "the weights half-written": (Trainer, "_save_optimizer_and_scheduler", 2, FULL, ["checkpoint-10", "step-5"]),
    "the state half-written": (TrainerState, "save_to_json", 2, FULL, ["checkpoint-10", "step-5"]),
    "the first checkpoint half-written": (Trainer, "_save_rng_state", 1, FULL, ["checkpoint-5"]),
    "the older not yet deleted": (shutil, "rmtree", 1, KeyboardInterrupt(), ["step-10", "step-5"]),
    "after the last step": (Trainer, "_finish_current_push", 1, KeyboardInterrupt(), ["step-14"]),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_at_any_moment_it_goes_on_to_the_same_bytes(moment, source, whole, tmp_path, monkeypatch):
    owner, name, call, error, kept = MOMENTS[moment]
    with monkeypatch.context() as patched, pytest.raises(type(error)):
        stop_at(patched, owner, name, call, error)
        run(source, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*-*")) == kept
    for path in tmp_path.glob("checkpoint-*/*"):
        path.write_bytes(path.read_bytes()[:100])
    done = max([int(folder.removeprefix("step-")) for folder in kept if folder.startswith("step-")], default=0)
    steps = []
    step = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *a, **n: steps.append(1) or step(*a, **n))
    assert run(source, tmp_path) == whole["float32"]
    assert len(steps) == (MICRO_BATCHES - 1 - 2 * done if done < STEPS else 0)
    assert [path.name for path in tmp_path.glob("*-*")] == ["step-14"]


def test_so_it_does_in_bfloat16_with_masters_in_float32(source, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at(patched, Trainer, "training_step", 16, KeyboardInterrupt())
        run(source, tmp_path, "bfloat16")
    assert run(source, tmp_path, "bfloat16") == whole["bfloat16"] != whole["float32"]


def test_a_checkpoint_is_only_where_the_curve_has_a_row(source, tmp_path):
    with pytest.raises(AssertionError):
        run(source, Path(tmp_path), save_every=7)


CHILD = f"""
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_specialist import run
from transformers import Trainer
source, folder, die_at = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
calls, step = [], Trainer.training_step
def dying(*given):
    calls.append(1)
    if len(calls) == die_at and os.environ["RANK"] == "0":
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    return step(*given)
Trainer.training_step = dying
weights, curve = run(source, folder / "checkpoints", batch_size=16)
rank = os.environ["RANK"]
(folder / f"weights-{{rank}}").write_bytes(b"".join(weights[name] for name in sorted(weights)))
(folder / f"curve-{{rank}}").write_text(json.dumps([curve, len(calls)]))
"""


def launch(source, folder, die_at=0):
    root = Path(__file__).resolve().parents[2]
    script = folder / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    # Port 0 is any that is free.
    how = ["--config_file", f"{root}/q2t/launch/ddp.yaml", "--num_processes", "2"]
    starter = [sys.executable, "-m", "accelerate.commands.launch", *how, "--main_process_port", "0"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [*starter, str(script), str(Path(__file__).parent), str(source), str(folder), str(die_at)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_two_processes_learn_as_one_and_resume_to_the_same_bytes(source, tmp_path):
    """Each takes two passes a step, and the last step of 108 rows has none for the second process's second pass."""
    folders = [tmp_path / "killed", tmp_path / "through"]
    for folder in folders:
        folder.mkdir()
    assert launch(source, folders[0], die_at=12).returncode != 0
    assert [path.name for path in (folders[0] / "checkpoints").glob("*-*")] == ["step-5"]
    for folder in [*folders, folders[1]]:  # the last is one that had ended already
        done = launch(source, folder)
        assert done.returncode == 0, done.stderr[-3000:]
        if not (folder / "first").exists():
            (folder / "curve-0").rename(folder / "first")
    (resumed, fewer), (curve, calls) = [json.loads((folder / "first").read_text()) for folder in folders]
    assert (fewer, calls) == (4, 14)
    assert json.loads((folders[1] / "curve-0").read_text()) == [curve, 0]
    weights, alone = run(source, tmp_path / "alone", batch_size=16)
    assert resumed == curve == [pytest.approx(line, rel=1e-4, abs=1e-4) for line in alone]
    first, *others = [(folder / f"weights-{rank}").read_bytes() for folder in folders for rank in (0, 1)]
    assert others == [first] * 3
    both = (
        torch.frombuffer(bytearray(each), dtype=torch.float32)
        for each in (first, b"".join(map(weights.get, sorted(weights))))
    )
    torch.testing.assert_close(*both)


def test_the_launchers_configuration_changes_nothing(source, whole, tmp_path, monkeypatch):
    """compute.dtype is the precision, and weights are whole in each process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run(source, tmp_path) == whole["float32"]


def test_rows_that_processes_cannot_share_evenly_are_refused(source, tmp_path, monkeypatch):
    three = property(lambda _: 3, lambda *_: None)
    monkeypatch.setattr(PartialState, "num_processes", three, raising=False)
    with pytest.raises(ValueError, match="^specialize.batch_size: 8 rows can't be dealt out evenly to 3 processes"):
        run(source, tmp_path)
