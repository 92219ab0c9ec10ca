"""Checkpoints of the training loop: a folder that appears complete or not at all."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_map

from q2t.distillation import sharding
from q2t.distillation.objective import Objective

Line = dict[str, str]
"""A step's line of the curve, by column."""


def save(folder: Path, step: int, objective: Objective, optimizer: Any, lines: list[Line], *, write: bool) -> None:
    """Keep what `resume` needs to go on after `step` steps; older checkpoints go.

    Args:
        write: whether this is the process that does; of those that share the weights, all have to take part.
    """

    def kept(value: Any) -> Any:
        """One tensor at a time is whole on the device, and the writer alone keeps it."""
        value = sharding.whole(value)
        return None if not write else value.cpu() if isinstance(value, Tensor) else value

    weights = {name: kept(parameter.detach()) for name, parameter in objective.named_parameters()}
    state = tree_map(kept, optimizer.state_dict())
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.partial"):
        shutil.rmtree(stale)
    older = _complete(folder)
    partial = folder / f"step-{step}.partial"
    partial.mkdir()
    save_file(weights, partial / "weights.safetensors")
    torch.save(state, partial / "optimizer.pt")
    (partial / "curve.json").write_text(json.dumps(lines), encoding="utf-8")
    os.replace(partial, folder / f"step-{step}")
    for path in older.values():
        shutil.rmtree(path)


def resume(folder: Path, objective: Objective, optimizer: Any) -> tuple[int, list[Line]]:
    """Steps done and their lines of the curve; weights and optimiser as they were."""
    saved = _complete(folder)
    if not saved:
        return 0, []
    step = max(saved)
    weights = load_file(saved[step] / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            parameter.copy_(sharding.like(parameter, weights[name]))
    state = torch.load(saved[step] / "optimizer.pt", weights_only=True, map_location="cpu")
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, moments in state["state"].items():
        for key, value in moments.items():
            moments[key] = sharding.like(trained[place], value)
    optimizer.load_state_dict(state)
    return step, json.loads((saved[step] / "curve.json").read_text(encoding="utf-8"))


def _complete(folder: Path) -> dict[int, Path]:
    found = {path: re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*")}
    return {int(match[1]): path for path, match in found.items() if match}
