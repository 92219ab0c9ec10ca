"""Checkpoints of the training loop: a folder that appears complete or not at all."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

Line = dict[str, str]
"""A step's line of the curve, by column."""


def save(folder: Path, step: int, model: Any, projections: Any, optimizer: Any, lines: list[Line]) -> None:
    """Keep what `resume` needs to go on after `step` steps; older checkpoints go.

    Args:
        projections: a module that is trained beside the model, or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.partial"):
        shutil.rmtree(stale)
    older = _complete(folder)
    partial = folder / f"step-{step}.partial"
    partial.mkdir()
    save_model(model, str(partial / "model.safetensors"))
    if projections is not None:
        save_model(projections, str(partial / "projections.safetensors"))
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    (partial / "curve.json").write_text(json.dumps(lines), encoding="utf-8")
    os.replace(partial, folder / f"step-{step}")
    for path in older.values():
        shutil.rmtree(path)


def resume(folder: Path, model: Any, projections: Any, optimizer: Any) -> tuple[int, list[Line]]:
    """Steps done and their lines of the curve; weights and optimiser as they were."""
    saved = _complete(folder)
    if not saved:
        return 0, []
    step = max(saved)
    load_model(model, str(saved[step] / "model.safetensors"), device=str(model.device))
    if projections is not None:
        load_model(projections, str(saved[step] / "projections.safetensors"), device=str(model.device))
    state = torch.load(saved[step] / "optimizer.pt", weights_only=True, map_location=model.device)
    optimizer.load_state_dict(state)
    return step, json.loads((saved[step] / "curve.json").read_text(encoding="utf-8"))


def _complete(folder: Path) -> dict[int, Path]:
    found = {path: re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*")}
    return {int(match[1]): path for path, match in found.items() if match}
