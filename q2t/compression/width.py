"""Width: which feed-forward neurons matter least on the target data, and a model without them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from q2t.compression import Batch, calibrate, select

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def neuron_importance(model: "LlamaForCausalLM", batches: Iterable[Batch]) -> list[Tensor]:
    """Importance of every feed-forward neuron: mean |activation| times the norm of its output weights.

    The activation is what enters `down_proj`, silu(gate) * up, over all real tokens, prompt and completion.
    The norm is the Euclidean one of the neuron's column in `down_proj`. The product estimates how much the
    neuron adds to the residual stream: Wanda's |weight| * activation norm (arXiv 2306.11695) for a whole
    neuron, with the mean absolute activation for its L2 norm, so that a few outlier tokens don't decide.

    Returns:
        One float64 tensor [intermediate_size] per layer, on the CPU.

    Raises:
        ValueError: the batches have no real token.
    """
    outputs = [layer.mlp.down_proj for layer in model.model.layers]
    totals = [torch.zeros(down.in_features, dtype=torch.float64) for down in outputs]

    def observe(index: int, activation: Tensor, _: Tensor) -> None:
        totals[index] += activation.abs().sum(0, dtype=torch.float64).cpu()

    tokens = calibrate(model, batches, outputs, observe)
    norms = [down.weight.detach().double().norm(dim=0).cpu() for down in outputs]
    return [total / tokens * norm for total, norm in zip(totals, norms, strict=True)]


def cut(model: "LlamaForCausalLM", width: int, importance: Sequence[Tensor]) -> "LlamaForCausalLM":
    """Keep the `width` most important feed-forward neurons of every layer, in their former order.

    Works in place. Each layer chooses its own neurons, but all get the same width: a checkpoint has one
    `intermediate_size`. Among equals the later neuron goes.

    Args:
        importance: [intermediate_size] per layer, from `neuron_importance`.

    Raises:
        ValueError: `width` is less than 1 or more than the model has, or `importance` is of another shape.
    """
    full = model.config.intermediate_size
    layers = model.model.layers
    if not 1 <= width <= full:
        raise ValueError(f"intermediate: {width} is out of range; choose between 1 and {full}")
    if [tuple(scores.shape) for scores in importance] != [(full,)] * len(layers):
        raise ValueError(
            f"importance: expected {len(layers)} tensors of {full} values, got "
            f"{[tuple(scores.shape) for scores in importance]}; measure it on this model"
        )
    for layer, scores in zip(layers, importance, strict=True):
        mlp = layer.mlp
        kept = sorted(scores.argsort(descending=True, stable=True)[:width].tolist())
        for entering in (mlp.gate_proj, mlp.up_proj):
            entering.weight = select(entering.weight, kept, dim=0)
            if entering.bias is not None:
                entering.bias = select(entering.bias, kept, dim=0)
            entering.out_features = width
        mlp.down_proj.weight = select(mlp.down_proj.weight, kept, dim=1)
        mlp.down_proj.in_features = width
        mlp.intermediate_size = width
    model.config.intermediate_size = width
    return model
