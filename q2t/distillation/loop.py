"""The training loop: exact resume, and a gradient that does not depend on how a step is cut into
micro-batches."""

import json
import math
import os
import re
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from tqdm import tqdm

from q2t.config import Compute, Distill
from q2t.distillation import batches, phases, weighting
from q2t.distillation.labels import Row
from q2t.distillation.losses import Terms, completion_loss

LOGITS = 2**24
"""Logits that exist at one time, 64 MB in float32."""
CURVE = ("step", "loss", "cross_entropy", "kl", "learning_rate", "gradient_norm")
MORE = ("weighted_cross_entropy", "weighted_kl", "phase", "skipped")
"""Columns of the curve where the run is more than one of fixed weights; before MORE comes CURVE."""
WINDOW = 50
"""Steps of a phase that the running median of the gradient's norm, and the running means of the terms, are of."""
FEWEST = 10
"""Steps of a phase before any is skipped."""


def train(
    model: Any,
    rows: Sequence[Row],
    settings: Distill,
    *,
    seed: int,
    compute: Compute,
    checkpoints: Path,
    curve: Path,
    save_every: int = 50,
) -> Any:
    """Train all weights in place by AdamW, warm-up and decay, and gradient clipping at 1.0, phase after phase.

    Killed and called again with the same arguments, it goes on from the last checkpoint and gives the bytes
    of an uninterrupted run. With `compute.dtype` bfloat16, matrix products run in it and the weights stay
    float32.

    Args:
        model: a causal language model; comes back in float32, in evaluation mode.
        rows: labelled or not; without labels, a row is learnt by cross-entropy alone.
        checkpoints: a folder of this run alone, its name depending on all that shapes the result; safe to
            delete once the model is published.
        curve: the CSV, one line per step: `loss` is what is minimised, the other two are before weighting
            (`kl` is whichever divergence was chosen), all in nats per completion token of the step; the
            gradient's norm is before clipping. Where settings change as the run goes (phases, balance,
            curriculum, spike_factor), the columns MORE follow.
        save_every: steps between checkpoints.

    Raises:
        ValueError: the loss or the gradient is not finite; names the step and the rows. The weights are
            those before that step. Or a phase has no rows.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # A process may train twice with other settings, and accelerate would keep the first ones.
    AcceleratorState._reset_state(reset_partial_state=True)
    device = torch.device(compute.device)
    precision = "bf16" if compute.dtype == "bfloat16" else "no"
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    assert accelerator.num_processes == 1, "steps are planned for one process"

    attention = model.config._attn_implementation
    if device.type == "cpu" and precision == "bf16":
        # The fused kernel's bf16 backward is slow there: 41 ms a layer against 18, an eighth of a step.
        model.set_attn_implementation("eager")
    model.to(device, torch.float32).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        fused=True,
    )
    plan = phases.plan(rows, settings, seed=seed)
    tokens = [sum(len(rows[i].input_ids) for micro in step.micro_batches for i in micro) for step in plan]
    first, lines = _resume(checkpoints, model, optimizer)
    bar = tqdm(total=sum(tokens), initial=sum(tokens[:first]), desc="train", unit="tok", unit_scale=True)
    with bar:
        for step in range(first, len(plan)):
            # Per step, so that a resumed run draws what an uninterrupted one would (dropout).
            torch.manual_seed(seed * 1_000_003 + step)
            planned = plan[step]
            if planned.place == 0:  # moments of another loss would steer this phase's first steps
                optimizer.state.clear()
            micro_batches = [[rows[i] for i in micro] for micro in planned.micro_batches]
            past = [
                dict(zip(CURVE, map(float, line), strict=False)) for line in lines[step - min(planned.place, WINDOW) :]
            ]
            scale = 1.0
            if planned.settings.balance:
                scale = weighting.balance([line["cross_entropy"] for line in past], [line["kl"] for line in past])
            terms = accumulate(model, micro_batches, planned.settings, accelerator, scale, step)
            norm = float(accelerator.clip_grad_norm_(model.parameters(), 1.0))
            if not math.isfinite(norm):
                raise _not_finite("gradient", norm, step, [row for micro in micro_batches for row in micro])
            skipped = is_spike(norm, [line["gradient_norm"] for line in past], settings.spike_factor)
            for group in optimizer.param_groups:
                group["lr"] = planned.learning_rate
            if not skipped:
                optimizer.step()
            optimizer.zero_grad()
            values = (terms.total, terms.cross_entropy, terms.distillation, planned.learning_rate, norm)
            weighted = (terms.weighted_cross_entropy, terms.weighted_distillation)
            numbers = [f"{value:.9g}" for value in (*values, *weighted)]
            lines.append([str(step + 1), *numbers, str(planned.phase), str(int(skipped))])
            bar.update(tokens[step])
            bar.set_postfix(step=f"{step + 1}/{len(plan)}", loss=f"{terms.total:.4f}", refresh=False)
            if (step + 1) % save_every == 0:
                _save(checkpoints, step + 1, model, optimizer, lines)
    model.set_attn_implementation(attention)
    curve.parent.mkdir(parents=True, exist_ok=True)
    partial = curve.with_name(curve.name + ".partial")
    moving = settings.phases or settings.spike_factor or settings.balance or settings.curriculum
    columns = CURVE + MORE if moving else CURVE
    text = "".join(",".join(line[: len(columns)]) + "\n" for line in [columns, *lines])
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, curve)
    return model.eval()


def accumulate(
    model: Any,
    micro_batches: Sequence[Sequence[Row]],
    settings: Distill,
    accelerator: Any,
    scale: float = 1.0,
    step: int = 0,
) -> Terms[float]:
    """Add a step's gradient to the parameters; the terms of the loss, as floats per completion token of the step.

    Args:
        scale: factor on distillation, beside alpha.

    Raises:
        ValueError: the loss of a micro-batch is not finite; names the step and the rows.
    """
    tokens = sum(row.completion_tokens for micro in micro_batches for row in micro)
    head = model.get_output_embeddings().weight
    chunk = max(32, LOGITS // head.shape[0] // 32 * 32)
    sums = [0.0] * len(Terms._fields)
    for micro in micro_batches:
        batch = batches.collate(micro).to(head.device)
        with accelerator.autocast():
            hidden = batches.predicting_states(model, batch)
            exact = torch.promote_types(hidden.dtype, torch.float32)
            weights = weighting.token_weights(batch, micro, settings, scale, exact)
            if settings.curriculum:
                factor = weighting.curriculum(hidden, head, batch.targets, micro, settings.curriculum, chunk)
                weights = (weights[0] * factor, weights[1] * factor)
            terms = completion_loss(
                hidden,
                head,
                batch.targets,
                batch.top_ids,
                batch.top_logprobs,
                batch.tail_logprob,
                *weights,
                settings.temperature,
                chunk,
                settings.divergence,
                settings.beta,
            )
        values = [term.item() for term in terms]
        if not all(map(math.isfinite, values)):
            raise _not_finite("loss", values[0], step, micro)
        accelerator.backward(terms.total / tokens)
        sums = [a + b for a, b in zip(sums, values, strict=True)]
    return Terms(*(value / tokens for value in sums))


def is_spike(norm: float, earlier: Sequence[float], factor: float | None) -> bool:
    """Whether a gradient's norm is above `factor` times the median of earlier ones, skipped ones among them.

    PaLM leaves the batches of a spike out, since only together with the weights of that time they do harm (arXiv
    2204.02311, 5.1); it goes back for that, where here the step has not been taken yet. After half a window of high
    norms these are the median, and training goes on.
    """
    return factor is not None and len(earlier) >= FEWEST and norm > factor * statistics.median(earlier)


def _not_finite(what: str, value: float, step: int, rows: Sequence[Row]) -> ValueError:
    ids = ", ".join(row.id for row in rows)
    return ValueError(f"{what} is {value} at step {step + 1}, rows {ids}: lower learning_rate, or correct these rows")


def _save(checkpoints: Path, step: int, model: Any, optimizer: Any, lines: list[list[str]]) -> None:
    """A checkpoint folder appears complete or not at all; older ones go."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for stale in checkpoints.glob("*.partial"):
        shutil.rmtree(stale)
    older = _complete(checkpoints)
    partial = checkpoints / f"step-{step}.partial"
    partial.mkdir()
    save_model(model, str(partial / "model.safetensors"))
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    (partial / "curve.json").write_text(json.dumps(lines), encoding="utf-8")
    os.replace(partial, checkpoints / f"step-{step}")
    for path in older.values():
        shutil.rmtree(path)


def _resume(checkpoints: Path, model: Any, optimizer: Any) -> tuple[int, list[list[str]]]:
    """Steps done and their lines of the curve; weights and optimiser as they were."""
    saved = _complete(checkpoints)
    if not saved:
        return 0, []
    step = max(saved)
    load_model(model, str(saved[step] / "model.safetensors"), device=str(model.device))
    state = torch.load(saved[step] / "optimizer.pt", weights_only=True, map_location=model.device)
    optimizer.load_state_dict(state)
    return step, json.loads((saved[step] / "curve.json").read_text(encoding="utf-8"))


def _complete(checkpoints: Path) -> dict[int, Path]:
    found = {path: re.fullmatch(r"step-(\d+)", path.name) for path in checkpoints.glob("step-*")}
    return {int(match[1]): path for path, match in found.items() if match}
