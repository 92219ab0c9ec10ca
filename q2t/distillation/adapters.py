"""Which weights are trained: adapters beside frozen weights, frozen parts, neurons that are pushed to nothing.

A student is published as plain weights, so adapters are merged into them at the end. Prompt tuning is missing for that
reason: a soft prompt can't be merged into weights, and a student with one would be no plain model.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from q2t.config import Adapter


def adapt(model: Any, settings: Adapter, seed: int) -> None:
    """Put adapters by peft into the model, in place; nothing else requires a gradient then.

    LoRA (arXiv 2106.09685) adds B A, scaled by alpha / rank, B being 0 at first; IA3 (arXiv 2205.05638) scales what a
    linear module gives, and of down_proj what it takes. At the beginning both change nothing. They follow from
    the seed alone.

    Args:
        model: a causal language model, which keeps its class; `merge` makes it plain again.

    Raises:
        ValueError: a name is no linear module's, or is the head's.
    """
    from peft import IA3Config, LoraConfig, inject_adapter_in_model

    # Not the head: the losses multiply by its plain weight, so that an adapter there would never be run.
    head = model.get_output_embeddings()
    linear = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if unknown := sorted(set(settings.modules) - linear):
        raise ValueError(
            f"adapter.modules: {', '.join(unknown)} can have no adapter; name some of {', '.join(sorted(linear))}"
        )
    if settings.kind == "lora":
        config: Any = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.modules))
    else:
        inputs = [name for name in settings.modules if name == "down_proj"]  # peft refuses others than targets
        config = IA3Config(target_modules=list(settings.modules), feedforward_modules=inputs)
    with torch.random.fork_rng(devices=[]):  # peft draws LoRA's A on the CPU, wherever the model is
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def merge(model: Any) -> None:
    """Make the model plain again, with what its adapters learned in its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for path, layer in layers.items():
        layer.merge()
        model.set_submodule(path, layer.get_base_layer())
    del model.peft_config


def freeze(model: Any, patterns: Sequence[str]) -> None:
    """Parameters whose names match a pattern (`*` is any text) get no gradient.

    Raises:
        ValueError: a pattern matches none, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"freeze: no parameter matches {pattern!r}; there are {', '.join(names[:3])}, ...")
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze is {list(patterns)}, and nothing is left to train: name fewer")


def trained_gates(model: Any) -> list[nn.Parameter]:
    """The gates that `shrink` works on: the gate_proj weights that require a gradient, [neurons, hidden] each.

    Raises:
        ValueError: there are none. Called once `adapt` and `freeze` are done, it says so before anything is trained.
    """
    gates = [p for name, p in model.named_parameters() if name.endswith("gate_proj.weight") and p.requires_grad]
    if not gates:
        raise ValueError(
            "sparsity shrinks gate_proj, and this run trains none: it can't be combined with adapter, nor with freeze "
            "of them all, nor be used with a model that has none; set it to 0, or leave these out"
        )
    return gates


def shrink(model: Any, strength: float) -> float:
    """Add the gradient of strength times the sum of all neurons' gate norms, and give that penalty.

    For a step's whole gradient: after accumulation (and the sum over processes), before clipping, which counts it. Its
    own norm is strength times the root of the number of neurons.

    A neuron of a gated feed-forward layer is a row of its gate_proj, and the sum of the rows' L2 norms is an L1
    penalty on whole neurons (group lasso, Yuan and Lin 2006): those that little needs go to 0, and a later cut takes
    them. A row of zeros has the gradient 0, and one shorter than 1e-12 a gradient in proportion, since norms of
    still shorter ones underflow.

    Args:
        strength: in nats per completion token, for a norm of 1.

    Raises:
        ValueError: no gate is trained.
    """
    penalty = 0.0
    for gate in trained_gates(model):
        rows = gate.detach()
        penalty += strength * float(rows.norm(dim=1).sum())
        direction = nn.functional.normalize(rows, dim=1)
        gate.grad = strength * direction if gate.grad is None else gate.grad.add_(direction, alpha=strength)
    return penalty
