import pytest
import torch

from q2t.compression.width import cut, neuron_importance


def activations(model, layer, ids):
    """What enters down_proj, computed by hand from the block's own parts."""
    caught = []
    handle = model.model.layers[layer].mlp.register_forward_hook(lambda _, inputs, __: caught.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    mlp = model.model.layers[layer].mlp
    return (torch.nn.functional.silu(mlp.gate_proj(caught[0])) * mlp.up_proj(caught[0])).detach()[0]


def test_importance_is_mean_activation_times_column_norm(make_model, batches):
    model = make_model()
    row = batches[0]["input_ids"][:1]
    measured = neuron_importance(model, [{"input_ids": row, "attention_mask": torch.ones_like(row)}])
    assert [scores.shape for scores in measured] == [(48,)] * 4
    for layer in (0, 3):
        columns = model.model.layers[layer].mlp.down_proj.weight.detach().norm(dim=0)
        expected = activations(model, layer, row).abs().mean(0) * columns
        torch.testing.assert_close(measured[layer].float(), expected, rtol=1e-4, atol=1e-6)


def test_importance_depends_on_neither_batching_nor_padding(make_model, batches):
    model = make_model()
    alone = [
        {
            "input_ids": ids[mask.bool()][None],
            "attention_mask": torch.ones(1, int(mask.sum()), dtype=torch.long),
        }
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    for one, other in zip(neuron_importance(model, batches), neuron_importance(model, alone), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_neurons_without_output_go_first_and_change_nothing(make_model, batches):
    model, original = make_model(), make_model()
    dead = list(range(0, 48, 3))
    for one in (model, original):
        for layer in one.model.layers:
            layer.mlp.down_proj.weight.data[:, dead] = 0
    cut(model, 32, neuron_importance(model, batches))
    with torch.no_grad():
        torch.testing.assert_close(model(**batches[1]).logits, original(**batches[1]).logits, rtol=1e-4, atol=1e-4)
    alive = [i for i in range(48) if i not in dead]
    for layer, whole in zip(model.model.layers, original.model.layers, strict=True):
        assert torch.equal(layer.mlp.gate_proj.weight, whole.mlp.gate_proj.weight[alive])  # in their former order
        assert torch.equal(layer.mlp.up_proj.weight, whole.mlp.up_proj.weight[alive])
        assert torch.equal(layer.mlp.down_proj.weight, whole.mlp.down_proj.weight[:, alive])


def test_each_layer_keeps_its_own_neurons_at_one_width(make_model):
    model, original = make_model(mlp_bias=True), make_model(mlp_bias=True)
    for one in (model, original):
        for layer in one.model.layers:
            layer.mlp.up_proj.bias.data = torch.arange(48.0)
    scores = [torch.arange(48.0).roll(shift) for shift in (0, 1, 2, 3)]
    cut(model, 2, scores)
    assert model.config.intermediate_size == 2
    for layer, top in zip(model.model.layers, ([46, 47], [0, 47], [0, 1], [1, 2]), strict=True):
        assert layer.mlp.up_proj.bias.tolist() == top
        shapes = (
            layer.mlp.gate_proj.weight.shape,
            layer.mlp.up_proj.weight.shape,
            layer.mlp.down_proj.weight.shape,
        )
        assert shapes == ((2, 32), (2, 32), (32, 2))
        assert (layer.mlp.gate_proj.out_features, layer.mlp.down_proj.in_features) == (2, 2)


def test_the_full_width_is_the_identity(make_model, batches):
    original = make_model()
    model = cut(make_model(), 48, neuron_importance(original, batches))
    assert model.config.to_dict() == original.config.to_dict()
    for (name, weight), (_, whole) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        assert torch.equal(weight, whole), name
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, original(**batches[0]).logits)


@pytest.mark.parametrize("width", [0, 49])
def test_impossible_widths_are_refused(make_model, width):
    with pytest.raises(ValueError, match=f"intermediate: {width} .* between 1 and 48"):
        cut(make_model(), width, [torch.ones(48)] * 4)


@pytest.mark.parametrize("scores", [[torch.ones(48)] * 3, [torch.ones(32)] * 4])
def test_importance_of_another_model_is_refused(make_model, scores):
    with pytest.raises(ValueError, match="expected 4 tensors of 48 values"):
        cut(make_model(), 32, scores)
