"""Keys and values written in place, and attention that reads them where they lie.

Decoding a token is bound by memory. transformers' own cache copies all keys and values to append one, and its
attention copies them again for every query head that shares them; here they are read once.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK = 32
"""Positions by which a cache grows."""


class BlockLayer(CacheLayerMixin):
    """One layer's keys and values, each [batch, kv_heads, capacity, width]; the capacity is a multiple of BLOCK.

    The whole capacity is attended to, as in transformers' StaticCache: the mask hides what isn't written yet. A
    slice of the written positions would not be contiguous, and its products take longer.
    """

    keys: torch.Tensor
    values: torch.Tensor
    length = 0

    def lazy_initialization(self, key_states: torch.Tensor) -> None:
        batch, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, 0, width)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; a prompt attends to itself alone, without the room behind it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states)
            self.values = value_states.new_zeros(
                *value_states.shape[:2], 0, value_states.shape[-1]
            )  # narrower in DeepSeek's models
        start, self.length = self.length, self.length + key_states.shape[-2]
        if (room := self._capacity() - self.keys.shape[-2]) > 0:
            self.keys, self.values = (torch.nn.functional.pad(t, (0, 0, 0, room)) for t in (self.keys, self.values))
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return (self.keys, self.values) if start else (key_states, value_states)

    def get_mask_sizes(self, cache_position: torch.Tensor) -> tuple[int, int]:
        """Positions, and the first of them, that the next `update` of this many returns."""
        new = len(cache_position)
        return (self._capacity(new) if self.length else new), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_cache_shape(self) -> int:
        return -1  # none

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; a row can be taken more than once."""
        self.keys, self.values = self.keys[indices], self.values[indices]

    def _capacity(self, new: int = 0) -> int:
        return -(-(self.length + new) // BLOCK) * BLOCK


class BlockCache(Cache):
    """A BlockLayer for every layer of the model; the first `update` makes them."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=BlockLayer)


def grouped_query_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new position (arXiv 2305.13245); of more than one, transformers' own.

    The query heads of a group stand as rows against their one key head, so that no key is repeated.

    Args:
        query: [batch, heads, 1, width].
        key: [batch, kv_heads, length, width]; `value` may have another width.
        attention_mask: bool [batch, 1, 1, length], true where attended to; None for everywhere.

    Returns:
        [batch, 1, heads, width], and no weights.

    Raises:
        ValueError: a cap on the scores (gemma-2) or sinks beside them (gpt-oss), which no fused kernel knows.
    """
    if named := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        raise ValueError(f"the model's attention has a {named[0]}, which is not computed here: take a model without it")
    batch, heads, length, width = query.shape
    if length > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows = (query * scaling).view(batch * key.shape[1], -1, width)
    scores = torch.bmm(rows, key.flatten(0, 1).transpose(1, 2))
    if attention_mask is not None:
        scores.view(batch, heads, -1).masked_fill_(~attention_mask[:, 0], float("-inf"))
    return torch.bmm(scores.softmax(-1), value.flatten(0, 1)).view(batch, 1, heads, -1), None


GROUPED_QUERY = "grouped_query"
AttentionInterface.register(GROUPED_QUERY, grouped_query_attention)
AttentionMaskInterface.register(GROUPED_QUERY, sdpa_mask)
