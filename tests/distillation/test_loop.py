"""The gradient, and the bytes of a run: killed, resumed or neither."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

from q2t.config import Optimizer, Phase
from q2t.distillation import loop
from q2t.distillation.batches import collate

METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "reverse_kl": {"divergence": "reverse_kl", "temperature": 1.0},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "labels alone": {"alpha": 1.0},
    "balance": {"balance": True, "divergence": "reverse_kl"},
    "hard rows": {"curriculum": 1.0},
    "easy rows": {"curriculum": -0.5},
    "teacher only": {"teacher_only": ["target"]},
    "cosine": {"schedule": "cosine", "spike_factor": 20.0},
}
every_method = pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)


@pytest.fixture
def accelerator() -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def weights(model: Any, path: Path) -> bytes:
    save_model(model, str(path))
    return path.read_bytes()


def gradient(model: Any, micro_batches: list[Any], settings: Any, accelerator: Any) -> Any:
    model.zero_grad()
    losses = loop.accumulate(model, micro_batches, settings, accelerator)
    return losses, [p.grad.clone() for p in model.parameters()]


@every_method
@pytest.mark.parametrize("count", [8, 5])
def test_the_split_into_micro_batches_changes_nothing(
    count: int, changes: dict[str, Any], model: Any, rows: Any, settings: Any, accelerator: Any
) -> None:
    """1, 4 and 8 micro-batches, unequal lengths, a last short one, rows without labels, pad == eos."""
    settings = settings.model_copy(update=changes)
    network, chosen = model(dtype=torch.float64), rows(count, unlabelled_every=3)
    whole = gradient(network, [chosen], settings, accelerator)
    for size in (2, 1, 3):
        split = [chosen[i : i + size] for i in range(0, count, size)]
        torch.testing.assert_close(gradient(network, split, settings, accelerator), whole)


def test_the_loss_is_that_of_the_definition(model: Any, rows: Any, settings: Any, accelerator: Any) -> None:
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


@every_method
def test_only_positions_that_predict_completions_get_a_gradient(
    changes: dict[str, Any], model: Any, rows: Any, settings: Any, accelerator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last hidden states, whatever the method."""
    states: list[torch.Tensor] = []

    def predicting(network: Any, batch: Any) -> torch.Tensor:
        states.append(network.base_model(batch.input_ids).last_hidden_state)
        states[-1].retain_grad()
        return states[-1][batch.predicts]

    monkeypatch.setattr(loop.batches, "predicting_states", predicting)
    chosen = rows(6, unlabelled_every=3)
    gradient(model(), [chosen], settings.model_copy(update=changes), accelerator)
    learnt = states[0].grad.abs().sum(2) > 0
    expected = torch.zeros_like(learnt)
    for i, row in enumerate(chosen):
        expected[i, row.prompt_length - 1 : len(row.input_ids) - 1] = True
    assert (learnt == expected).all()


def test_prompt_tokens_are_not_learnt(model: Any, rows: Any, settings: Any, accelerator: Any) -> None:
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


def run(
    model: Any, rows: Any, settings: Any, compute: Any, folder: Path, every: int = 5, **more: Any
) -> tuple[bytes, bytes]:
    trained = loop.train(
        model(),
        rows(22, unlabelled_every=every),
        settings,
        seed=3,
        compute=compute,
        checkpoints=folder / "checkpoints",
        curve=folder / "curve.csv",
        **{"save_every": 3, **more},
    )
    return weights(trained, folder / "model"), (folder / "curve.csv").read_bytes()


@every_method
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_runs_give_equal_bytes_and_learn(
    dtype: str, changes: dict[str, Any], model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    compute = compute.model_copy(update={"dtype": dtype})
    settings = settings.model_copy(update=changes)
    every = 0 if settings.teacher_only else 5
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = run(model, rows, settings, compute, tmp_path / "a", every)
    assert first == run(model, rows, settings, compute, tmp_path / "b", every, save_every=1000)
    lines = [line.split(",") for line in first[1].decode().splitlines()]
    assert lines[0] == [*loop.CURVE, *(loop.MORE if {"spike_factor", "balance", "curriculum"} & {*changes} else ())]
    assert [line[0] for line in lines[1:]] == [str(i + 1) for i in range(12)]
    # Easy rows weigh more the better they are learnt, so only the terms before weighting tell.
    columns = (1,) if settings.curriculum >= 0 else (2, 3)
    losses = [sum(float(line[column]) for column in columns) for line in lines[1:]]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("killed_at", [0, 3, 4, 8, 11])
def test_a_killed_run_goes_on_to_the_same_bytes(
    killed_at: int,
    model: Any,
    rows: Any,
    settings: Any,
    compute: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = run(model, rows, settings, compute, tmp_path / "whole")
    accumulate = loop.accumulate
    steps = []

    def killed(*arguments: Any) -> Any:
        if arguments[-1] == killed_at:
            raise KeyboardInterrupt
        return accumulate(*arguments)

    def counted(*arguments: Any) -> Any:
        steps.append(arguments[-1])
        return accumulate(*arguments)

    monkeypatch.setattr(loop, "accumulate", killed)
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
from q2t.distillation import loop
folder, at = Path(sys.argv[1]), int(sys.argv[3])
save = loop._save
def dying(checkpoints, step, *rest):
    save(checkpoints, step, *rest)
    if step == at:
        # The next checkpoint is half written when the process dies.
        (checkpoints / f"step-{step + 1}.partial").mkdir()
        (checkpoints / f"step-{step + 1}.partial" / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
loop._save = dying
loop.train(tiny_model(), make_rows(22, unlabelled_every=5), SETTINGS, seed=3,
    compute=Compute(threads=1, dtype="float32", device="cpu"),
    checkpoints=folder / "checkpoints", curve=folder / "curve.csv", save_every=3)
"""


def test_sigkill(model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
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
    before = weights(network, tmp_path / "before")
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
    assert weights(network, tmp_path / "after") == before
    assert not (tmp_path / "curve.csv").exists()


def test_plain_settings_ignore_labels(model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path) -> None:
    plain = Optimizer(**settings.model_dump(include=set(Optimizer.model_fields)))
    for name in ("plain", "task"):
        (tmp_path / name).mkdir()
    task = run(model, rows, settings.model_copy(update={"alpha": 0.0, "temperature": 1.0}), compute, tmp_path / "task")
    assert run(model, rows, plain, compute, tmp_path / "plain") == task
    assert task != run(model, rows, settings, compute, tmp_path)


def test_every_epoch_has_all_rows_in_another_order(
    model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


PHASED = [Phase(epochs=1, alpha=1.0), Phase(epochs=1, learning_rate=0.002, schedule="cosine", share=0.5, alpha=0.0)]


@pytest.mark.parametrize("killed_at", [2, 6, 7])
def test_a_run_killed_inside_any_phase_goes_on_to_the_same_bytes(
    killed_at: int,
    model: Any,
    rows: Any,
    settings: Any,
    compute: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six steps and three, with a checkpoint every second step, so on the border too; one curve."""
    settings = settings.model_copy(update={"phases": PHASED, "balance": True, "spike_factor": 1.5})
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = run(model, rows, settings, compute, tmp_path / "whole", save_every=1000)
    accumulate = loop.accumulate

    def killed(*arguments: Any) -> Any:
        if arguments[-1] == killed_at:
            raise KeyboardInterrupt
        return accumulate(*arguments)

    monkeypatch.setattr(loop, "accumulate", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, rows, settings, compute, tmp_path / "killed", save_every=2)
    monkeypatch.setattr(loop, "accumulate", accumulate)
    assert run(model, rows, settings, compute, tmp_path / "killed", save_every=2) == whole
    lines = [line.split(",") for line in whole[1].decode().splitlines()]
    assert lines[0] == [*loop.CURVE, *loop.MORE]
    assert [(line[0], line[-2]) for line in lines[1:]] == [(str(i + 1), "1" if i < 6 else "2") for i in range(9)]


def test_a_phase_starts_with_fresh_moments(
    model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two phases give what two runs, one after the other, give."""
    plan = loop.phases.plan
    phased = settings.model_copy(update={"phases": PHASED})
    for name in ("both", "first", "second"):
        (tmp_path / name).mkdir()
    both = run(model, rows, phased, compute, tmp_path / "both")
    network = model()
    for phase, name in ((1, "first"), (2, "second")):

        def only(*arguments: Any, phase: int = phase, **named: Any) -> Any:
            return [step for step in plan(*arguments, **named) if step.phase == phase]

        monkeypatch.setattr(loop.phases, "plan", only)
        apart = run(lambda: network, rows, phased, compute, tmp_path / name)
    assert apart[0] == both[0]


def test_a_spike_is_skipped_and_counted(
    model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and moments are those of before; the next step is taken."""
    accumulate, before = loop.accumulate, {}

    def spiky(network: Any, micro_batches: Any, *rest: Any) -> Any:
        before[rest[-1]] = network.model.norm.weight.detach().clone()
        terms = accumulate(network, micro_batches, *rest)
        if rest[-1] == 10:
            for parameter in network.parameters():
                parameter.grad *= 1000
        return terms

    monkeypatch.setattr(loop, "accumulate", spiky)
    _, curve = run(model, rows, settings.model_copy(update={"spike_factor": 50.0}), compute, tmp_path)
    lines = [line.split(",") for line in curve.decode().splitlines()]
    assert [line[-1] for line in lines] == ["skipped", *["0"] * 10, "1", "0"]
    assert (before[10] == before[11]).all() and (before[9] != before[10]).any()


def test_a_spike_is_one_against_the_running_median() -> None:
    norms = [1.0] * 5 + [3.0] * 6
    assert loop.is_spike(31.0, norms, 10.0) and not loop.is_spike(29.0, norms, 10.0)
    assert not loop.is_spike(31.0, norms, None)
    assert not loop.is_spike(1e9, [1.0] * (loop.FEWEST - 1), 10.0)
    # A level that lasts is no spike: after half a window training goes on.
    norms = [1.0] * 100
    skipped = 0
    while loop.is_spike(100.0, norms[-loop.WINDOW :], 10.0):
        norms.append(100.0)
        skipped += 1
    assert skipped == loop.WINDOW // 2


def test_a_curriculum_weights_both_terms(model: Any, rows: Any, settings: Any, accelerator: Any) -> None:
    """By 1 - p of each row, p being what the row alone has for a mean probability."""
    network, chosen = model(dtype=torch.float64), rows(4)
    settings = settings.model_copy(update={"alpha": 0.25})
    alone = [gradient(network, [[row]], settings, accelerator)[0] for row in chosen]
    together, _ = gradient(network, [chosen], settings.model_copy(update={"curriculum": 1.0}), accelerator)
    tokens = [row.completion_tokens for row in chosen]
    factors = [1 - np.exp(-terms.cross_entropy) for terms in alone]
    for name in ("total", "weighted_cross_entropy", "weighted_distillation"):
        terms = [getattr(terms, name) for terms in alone]
        expected = sum(n * f * term for n, f, term in zip(tokens, factors, terms, strict=True)) / sum(tokens)
        assert getattr(together, name) == pytest.approx(expected)
    assert together.cross_entropy < sum(terms.cross_entropy for terms in alone)


def test_balance_comes_from_the_phases_curve(
    model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    """Each step's factor is the past's cross-entropy over its divergence, and a phase starts anew with 1."""
    chosen = rows(8)
    for row in chosen:
        object.__setattr__(row, "weight", 1.0)
    given = settings.model_copy(update={"balance": True, "phases": [Phase(epochs=2), Phase(epochs=1)]})
    curve = tmp_path / "curve.csv"
    loop.train(model(), chosen, given, seed=0, compute=compute, checkpoints=tmp_path / "checkpoints", curve=curve)
    table = np.genfromtxt(curve, delimiter=",", names=True)
    factors = table["weighted_kl"] / table["kl"] / settings.alpha
    for step in range(6):
        past = slice(0 if step < 4 else 4, step)
        expected = table["cross_entropy"][past].sum() / table["kl"][past].sum() if step not in (0, 4) else 1.0
        assert factors[step] == pytest.approx(expected, rel=1e-4), step
    np.testing.assert_allclose(
        table["weighted_cross_entropy"], (1 - settings.alpha) * table["cross_entropy"], rtol=1e-4
    )
    np.testing.assert_allclose(table["loss"], table["weighted_cross_entropy"] + table["weighted_kl"], rtol=1e-4)


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
