"""Depth: which transformer blocks matter least, and a model without them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from q2t.compression import Batch, calibrate

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def block_influence(model: "LlamaForCausalLM", batches: Iterable[Batch]) -> list[float]:
    """How much each block turns the residual stream: 1 - mean cosine similarity of its input and output.

    The mean runs over all real tokens, so it does not depend on how rows are batched or padded. Taken by
    hooks on the blocks: `output_hidden_states` gives the last one only after the final norm. Block Influence
    of ShortGPT, arXiv 2403.03853.

    Returns:
        One number in [0, 2] per block, first block first.

    Raises:
        ValueError: the batches have no real token.
    """
    blocks = list(model.model.layers)
    similarity = [0.0] * len(blocks)

    def observe(index: int, entering: Tensor, leaving: Tensor) -> None:
        cosines = cosine_similarity(entering.float(), leaving.float(), dim=-1)
        similarity[index] += float(cosines.double().sum())

    tokens = calibrate(model, batches, blocks, observe)
    return [1 - total / tokens for total in similarity]


def keep_layers(
    model: "LlamaForCausalLM", count: int, influence: Sequence[float]
) -> tuple["LlamaForCausalLM", list[int]]:
    """Drop the least influential blocks until `count` are left; the first and the last always stay.

    Works in place. Among equals the later block goes.

    Args:
        influence: one number per block, from `block_influence`.

    Returns:
        The model, and the kept blocks' former indices in ascending order.

    Raises:
        ValueError: `count` is less than 2 or more than the model has, or `influence` has another length.
    """
    blocks = model.model.layers
    total = len(blocks)
    if len(influence) != total:
        raise ValueError(f"influence: {len(influence)} values for {total} layers; measure it on this model")
    if not min(2, total) <= count <= total:
        raise ValueError(f"layers: {count} is out of range; choose between {min(2, total)} and {total}")
    inner = sorted(range(1, total - 1), key=lambda i: (-influence[i], i))
    kept = sorted({0, total - 1, *inner[: max(count - 2, 0)]})
    model.model.layers = nn.ModuleList(blocks[i] for i in kept)
    for index, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = index  # the KV cache is addressed by it
    model.config.num_hidden_layers = count
    for name in ("layer_types", "no_rope_layers"):  # which blocks see a window alone, and which no positions
        if of_layers := getattr(model.config, name, None):
            setattr(model.config, name, [of_layers[i] for i in kept])
    return model, kept
