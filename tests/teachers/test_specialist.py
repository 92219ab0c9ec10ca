"""The specialist: it learns, and stopped at any moment it ends with the bytes of an uninterrupted run."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
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


def run(source, checkpoints, dtype="float32", save_every=5, lessons=LESSONS):
    model, curve = specialize(
        load_model(source),
        load_tokenizer(source),
        lessons,
        SETTINGS,
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
