"""HOW a model gets small: its vocabulary, its depth and its width.

Every cut works in place on a `LlamaForCausalLM`, or a Qwen3 or Gemma3 one, and leaves uniform shapes and a matching
config, so that what `save_pretrained` writes loads anywhere. A cut to the full size changes no bit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Batch = Mapping[str, Tensor]
"""A calibration batch: `input_ids` and `attention_mask` (1 on real tokens), both [rows, length], padded on
either side."""


@torch.no_grad()
def calibrate(
    model: "LlamaForCausalLM",
    batches: Iterable[Batch],
    modules: Sequence[nn.Module],
    observe: Callable[[int, Tensor, Tensor], None],
) -> int:
    """Run the batches through the model and show what enters and leaves some of its modules.

    Args:
        modules: submodules whose first argument and output are [rows, length, features].
        observe: called as (index in `modules`, input, output) for each module and batch; input and output are
            [tokens, features] of the real tokens alone, in the model's dtype.

    Returns:
        The number of real tokens.

    Raises:
        ValueError: the batches have no real token.
    """
    tokens = 0
    real = torch.empty(0)

    def show(index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            left = output[0] if isinstance(output, tuple) else output  # gemma's blocks give a tuple
            observe(index, inputs[0][real], left[real])

        return hook

    handles = [module.register_forward_hook(show(index)) for index, module in enumerate(modules)]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
            real = mask.bool()
            tokens += int(real.sum())
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if tokens == 0:
        raise ValueError("calibration batches: 0 real tokens; give a row whose attention_mask has a 1")
    return tokens


def select(parameter: Tensor, indices: Sequence[int], dim: int) -> Any:
    """The slices of a parameter at these indices along one dimension, as a contiguous parameter."""
    index = torch.tensor(indices, device=parameter.device)
    return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)
