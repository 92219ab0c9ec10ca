import math

import pytest
import torch
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from q2t.compression.depth import block_influence, keep_layers


def test_influence_is_one_minus_the_mean_cosine_of_a_blocks_input_and_output(make_model, batches):
    model = make_model()
    row = batches[0]["input_ids"][:1]
    batch = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    with torch.no_grad():
        states = model(row, output_hidden_states=True).hidden_states
    measured = block_influence(model, [batch])
    for index in range(3):  # the last of `hidden_states` is normalised
        expected = 1 - torch.cosine_similarity(states[index][0], states[index + 1][0], dim=-1).mean().item()
        assert math.isclose(measured[index], expected, rel_tol=1e-4)


def test_a_block_that_does_nothing_has_no_influence(make_model, batches):
    model = make_model()
    for weight in (model.model.layers[3].self_attn.o_proj.weight, model.model.layers[3].mlp.down_proj.weight):
        torch.nn.init.zeros_(weight)
    influence = block_influence(model, batches)
    assert abs(influence[3]) < 1e-6  # a wrong tap, behind the final norm, would not see this
    assert min(influence[:3]) > 1e-3


def test_influence_depends_on_neither_batching_nor_padding(make_model, batches):
    model = make_model()
    rows = [
        (ids[mask.bool()][None], torch.ones(1, int(mask.sum()), dtype=torch.long))
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    alone = block_influence(model, [{"input_ids": ids, "attention_mask": mask} for ids, mask in rows])
    assert block_influence(model, batches) == pytest.approx(alone, rel=1e-4)


def test_the_least_influential_go_but_never_the_first_or_the_last(make_model):
    model, original = make_model(), make_model()
    model, kept = keep_layers(model, 3, [0.0, 0.2, 0.1, 0.0])
    assert kept == [0, 1, 3]
    assert model.config.num_hidden_layers == len(model.model.layers) == 3
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    for layer, index in zip(model.model.layers, kept, strict=True):
        for name, weight in original.model.layers[index].state_dict().items():
            assert torch.equal(layer.state_dict()[name], weight)
    assert keep_layers(make_model(), 3, [0.0] * 4)[1] == [0, 1, 3]
    assert keep_layers(make_model(), 2, [0.0, 9.0, 9.0, 0.0])[1] == [0, 3]


def test_what_a_configuration_says_of_each_block_goes_with_it(tmp_path):
    """SmolLM3's list of blocks without positions."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    model = SmolLM3ForCausalLM(SmolLM3Config(num_hidden_layers=6, pad_token_id=0, **sizes)).eval()
    model, kept = keep_layers(model, 5, [1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    assert kept == [0, 2, 3, 4, 5] and model.config.no_rope_layers == [1, 1, 0, 1, 1]
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        torch.testing.assert_close(SmolLM3ForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_all_layers_kept_is_the_identity(make_model, batches):
    model, kept = keep_layers(make_model(), 4, [0.4, 0.1, 0.3, 0.2])
    original = make_model()
    assert kept == [0, 1, 2, 3]
    assert model.config.to_dict() == original.config.to_dict()
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, original(**batches[0]).logits)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_impossible_counts_are_refused(make_model, count):
    with pytest.raises(ValueError, match=f"layers: {count} .* between 2 and 4"):
        keep_layers(make_model(), count, [0.1] * 4)


def test_influence_of_another_model_is_refused(make_model):
    with pytest.raises(ValueError, match="3 values for 4 layers"):
        keep_layers(make_model(), 3, [0.1] * 3)


def test_generation_with_cache_equals_generation_without(make_model, batches):
    model, _ = keep_layers(make_model(), 3, [0.9, 0.1, 0.5, 0.9])
    steps = dict(
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    left_padded = {name: value[:1] for name, value in batches[0].items()}
    cached = model.generate(**left_padded, **steps, use_cache=True)
    plain = model.generate(**left_padded, **steps, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    assert len(cached.past_key_values) == 3
