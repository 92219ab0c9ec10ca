"""Which position predicts what, and which rows meet."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from q2t.distillation import batches
from q2t.distillation.batches import BUCKET, calibration, collate, output_head, plan, predicting_states


def test_a_position_predicts_the_next_token(rows: Any) -> None:
    chosen = rows(7)
    batch = collate(chosen)
    following = batch.input_ids.roll(-1, dims=1)
    torch.testing.assert_close(following[batch.predicts], batch.targets)
    assert len(batch.targets) == sum(row.completion_tokens for row in chosen)
    assert batch.input_ids.shape[1] % BUCKET == 0


def test_eos_is_learnt_though_pad_is_eos(rows: Any) -> None:
    """Every row ends with eos, which is the pad token too: it has to be among the targets."""
    batch = collate(rows(5))
    ends = np.cumsum([row.completion_tokens for row in rows(5)]) - 1
    assert (batch.targets[ends] == 1).all()


def test_padding_is_never_seen(rows: Any, model: Any) -> None:
    """Alone or padded, and whatever the padding holds, a row has the same states as with an explicit mask."""
    chosen, network = rows(6), model().eval()
    batch = collate(chosen)
    with torch.no_grad():
        states = predicting_states(network, batch)
        lengths = torch.tensor([len(row.input_ids) for row in chosen])
        real = torch.arange(batch.input_ids.shape[1]) < lengths[:, None]
        masked = network.base_model(batch.input_ids, attention_mask=real.long()).last_hidden_state
        garbage = replace(batch, input_ids=torch.where(real, batch.input_ids, 77))
        torch.testing.assert_close(states, masked[batch.predicts], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states, predicting_states(network, garbage))
        alone = torch.cat([predicting_states(network, collate([row])) for row in chosen])
        torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)


def test_the_fused_causal_kernel_is_taken(rows: Any, model: Any, monkeypatch: Any) -> None:
    masks = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments: Any, **named: Any) -> Any:
        masks.append((named["attn_mask"], named["is_causal"]))
        return attention(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    predicting_states(model(), collate(rows(3)))
    assert masks and all(mask is None and causal for mask, causal in masks)


def test_labels_follow_their_rows(rows: Any) -> None:
    chosen = rows(6, unlabelled_every=2)
    batch = collate(chosen)
    start = 0
    for row in chosen:
        piece = slice(start, start := start + row.completion_tokens)
        assert (batch.weights[piece] == row.weight).all()
        if len(row.top_ids):
            assert (batch.top_ids[piece].numpy() == row.top_ids).all()
            assert (batch.top_logprobs[piece].numpy() == row.top_logprobs.astype(np.float32)).all()
            assert (batch.tail_logprob[piece].numpy() == row.tail_logprob).all()
        else:
            assert (batch.top_ids[piece] == -1).all()
    assert collate(rows(3, unlabelled_every=1)).top_ids.shape[1] == 0


def test_reasoning_is_what_stands_before_the_answer(rows: Any) -> None:
    chosen = [replace(row, answer_start=i * row.completion_tokens // 4) for i, row in enumerate(rows(5))]
    pieces = collate(chosen).reasoning.split([row.completion_tokens for row in chosen])
    for row, piece in zip(chosen, pieces, strict=True):
        assert piece.dtype == torch.bool
        assert piece.tolist() == [at < row.answer_start for at in range(row.completion_tokens)]


@given(
    st.lists(st.integers(1, 300), max_size=80),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(0, 3),
)
def test_plan_is_short_only_at_its_end(
    lengths: list[int], micro_batch: int, per_step: int, seed: int, epoch: int
) -> None:
    batch_size = micro_batch * per_step
    steps = plan(lengths, batch_size, micro_batch, seed=seed, epoch=epoch)
    order = [i for step in steps for micro in step for i in micro]
    assert sorted(order) == list(range(len(lengths)))
    assert len(steps) == -(-len(lengths) // batch_size)
    assert all(sum(map(len, step)) == batch_size for step in steps[:-1])
    # As the specialist's trainer cuts it again.
    again = [order[i : i + micro_batch] for i in range(0, len(order), micro_batch)]
    assert [micro for step in steps for micro in step] == again
    assert steps == plan(lengths, batch_size, micro_batch, seed=seed, epoch=epoch)


def test_plan_has_another_order_in_every_epoch() -> None:
    lengths = [BUCKET * i for i in range(1, 102)]
    plans = [plan(lengths, 16, 8, seed=seed, epoch=epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert plans[0] not in plans[1:]
    # The rows left over are not always the same, the longest say.
    assert len({frozenset(steps[-1][-1]) for steps in plans}) == 3


def test_plan_pads_little_and_mixes_lengths() -> None:
    lengths = np.random.default_rng(0).integers(20, 300, 400).tolist()
    steps = plan(lengths, 16, 4, seed=1, epoch=0)
    padded = sum(len(micro) * -(-max(lengths[i] for i in micro) // BUCKET) * BUCKET for s in steps for micro in s)
    assert padded < 1.2 * sum(lengths)
    steps_lengths = [[lengths[i] for micro in step for i in micro] for step in steps]
    assert np.mean([max(step) - min(step) for step in steps_lengths]) > 140


def test_calibration_batches_hide_padding_and_nothing_else(rows: Any) -> None:
    chosen = rows(5)
    found = list(calibration(chosen, size=2))
    assert [len(batch["input_ids"]) for batch in found] == [2, 2, 1]
    shown = [(ids, mask) for b in found for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    for (ids, mask), row in zip(shown, chosen, strict=True):
        assert ids[mask.bool()].tolist() == row.input_ids.tolist()


@pytest.mark.parametrize(
    "count, room, expected, checkpointing",
    [(16, 16, 16, 16), (16, 15, 8, 16), (16, 40, 16, 16), (16, 1, 1, 2), (16, 0, 1, 1), (5, 2, 2, 3), (7, 6, 4, 7)],
)
def test_a_gpu_takes_micro_batches_in_equal_passes_that_fit(
    count: int, room: int, expected: int, checkpointing: int, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tokens = model().config, 4 * 96
    one = tokens * batches.ACTIVATIONS * config.num_hidden_layers * config.hidden_size
    monkeypatch.setattr(batches, "room", lambda device, held: room * one + one // 2)
    assert batches.at_once(count, tokens, config, "cuda", 0) == expected
    assert batches.at_once(count, tokens, config, "cuda", 0, checkpointing=True) == checkpointing
    assert batches.at_once(count, tokens, config, "cpu", 0) == 1
    # Logits as heavy as the activations halve the room.
    halved = batches.at_once(count, tokens, config, "cuda", 0, logits=one // tokens)
    monkeypatch.setattr(batches, "room", lambda device, held: (room * one + one // 2) // 2)
    assert halved == batches.at_once(count, tokens, config, "cuda", 0)


def test_what_is_held_leaves_less_of_a_gpu(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = model()
    weights = sum(p.numel() * 4 for p in network.parameters())
    assert batches.held(network) == 4 * weights  # gradients and two moments
    assert batches.held(network.requires_grad_(False)) == weights
    card = SimpleNamespace(total_memory=10 * weights)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert batches.room("cuda", 4 * weights) == 6 * weights // 4
    assert batches.room("cuda", 11 * weights) == 0


SMALL = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=1, eos_token_id=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "given", "named"),
    [
        ("Llama", {}, None),
        ("Qwen3", {"head_dim": 8}, None),
        ("Gemma3", {"head_dim": 8}, None),
        ("Gemma2", {"head_dim": 8}, "final_logit_softcapping"),
        ("RecurrentGemma", {"num_hidden_layers": 3, "lru_width": 32}, "logits_soft_cap"),
        ("Granite", {"logits_scaling": 8.0}, "logits_scaling"),
        ("Cohere", {}, "logit_scale"),
        ("Phi", {}, "a bias of the output head"),
    ],
)
def test_logits_that_are_more_than_a_product_are_refused(
    architecture: str, given: dict[str, Any], named: str | None
) -> None:
    """A random model of each: what is let through has logits that are the states times the head, and no other."""
    import transformers

    config = getattr(transformers, f"{architecture}{'Text' * (architecture == 'Gemma3')}Config")(**SMALL | given)
    torch.manual_seed(0)
    network = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    head = network.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(50)  # so that a cap is felt
        if head.bias is not None:
            head.bias.add_(1)
        ids = torch.arange(2, 20)[None]
        states = network.get_decoder()(input_ids=ids).last_hidden_state
        product = torch.allclose(network(input_ids=ids).logits, states @ head.weight.T, atol=1e-3)
    assert product == (named is None)
    if named is None:
        assert output_head(network) is head.weight
    else:
        with pytest.raises(ValueError, match=f"has logits with {named}, which no loss here knows"):
            output_head(network)
