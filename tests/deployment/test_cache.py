"""The cache against a concatenation, and grouped attention against one that repeats every key."""

import pytest
import torch

from q2t.deployment.cache import BLOCK, BlockCache, BlockLayer, grouped_query_attention

BATCH, HEADS, KV_HEADS, WIDTH = 3, 6, 2, 8


def states(positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, BATCH, KV_HEADS, positions, WIDTH)
    return keys, values


def test_what_was_written_is_read_and_written_in_place():
    torch.manual_seed(0)
    layer = BlockLayer()
    written = [states(BLOCK - 3)]
    first = layer.update(*written[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, written[0], strict=True))
    for step in range(6):  # over the end of the first block
        before, written = layer.keys.data_ptr(), [*written, states(1)]
        size, _ = layer.get_mask_sizes(torch.tensor([BLOCK - 3 + step]))
        read = layer.update(*written[-1])
        for ours, theirs in zip(read, zip(*written, strict=True), strict=True):
            assert ours.shape[-2] == size
            assert torch.equal(ours[:, :, : layer.get_seq_length()], torch.cat(theirs, dim=-2))
        assert (layer.keys.data_ptr() == before) == (step != 3), step
    assert layer.get_seq_length() == BLOCK + 3


def test_rows_are_dropped_and_repeated():
    torch.manual_seed(0)
    cache = BlockCache()
    keys, values = states(5)
    for layer in range(2):
        cache.update(keys, values, layer)
    cache.batch_select_indices(torch.tensor([2, 0, 0]))
    for ours, theirs in cache:
        assert torch.equal(ours[:, :, :5], keys[[2, 0, 0]])
        assert torch.equal(theirs[:, :, :5], values[[2, 0, 0]])
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("positions", [1, 4])
def test_attention_is_that_of_repeated_keys(masked, positions):
    torch.manual_seed(0)
    query = torch.randn(BATCH, positions, HEADS, WIDTH).transpose(1, 2)  # as the model's projection leaves it
    keys, values = states(7)
    mask = torch.rand(BATCH, 1, positions, 7) > 0.4 if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // KV_HEADS, False
    ours, _ = grouped_query_attention(module, query, keys, values, mask, scaling=0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, *(t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (keys, values)), attn_mask=mask, scale=0.3
    )
    torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-6, rtol=0)
