"""The gradient, and the bytes of a run: killed, resumed or neither."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from q2t.config import OnPolicy, Phase
from q2t.distillation import loop, objective
from q2t.distillation.batches import collate

LOSSES: dict[str, dict[str, Any]] = {
    "default": {},
    "reverse_kl": {"divergence": "reverse_kl", "temperature": 1.0},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "labels alone": {"alpha": 1.0},
    "balance": {"balance": True, "divergence": "reverse_kl"},
    "hard rows": {"curriculum": 1.0},
    "easy rows": {"curriculum": -0.5},
    "teacher only": {"teacher_only": ["target"]},
    "reasoning": {"reasoning": 0.1},
    "several": {"reasoning": 0.3, "curriculum": 1.0, "divergence": "jsd"},
}
METHODS = LOSSES | {"cosine": {"schedule": "cosine", "spike_factor": 20.0}}
every_loss = pytest.mark.parametrize("changes", LOSSES.values(), ids=LOSSES)
every_method = pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)


@every_loss
@pytest.mark.parametrize("count", [8, 5])
def test_the_split_into_micro_batches_changes_nothing(
    gradient: Any, count: int, changes: dict[str, Any], model: Any, rows: Any, settings: Any, accelerator: Any
) -> None:
    """1, 4 and 8 micro-batches, unequal lengths, a last short one, rows without labels, pad == eos."""
    settings = settings.model_copy(update=changes)
    network, chosen = model(dtype=torch.float64), rows(count, unlabelled_every=3)
    whole = gradient(network, [chosen], settings, accelerator)
    for size in (2, 1, 3):
        split = [chosen[i : i + size] for i in range(0, count, size)]
        torch.testing.assert_close(gradient(network, split, settings, accelerator), whole)


def test_a_pass_is_sized_by_the_longest_row_and_by_a_shard(
    model: Any, rows: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        loop.batches, "at_once", lambda count, tokens, config, device, held, **_: asked.append((tokens, held)) or 1
    )
    ordered = sorted(rows(5), key=lambda row: len(row.input_ids))
    micro_batches = [ordered[:4], ordered[4:]]  # the longest row is in the narrow one
    for shards in (1, 2):
        loop._at_once(2, micro_batches, objective.Objective(model()), settings, "cuda", shards)
    (tokens, held), (_, shard) = asked
    assert tokens == 4 * len(ordered[-1].input_ids) and shard == held // 2


@pytest.mark.parametrize("tied", [True, False])
def test_a_padding_token_that_ends_texts_too_learns_as_any_other(
    run: Any, model: Any, rows: Any, settings: Any, compute: Any, tied: bool, tmp_path: Path
) -> None:
    """torch gives an embedding's row padding_idx no gradient."""

    def network(pad: int | None) -> Any:
        made = model()
        if not tied:
            made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().clone())
        made.model.embed_tokens.padding_idx = pad
        return made

    assert run(lambda: network(1), rows, settings, compute, tmp_path / "eos") == run(
        lambda: network(None), rows, settings, compute, tmp_path / "none"
    )


def test_micro_batches_that_share_a_pass_have_the_gradient_of_those_that_do_not(
    gradient: Any, model: Any, rows: Any, settings: Any, accelerator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, chosen = model(dtype=torch.float64), rows(9, unlabelled_every=3)
    split = [chosen[i : i + 2] for i in range(0, 9, 2)]
    alone = gradient(network, split, settings, accelerator)
    passes, forward = [], objective.Objective.forward
    monkeypatch.setattr(objective.Objective, "forward", lambda *given: passes.append(len(given[1])) or forward(*given))
    monkeypatch.setattr(loop.batches, "at_once", lambda *_, **__: 3)
    torch.testing.assert_close(gradient(network, split, settings, accelerator), alone)
    assert passes == [6, 3]


def test_the_loss_is_that_of_the_definition(
    gradient: Any, model: Any, rows: Any, settings: Any, accelerator: Any
) -> None:
    """Through the model's own logits and torch's own cross-entropy."""
    network, chosen = model(dtype=torch.float64), rows(6, unlabelled_every=1)
    (loss, task, kl, *_), _ = gradient(network, [chosen], settings, accelerator)
    total = tokens = weighted = 0.0
    with torch.no_grad():
        for row in chosen:
            ids = torch.tensor(row.input_ids[None]).long()
            logits = network(ids).logits[0, row.prompt_length - 1 : -1]
            ce = float(torch.nn.functional.cross_entropy(logits, ids[0, row.prompt_length :], reduction="sum"))
            total, weighted = total + ce, weighted + row.weight * ce
            tokens += row.completion_tokens
    assert (task, loss) == (pytest.approx(total / tokens), pytest.approx(weighted / tokens))
    assert kl == 0


@every_loss
def test_only_positions_that_predict_completions_get_a_gradient(
    gradient: Any,
    changes: dict[str, Any],
    model: Any,
    rows: Any,
    settings: Any,
    accelerator: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the last hidden states, whatever the method."""
    states: list[torch.Tensor] = []

    def predicting(network: Any, batch: Any) -> torch.Tensor:
        states.append(network.base_model(batch.input_ids).last_hidden_state)
        states[-1].retain_grad()
        return states[-1][batch.predicts]

    monkeypatch.setattr(objective.batches, "predicting_states", predicting)
    chosen = rows(6, unlabelled_every=3)
    gradient(model(), [chosen], settings.model_copy(update=changes), accelerator)
    learnt = states[0].grad.abs().sum(2) > 0
    expected = torch.zeros_like(learnt)
    for i, row in enumerate(chosen):
        expected[i, row.prompt_length - 1 : len(row.input_ids) - 1] = True
    assert (learnt == expected).all()


def test_prompt_tokens_are_not_learnt(gradient: Any, model: Any, rows: Any, settings: Any, accelerator: Any) -> None:
    """Logits of positions that predict prompt tokens get no gradient: no prompt token is pushed up."""
    network = model()
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())  # untied
    row = rows(1, unlabelled_every=1)[0]
    row.input_ids[: row.prompt_length] = 200
    row.input_ids[row.prompt_length :] = np.where(row.input_ids[row.prompt_length :] == 200, 201, 1)
    assert row.prompt_length > 3
    gradient(network, [[row]], settings, accelerator)
    states = network.base_model(torch.tensor(row.input_ids[None]).long()).last_hidden_state[0]
    states = states[row.prompt_length - 1 : -1].detach()
    probabilities = (states @ network.lm_head.weight.T).softmax(-1)
    expected = row.weight * probabilities[:, 200] @ states / row.completion_tokens
    torch.testing.assert_close(network.lm_head.weight.grad[200], expected, rtol=1e-4, atol=1e-6)


@every_method
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_runs_give_equal_bytes_and_learn(
    run: Any, dtype: str, changes: dict[str, Any], model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    compute = compute.model_copy(update={"dtype": dtype})
    settings = settings.model_copy(update=changes)
    every = 0 if settings.teacher_only else 5
    first = run(model, rows, settings, compute, tmp_path / "a", every)
    assert first == run(model, rows, settings, compute, tmp_path / "b", every, save_every=1000)
    lines = [line.split(",") for line in first[1].decode().splitlines()]
    assert lines[0] == [*loop.CURVE, *loop.MOVING], "these rows have weights"
    assert [line[0] for line in lines[1:]] == [str(i + 1) for i in range(12)]
    # Easy rows weigh more the better they are learnt, so only the terms before weighting tell.
    columns = (1,) if settings.curriculum >= 0 else (2, 3)
    losses = [sum(float(line[column]) for column in columns) for line in lines[1:]]
    assert sum(losses[-3:]) < sum(losses[:3])


ALPHA_TELLS: dict[str, dict[str, Any]] = {"default": {}, "cosine": {"schedule": "cosine"}}
MORE_COUNTS = {
    "spikes": {"spike_factor": 20.0},
    "balance": {"balance": True},
    "curriculum": {"curriculum": 1.0},
    "reasoning": {"reasoning": 0.1},
    "teacher only": {"teacher_only": ["target"]},
    "weights": {},
    "without labels": {},
    "phases": {"phases": [Phase(), Phase(epochs=1)]},
    "own answers": {"on_policy": OnPolicy(teacher="t", max_new_tokens=9, batch_size=2, top_k=4)},
}


@pytest.mark.parametrize("name", [*ALPHA_TELLS, *MORE_COUNTS])
def test_the_curve_has_weighted_terms_where_alpha_does_not_tell_them(
    name: str, run: Any, model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    def given(count: int, **_: Any) -> list[Any]:
        chosen = rows(8, unlabelled_every=4 if name == "without labels" else 0)
        return chosen if name == "weights" else [replace(row, weight=1.0) for row in chosen]

    changes = (ALPHA_TELLS | MORE_COUNTS)[name]
    sampler: dict[str, Any] = {"sampler": lambda *_: given(8)} if "on_policy" in changes else {}
    _, text = run(model, given, settings.model_copy(update=changes), compute, tmp_path, **sampler)
    columns, *lines = (line.split(",") for line in text.decode().splitlines())
    assert columns == [*loop.CURVE, *(loop.MOVING if name in MORE_COUNTS else ())]
    told = [(1 - settings.alpha) * float(task) + settings.alpha * float(kl) for _, _, task, kl, *_ in lines]
    if name in ALPHA_TELLS:
        assert [float(line[1]) for line in lines] == pytest.approx(told, rel=1e-6)


@pytest.mark.parametrize("killed_at", [0, 3, 4, 8, 11])
def test_a_killed_run_goes_on_to_the_same_bytes(
    run: Any,
    killed_at: int,
    model: Any,
    rows: Any,
    settings: Any,
    compute: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: Any,
) -> None:
    whole = run(model, rows, settings, compute, tmp_path / "whole")
    accumulate = loop.accumulate
    steps = []

    def counted(*arguments: Any) -> Any:
        steps.append(arguments[-1])
        return accumulate(*arguments)

    kill_at(killed_at)
    with pytest.raises(KeyboardInterrupt):
        run(model, rows, settings, compute, tmp_path / "killed")
    assert not (tmp_path / "killed" / "curve.csv").exists()
    monkeypatch.setattr(loop, "accumulate", counted)
    assert run(model, rows, settings, compute, tmp_path / "killed") == whole
    assert steps == list(range(killed_at // 3 * 3, 12))
    assert [p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()] == ["step-12"]


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from conftest import SETTINGS, make_rows, tiny_model
from q2t.config import Compute
from q2t.distillation import checkpoint, loop
folder, at = Path(sys.argv[1]), int(sys.argv[3])
save = checkpoint.save
def dying(checkpoints, step, *rest, **more):
    save(checkpoints, step, *rest, **more)
    if step == at:
        # The next checkpoint is half written when the process dies.
        (checkpoints / f"step-{step + 1}.partial").mkdir()
        (checkpoints / f"step-{step + 1}.partial" / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save = dying
loop.train(tiny_model(), make_rows(22, unlabelled_every=5), SETTINGS, seed=3,
    compute=Compute(threads=1, dtype="float32", device="cpu"),
    checkpoints=folder / "checkpoints", curve=folder / "curve.csv", save_every=3)
"""


def test_sigkill(run: Any, model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(here.parents[1])}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "killed"), str(here), "6"], env=environment, check=False
    )
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoints" / "step-6").is_dir()
    resumed = run(model, rows, settings, compute, tmp_path / "killed")
    assert resumed == run(model, rows, settings, compute, tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_before_the_step(
    model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    network, bad = model(), rows(4)
    bad[2].top_logprobs[0, 0] = np.nan
    before = [parameter.clone() for parameter in network.parameters()]
    with pytest.raises(ValueError, match=r"loss is nan at step 1, rows .*r2"):
        loop.train(
            network,
            bad,
            settings,
            seed=0,
            compute=compute,
            checkpoints=tmp_path / "checkpoints",
            curve=tmp_path / "curve.csv",
        )
    assert all(map(torch.equal, network.parameters(), before))
    assert not (tmp_path / "curve.csv").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_step(
    model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    """As where a backward pass overflows behind a finite loss: in the third step, here."""
    network, steps = model(), []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        steps.append(network.lm_head.weight.detach().clone())
        return gradient * (torch.inf if len(steps) == 3 else 1)

    network.model.norm.weight.register_hook(overflow)  # called once a step: four rows are one micro-batch
    with pytest.raises(ValueError, match=r"gradient is (inf|nan) at step 3, rows r\d"):
        loop.train(
            network,
            rows(12),
            settings,
            seed=0,
            compute=compute,
            checkpoints=tmp_path / "checkpoints",
            curve=tmp_path / "curve.csv",
        )
    assert torch.equal(network.lm_head.weight, steps[2]) and not torch.equal(steps[1], steps[2])
    assert not (tmp_path / "curve.csv").exists()


def test_without_distillation_labels_teach_nothing(
    run: Any, model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    def other(count: int, **named: Any) -> Any:
        return [replace(row, tail_logprob=row.tail_logprob - 1) for row in rows(count, **named)]

    task = settings.model_copy(update={"alpha": 0.0})
    plain = run(model, rows, task, compute, tmp_path / "plain")[0]
    assert run(model, other, task, compute, tmp_path / "changed")[0] == plain
    assert run(model, other, settings, compute, tmp_path / "distilled")[0] != plain


def test_every_epoch_has_all_rows_in_another_order(
    run: Any, model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate, seen = loop.accumulate, []

    def recorded(network: Any, micro_batches: Any, *rest: Any) -> Any:
        seen.append([row.id for micro in micro_batches for row in micro])
        return accumulate(network, micro_batches, *rest)

    monkeypatch.setattr(loop, "accumulate", recorded)
    run(model, rows, settings, compute, tmp_path)
    first, second = (sum(epoch, []) for epoch in (seen[:6], seen[6:]))
    assert sorted(first) == sorted(second) == sorted(f"r{i}" for i in range(22))
    assert first != second


def test_tied_embeddings_stay_tied(model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path) -> None:
    for _ in range(2):  # the second call loads the last checkpoint
        trained = loop.train(
            model(),
            rows(8),
            settings,
            seed=0,
            compute=compute,
            checkpoints=tmp_path / "checkpoints",
            curve=tmp_path / "curve.csv",
            save_every=1,
        )
        assert trained.lm_head.weight is trained.model.embed_tokens.weight
        assert not trained.training
    assert collate(rows(1)).input_ids.dtype == torch.int64
