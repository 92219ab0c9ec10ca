"""What changes as a run goes: phases, skipped steps, the curriculum and the balance of the terms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from q2t.config import Adapter, OnPolicy, Phase
from q2t.distillation import loop

PHASED = [Phase(epochs=1, alpha=1.0), Phase(epochs=1, learning_rate=0.002, schedule="cosine", share=0.5, alpha=0.0)]


@pytest.mark.parametrize("killed_at", [2, 6, 7])
def test_a_run_killed_inside_any_phase_goes_on_to_the_same_bytes(
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
    """Six steps and three, with a checkpoint every second step, so on the border too; one curve."""
    settings = settings.model_copy(update={"phases": PHASED, "balance": True, "spike_factor": 1.5})
    whole = run(model, rows, settings, compute, tmp_path / "whole", save_every=1000)
    accumulate = loop.accumulate
    kill_at(killed_at)
    with pytest.raises(KeyboardInterrupt):
        run(model, rows, settings, compute, tmp_path / "killed", save_every=2)
    monkeypatch.setattr(loop, "accumulate", accumulate)
    assert run(model, rows, settings, compute, tmp_path / "killed", save_every=2) == whole
    lines = [line.split(",") for line in whole[1].decode().splitlines()]
    assert lines[0] == [*loop.CURVE, *loop.MOVING]
    assert [(line[0], line[-2]) for line in lines[1:]] == [(str(i + 1), "1" if i < 6 else "2") for i in range(9)]


OWN = Phase(epochs=2, on_policy=OnPolicy(teacher="t", max_new_tokens=9, batch_size=2, top_k=4))
TRAINED = {
    "lora": {"adapter": Adapter(kind="lora", rank=2, modules=["q_proj", "up_proj"])},
    "ia3": {"adapter": Adapter(kind="ia3", modules=["k_proj", "down_proj"])},
    "frozen and sparse": {"freeze": ["model.embed_tokens.*"], "sparsity": 0.01},
    "own answers": {"phases": [Phase(epochs=1), OWN]},
}


@pytest.mark.parametrize("changes", TRAINED.values(), ids=TRAINED)
def test_other_weights_and_other_rows_resume_to_the_same_bytes(
    changes: Any,
    run: Any,
    model: Any,
    rows: Any,
    settings: Any,
    compute: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: Any,
) -> None:
    """The own answers depend on the weights as the phase begins; asked again by another student, they would differ."""
    asked = []

    def sampler(network: Any, chosen: Any, on_policy: Any, phase: int, journal: Path) -> Any:
        asked.append((phase, len(chosen)))
        seed = int(network.model.layers[0].mlp.up_proj.weight.double().sum() * 1e6) % 2**31
        return rows(10, seed=seed)

    settings = settings.model_copy(update=changes)
    whole = run(model, rows, settings, compute, tmp_path / "whole", save_every=1000, sampler=sampler)
    accumulate = loop.accumulate
    kill_at(8)
    with pytest.raises(KeyboardInterrupt):
        run(model, rows, settings, compute, tmp_path / "killed", save_every=3, sampler=sampler)
    monkeypatch.setattr(loop, "accumulate", accumulate)
    assert run(model, rows, settings, compute, tmp_path / "killed", save_every=3, sampler=sampler) == whole
    assert asked == ([(2, 22)] * 2 if "phases" in changes else [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_that_are_computed_again_change_nothing(
    dtype: str,
    run: Any,
    model: Any,
    rows: Any,
    settings: Any,
    compute: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does it that each layer's weights are then cast when they are needed, and no copies kept."""
    compute = compute.model_copy(update={"dtype": dtype})
    passes = []
    forward = LlamaMLP.forward
    cached = torch.is_autocast_cache_enabled
    monkeypatch.setattr(LlamaMLP, "forward", lambda *given: (passes.append(cached()), forward(*given))[1])
    kept = run(model, rows, settings, compute, tmp_path / "kept")
    once = len(passes)
    again = settings.model_copy(update={"gradient_checkpointing": True})
    assert run(model, rows, again, compute, tmp_path / "again") == kept
    assert len(passes) - once == 2 * once
    if dtype == "bfloat16":
        assert all(passes[:once]) and not any(passes[once:])


def test_a_phase_starts_with_fresh_moments(
    run: Any, model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two phases give what two runs, one after the other, give."""
    plan = loop.phases.plan
    phased = settings.model_copy(update={"phases": PHASED})
    both = run(model, rows, phased, compute, tmp_path / "both")
    network = model()
    for phase, name in ((1, "first"), (2, "second")):

        def only(*arguments: Any, phase: int = phase, **named: Any) -> Any:
            return [step for step in plan(*arguments, **named) if step.phase == phase]

        monkeypatch.setattr(loop.phases, "plan", only)
        apart = run(lambda: network, rows, phased, compute, tmp_path / name)
    assert apart[0] == both[0]


def test_a_spike_is_skipped_and_counted(
    run: Any, model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and moments are those of before; the next step is taken."""
    accumulate, before = loop.accumulate, {}

    def spiky(network: Any, micro_batches: Any, *rest: Any) -> Any:
        before[rest[-1]] = network.student.model.norm.weight.detach().clone()
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


def test_a_curriculum_weights_both_terms(gradient: Any, model: Any, rows: Any, settings: Any, accelerator: Any) -> None:
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
