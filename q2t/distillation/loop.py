"""The training loop: exact resume, and a gradient that depends neither on how a step is cut into micro-batches nor
on how many processes share them."""

import math
import os
import statistics
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from q2t.config import Compute, Distill, OnPolicy
from q2t.distillation import adapters, batches, checkpoint, labels, phases, sharding, weighting
from q2t.distillation.objective import Losses, Objective
from q2t.distillation.online import OnlineTeacher
from q2t.distillation.rows import Row

CURVE = ("step", "loss", "cross_entropy", "kl", "learning_rate", "gradient_norm")
MOVING = ("weighted_cross_entropy", "weighted_kl", "phase", "skipped")
TERMS = ("hidden", "attention", "spans")
ONLINE = (*TERMS, "numerals", *(f"weighted_{term}" for term in TERMS))
SPARSE = ("sparsity",)
"""Columns of the curve: always CURVE, and the others where the run has what they show."""
WINDOW = 50
"""Steps of a phase that the running median of the gradient's norm, and the running means of the terms, are of."""
FEWEST = 10
"""Steps of a phase before any is skipped."""

Sampler = Callable[[Any, list[Row], OnPolicy, int, Path], list[Row]]
"""The student's own answers to the questions of rows, with a teacher's labels; see `on_policy`."""


def train(
    model: Any,
    rows: Sequence[Row],
    settings: Distill,
    *,
    seed: int,
    compute: Compute,
    checkpoints: Path,
    curve: Path,
    teacher: OnlineTeacher | None = None,
    sampler: Sampler | None = None,
    save_every: int = 50,
) -> Any:
    """Train in place by AdamW, warm-up and decay, and gradient clipping at 1.0, phase after phase.

    Killed and called again with the same arguments, it goes on from the last checkpoint and gives the bytes
    of an uninterrupted run. With `compute.dtype` bfloat16, matrix products run in it and the weights stay
    float32. Started by `accelerate launch`, the processes deal a step's micro-batches out among them and add
    their gradients up; the first one alone writes.

    Args:
        model: a causal language model; comes back in float32, in evaluation mode, adapters merged.
        rows: labelled or not; without labels, a row is learnt by cross-entropy alone.
        checkpoints: a folder of this run alone, its name depending on all that shapes the result; safe to
            delete once the model is published.
        curve: the CSV, one line per step: `loss` is what is minimised, the other two are before weighting
            (`kl` is whichever divergence was chosen), all in nats per completion token of the step; the
            gradient's norm is before clipping. MOVING follows where what counts is more than alpha (phases,
            on_policy, balance, curriculum, reasoning, teacher_only, weights of rows, rows without labels) or a
            step may be skipped (spike_factor), ONLINE where there is a teacher beside, SPARSE with a penalty.
        teacher: of `settings.online`.
        sampler: for phases with `on_policy`.
        save_every: steps between checkpoints.

    Raises:
        ValueError: the loss or the gradient is not finite; names the step and the rows. The weights are
            those before that step. Or a phase has no rows.
    """
    accelerator = _accelerator(compute, settings)
    if sharded := sharding.asked_for() and accelerator.num_processes > 1:
        sharding.check(settings)
    attention = model.config._attn_implementation
    device = torch.device(compute.device) if accelerator.num_processes == 1 else accelerator.device
    if (device.type == "cpu" and compute.dtype == "bfloat16") or (settings.online and settings.online.attention):
        # The fused kernel's bf16 backward is slow there: 41 ms a layer against 18, an eighth of a step. And fused
        # attention has no maps.
        model.set_attn_implementation("eager")
    model.to(torch.float32).train()
    model.get_input_embeddings().padding_idx = None  # its row has no gradient, and where pad == eos it is no padding
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.adapter:
        adapters.adapt(model, settings.adapter, seed)
    adapters.freeze(model, settings.freeze)
    if any(phase.sparsity for phase in settings.in_phases()):
        adapters.trained_gates(model)  # refused before a phase is paid for
    objective = Objective(model, teacher)
    if sharded:
        sharding.shard(objective, device)
    else:
        objective.to(device)
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    vectors = [p for name, p in trained.items() if p.dim() < 2 or "ia3_" in name]  # IA3's are factors, which begin at 1
    matrices = [p for name, p in trained.items() if p.dim() > 1 and "ia3_" not in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        fused=True,
    )

    def answers(phase: Distill, number: int, chosen: list[Row]) -> list[Row]:
        # Kept, so that a resumed run learns from what an uninterrupted one would.
        kept = checkpoints / f"answers-{number}.parquet"
        if accelerator.is_main_process and not kept.exists():
            assert phase.on_policy and sampler, "the stage gives a sampler where a phase is on policy"
            own = sampler(model, chosen, phase.on_policy, number, kept.with_suffix(".jsonl"))
            labels.write(kept, own, top_k=phase.on_policy.top_k, teachers={})
        accelerator.wait_for_everyone()
        return labels.read(kept)

    plan = phases.plan(rows, settings, seed=seed, answers=answers)
    accelerator.wait_for_everyone()  # the first one may have taken its folder back only now
    first, lines = checkpoint.resume(checkpoints, objective, optimizer)
    total = phases.tokens(rows, settings, seed=seed)
    silent = not accelerator.is_main_process
    with tqdm(total=total, desc="train", unit="tok", unit_scale=True, disable=silent) as bar:
        for step, planned in enumerate(plan):
            tokens = sum(len(row.input_ids) for micro in planned.micro_batches for row in micro)
            if step < first:
                bar.initial = bar.n = bar.n + tokens  # done before: no speed is read from it
                continue
            # Per step, so that a resumed run draws what an uninterrupted one would (dropout).
            torch.manual_seed(seed * 1_000_003 + step)
            if planned.place == 0:  # moments of another loss would steer this phase's first steps
                optimizer.state.clear()
            past = lines[step - min(planned.place, WINDOW) :]
            scales = _balance(past) if planned.settings.balance else weighting.EVEN
            losses = accumulate(objective, planned.micro_batches, planned.settings, accelerator, scales, step)
            sparsity = planned.settings.sparsity
            penalty = adapters.shrink(model, sparsity) if sparsity else 0.0
            norm = float(sharding.whole(clip_grad_norm_(trained.values(), 1.0)))
            if not math.isfinite(norm):
                raise _not_finite("gradient", norm, step, [row for micro in planned.micro_batches for row in micro])
            skipped = is_spike(norm, [float(line["gradient_norm"]) for line in past], settings.spike_factor)
            for group in optimizer.param_groups:
                group["lr"] = planned.learning_rate
            if not skipped:
                optimizer.step()
            optimizer.zero_grad()
            lines.append(_line(step + 1, losses, penalty, planned.learning_rate, norm, planned.phase, skipped))
            bar.update(tokens)
            bar.set_postfix(step=f"{step + 1}", loss=f"{losses.total:.4f}", refresh=False)
            if (step + 1) % save_every == 0:
                checkpoint.save(checkpoints, step + 1, objective, optimizer, lines, write=accelerator.is_main_process)
    if sharded:
        model = sharding.gathered(model)
    if settings.adapter:
        adapters.merge(model)
    model.requires_grad_(True)
    model.gradient_checkpointing_disable()
    model.set_attn_implementation(attention)
    if accelerator.is_main_process:
        _write_curve(curve, settings, rows, lines)
    accelerator.wait_for_everyone()
    return model.eval()


def accumulate(
    objective: Objective,
    micro_batches: Sequence[Sequence[Row]],
    settings: Distill,
    accelerator: Any,
    scales: weighting.Scales = weighting.EVEN,
    step: int = 0,
) -> Losses:
    """Add a step's gradient, of all processes, to the parameters.

    Args:
        micro_batches: of the step; every process takes its share of them.
        scales: factors on the terms, beside their weights.

    Raises:
        ValueError: the loss of a micro-batch is not finite; names the step and the rows.
    """
    tokens = sum(row.completion_tokens for micro in micro_batches for row in micro)
    dealt = list(micro_batches[accelerator.process_index :: accelerator.num_processes])
    share = math.ceil(len(micro_batches) / accelerator.num_processes)
    sharded = sharding.is_sharded(objective)
    shards = accelerator.num_processes if sharded else 1
    size = _at_once(share, micro_batches, objective, settings, accelerator.device.type, shards)
    own = [list(chain(*dealt[i : i + size])) for i in range(0, len(dealt), size)]
    # Whoever has shards of a layer takes part whenever one runs: with rows that count nothing, if it has no others.
    idle = sharded and len(own) < math.ceil(share / size)
    sums = [0.0] * len(Losses._fields)
    wrong: Sequence[Row] = ()
    for micro in own:
        with accelerator.autocast():
            total, losses = objective(micro, settings, scales)
        if not all(map(math.isfinite, losses)):
            wrong = wrong or micro
        accelerator.backward(total / tokens)
        sums = [a + b for a, b in zip(sums, losses, strict=True)]
    if idle:
        with accelerator.autocast():
            total, _ = objective(micro_batches[-1], settings, scales)
        accelerator.backward(total * 0.0)
    if accelerator.num_processes > 1:
        if not sharded:
            _add_up(objective if settings.online else objective.student, accelerator)
        sums = _reduced(sums, accelerator)
    if not all(map(math.isfinite, sums)):
        raise _not_finite("loss", sums[0], step, wrong or [row for micro in micro_batches for row in micro])
    return Losses(*(value / tokens for value in sums))


def _at_once(
    count: int,
    micro_batches: Sequence[Sequence[Row]],
    objective: Objective,
    settings: Distill,
    device: str,
    shards: int,
) -> int:
    """As `batches.at_once`, of what all processes know; each holds one of so many shards of the student."""
    if settings.online and settings.online.attention:
        return 1  # maps grow with the square of a row's length
    tokens = max(map(len, micro_batches)) * max(len(row.input_ids) for micro in micro_batches for row in micro)
    config, held = objective.student.config, batches.held(objective) // shards
    if objective.teacher:
        held += batches.held(objective.teacher.model)
    return batches.at_once(count, tokens, config, device, held, checkpointing=settings.gradient_checkpointing)


def is_spike(norm: float, earlier: Sequence[float], factor: float | None) -> bool:
    """Whether a gradient's norm is above `factor` times the median of earlier ones, skipped ones among them.

    PaLM leaves the batches of a spike out, since only together with the weights of that time they do harm (arXiv
    2204.02311, 5.1); it goes back for that, where here the step has not been taken yet. After half a window of high
    norms these are the median, and training goes on.
    """
    return factor is not None and len(earlier) >= FEWEST and norm > factor * statistics.median(earlier)


def _accelerator(compute: Compute, settings: Distill) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs

    # A process may train twice with other settings, and accelerate would keep the first ones.
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = "bf16" if compute.dtype == "bfloat16" else "no"
    handlers = [
        # The others wait while the first one samples and labels the student's own answers.
        InitProcessGroupKwargs(timeout=timedelta(days=1)),
        # Cached, the bfloat16 copies of all layers would stay in memory, where shards have one layer whole at a time,
        # and checkpoints one layer's activations.
        AutocastKwargs(cache_enabled=not (sharding.asked_for() or settings.gradient_checkpointing)),
    ]
    cpu = torch.device(compute.device).type == "cpu"
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers)


def _add_up(module: torch.nn.Module, accelerator: Any) -> None:
    """Sum of the gradients of all processes, which every process then has."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(own, "sum")


def _reduced(sums: list[float], accelerator: Any) -> list[float]:
    total: Tensor = accelerator.reduce(torch.tensor(sums, dtype=torch.float64, device=accelerator.device), "sum")
    return total.tolist()


def _balance(past: Sequence[checkpoint.Line]) -> weighting.Scales:
    terms = {name: [float(line[name]) for line in past] for name in ("cross_entropy", "kl", *TERMS)}
    task = terms.pop("cross_entropy")
    return weighting.Scales(*(weighting.balance(task, values) for values in terms.values()))


def _line(
    step: int, losses: Losses, penalty: float, learning_rate: float, norm: float, phase: int, skipped: bool
) -> checkpoint.Line:
    numbers = {
        "loss": losses.total + penalty,
        "cross_entropy": losses.cross_entropy,
        "kl": losses.distillation,
        "learning_rate": learning_rate,
        "gradient_norm": norm,
        "weighted_cross_entropy": losses.weighted_cross_entropy,
        "weighted_kl": losses.weighted_distillation,
        "sparsity": penalty,
    } | {name: getattr(losses, name) for name in ONLINE}
    counts = {"step": step, "phase": phase, "skipped": int(skipped)}
    return {key: f"{value:.9g}" for key, value in numbers.items()} | {key: str(n) for key, n in counts.items()}


def _write_curve(curve: Path, settings: Distill, rows: Sequence[Row], lines: Sequence[checkpoint.Line]) -> None:
    asked = settings.phases, settings.spike_factor, settings.balance, settings.curriculum, settings.teacher_only
    labelled = settings.alpha == 0 or (settings.online and settings.online.logits)
    uneven = any(row.weight != 1 or not (labelled or len(row.top_ids)) for row in rows)
    moving = uneven or any(asked) or settings.on_policy is not None or settings.reasoning != 1
    sparse = any(phase.sparsity for phase in settings.in_phases())
    columns = [*CURVE, *(MOVING if moving else ()), *(ONLINE if settings.online else ()), *(SPARSE if sparse else ())]
    table = [columns, *([line[column] for column in columns] for line in lines)]
    curve.parent.mkdir(parents=True, exist_ok=True)
    partial = curve.with_name(curve.name + ".partial")
    partial.write_text("".join(",".join(line) + "\n" for line in table), encoding="utf-8")
    os.replace(partial, curve)


def _not_finite(what: str, value: float, step: int, rows: Sequence[Row]) -> ValueError:
    ids = ", ".join(row.id for row in rows)
    return ValueError(f"{what} is {value} at step {step + 1}, rows {ids}: lower learning_rate, or correct these rows")
