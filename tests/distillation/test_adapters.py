"""What is trained, and that a student comes out as plain weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from q2t.config import Adapter
from q2t.distillation import adapters

ADAPTERS = {
    "lora": Adapter(kind="lora", rank=2, alpha=8, modules=["q_proj", "down_proj"]),
    "ia3": Adapter(kind="ia3", modules=["k_proj", "v_proj", "down_proj"]),
}
each = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
IDS = torch.arange(1, 41).reshape(2, 20)
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 1,
}


def qwen3() -> Any:
    """Its head is apart from the embeddings here, and its attention has biases."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    network = Qwen3ForCausalLM(Qwen3Config(**SHAPE, attention_bias=True, tie_word_embeddings=False))
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return network


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE))


@pytest.fixture(params=["llama", "qwen3", "gemma3"])
def build(request: pytest.FixtureRequest, model: Any) -> Callable[[], Any]:
    return {"llama": model, "qwen3": qwen3, "gemma3": gemma3}[request.param]


def learn(network: Any, steps: int = 3) -> None:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        network(IDS, labels=IDS).loss.backward()
        optimizer.step()


@each
def test_an_adapter_learns_and_is_merged_into_plain_weights(adapter: Adapter, build: Any, tmp_path: Path) -> None:
    network, plain = build().eval(), build().eval()
    base = network.base_model
    adapters.adapt(network, adapter, seed=0)
    torch.testing.assert_close(network(IDS).logits, plain(IDS).logits)
    learn(network)
    kept = {name.replace(".base_layer", ""): parameter for name, parameter in network.named_parameters()}
    assert all(torch.equal(kept[name], parameter) for name, parameter in plain.named_parameters())
    assert network.base_model is base
    learned = network(IDS).logits
    assert (learned - plain(IDS).logits).abs().max() > 0.01
    adapters.merge(network)
    torch.testing.assert_close(network(IDS).logits, learned, rtol=1e-4, atol=1e-5)
    assert list(network.state_dict()) == list(plain.state_dict())
    tied = plain.lm_head.weight is plain.model.embed_tokens.weight
    assert (network.lm_head.weight is network.model.embed_tokens.weight) == tied
    assert not hasattr(network, "peft_config")
    network.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, network(IDS).logits)


@each
def test_adapters_are_where_they_are_asked_for_and_alone_are_trained(adapter: Adapter, build: Any) -> None:
    network = build()
    adapters.adapt(network, adapter, seed=0)
    trained = [name.split(".") for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert {name[4] for name in trained} == set(adapter.modules)
    assert {name[5] for name in trained} == ({"lora_A", "lora_B"} if adapter.kind == "lora" else {"ia3_l"})
    assert len(trained) == 2 * len(adapter.modules) * (2 if adapter.kind == "lora" else 1)


def test_lora_adds_the_product_of_its_factors_scaled(model: Any) -> None:
    network, plain = model(), model()
    adapters.adapt(network, ADAPTERS["lora"], seed=0)
    learn(network)
    layer = network.model.layers[0].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((2, 48), (32, 2))
    adapters.merge(network)
    change = network.model.layers[0].mlp.down_proj.weight - plain.model.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(change, 8.0 / 2 * b @ a)


def test_ia3_scales_keys_and_values_and_the_neurons(model: Any) -> None:
    """What down_proj takes, that is, not what it gives (arXiv 2205.05638, figure 2)."""
    network = model()
    adapters.adapt(network, ADAPTERS["ia3"], seed=0)
    layer = network.model.layers[0]
    assert layer.self_attn.k_proj.ia3_l["default"].shape == (16, 1)
    assert layer.mlp.down_proj.ia3_l["default"].shape == (1, 48)


def test_the_seed_alone_decides(model: Any) -> None:
    networks = []
    for noise, seed in ((1, 5), (2, 5), (1, 6)):
        network = model()
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        adapters.adapt(network, ADAPTERS["lora"], seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        networks.append([parameter for name, parameter in network.named_parameters() if "lora_A" in name])
    first, again, other = networks
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


@pytest.mark.parametrize("wrong", ["query", "lm_head", "proj", "embed_tokens"])
def test_a_module_that_can_have_no_adapter_is_named(wrong: str, model: Any) -> None:
    network = model()
    names = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ValueError, match=f"^adapter.modules: {wrong} can have no adapter; name some of {names}$"):
        adapters.adapt(network, Adapter(kind="lora", modules=["q_proj", wrong]), seed=0)
    assert list(network.state_dict()) == list(model().state_dict())


def test_frozen_parts_stay_as_they_are(model: Any) -> None:
    network, before = model(), dict(model().named_parameters())
    adapters.freeze(network, ["model.embed_tokens.*", "*norm.weight"])
    learn(network)
    same = {name for name, parameter in network.named_parameters() if torch.equal(parameter, before[name])}
    assert same == {name for name in before if "embed_tokens" in name or name.endswith("norm.weight")}


def test_adapters_of_a_frozen_part_are_frozen_too(model: Any) -> None:
    network = model()
    adapters.adapt(network, ADAPTERS["ia3"], seed=0)
    adapters.freeze(network, ["model.layers.0.*"])
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3 and all(name.startswith("model.layers.1.") for name in trained)


def test_what_can_not_be_frozen_is_said(model: Any) -> None:
    with pytest.raises(ValueError, match="freeze: no parameter matches 'vision.*there are model.embed_tokens.weight, "):
        adapters.freeze(model(), ["*norm*", "vision*"])
    with pytest.raises(ValueError, match="nothing is left to train"):
        adapters.freeze(model(), ["*"])


def test_the_penalty_has_the_gradient_of_the_neurons_norms(model: Any) -> None:
    """Added to the one that is there; a neuron that is gone stays."""
    network = model(dtype=torch.float64)
    gates = [layer.mlp.gate_proj.weight for layer in network.model.layers]
    gates[0].data[3] = 0.0
    network(IDS, labels=IDS).loss.backward()
    before = [gate.grad.clone() for gate in gates]
    penalty = adapters.shrink(network, 0.1)
    others = [torch.ones(len(gate), dtype=torch.bool) for gate in gates]
    others[0][3] = False
    chosen = [gate.detach().clone().requires_grad_() for gate in gates]
    expected = 0.1 * sum(gate[keep].norm(dim=1).sum() for gate, keep in zip(chosen, others, strict=True))
    assert penalty == pytest.approx(float(expected.detach()))
    for gate, grad, start in zip(gates, torch.autograd.grad(expected, chosen), before, strict=True):
        torch.testing.assert_close(gate.grad, start + grad)


@pytest.mark.parametrize(("size", "expected"), [(0.0, 0.0), (1e-25, 0.0), (1e-10, 0.1), (1.0, 0.1)])
def test_a_neuron_that_is_all_but_gone_is_not_thrown_back(size: float, expected: float, model: Any) -> None:
    """Squares of 1e-25 are 0 in float32, and a row divided by that norm is no direction."""
    network = model()
    gate = network.model.layers[0].mlp.gate_proj.weight
    gate.data[3] = size
    adapters.shrink(network, 0.1)
    assert gate.grad[3].norm().item() == pytest.approx(expected, abs=1e-6)
    others = [p for name, p in network.named_parameters() if not name.endswith("gate_proj.weight")]
    assert all(parameter.grad is None for parameter in others)


def test_neurons_that_nothing_needs_go_to_nothing(model: Any) -> None:
    """The down projection reads half of them; the others' norms fall by the same step every time."""
    network = model()
    mlp = network.model.layers[0].mlp
    mlp.down_proj.weight.data[:, 24:] = 0.0
    mlp.down_proj.requires_grad_(False)
    start = mlp.gate_proj.weight.detach().norm(dim=1)
    optimizer = torch.optim.SGD([mlp.gate_proj.weight], lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        network(IDS, labels=IDS).loss.backward()
        adapters.shrink(network, 0.5)
        optimizer.step()
    end = mlp.gate_proj.weight.detach().norm(dim=1)
    torch.testing.assert_close(end[24:], start[24:] - 0.5)
    assert not torch.allclose(end[:24], start[:24] - 0.5, atol=1e-3)


def test_a_penalty_is_on_the_gates_that_are_trained(model: Any) -> None:
    network = model()
    adapters.freeze(network, ["model.layers.0.*"])
    gate = network.model.layers[1].mlp.gate_proj.weight
    assert [id(parameter) for parameter in adapters.trained_gates(network)] == [id(gate)]
    assert adapters.shrink(network, 0.1) == pytest.approx(0.1 * gate.detach().norm(dim=1).sum().item())
    assert network.model.layers[0].mlp.gate_proj.weight.grad is None


def test_a_penalty_needs_trained_gates(model: Any) -> None:
    adapted, frozen, without = model(), model(), torch.nn.Sequential(torch.nn.Linear(2, 2))
    adapters.adapt(adapted, Adapter(kind="lora", modules=["gate_proj"]), seed=0)
    adapters.freeze(frozen, ["*gate_proj*"])
    for network in (adapted, frozen, without):
        for refuses in (adapters.trained_gates, lambda network: adapters.shrink(network, 0.1)):
            with pytest.raises(ValueError, match="sparsity shrinks gate_proj, and this run trains none"):
                refuses(network)


def test_weight_decay_acts_on_matrices_of_rank_one_too(
    run: Any, model: Any, rows: Any, settings: Any, compute: Any, tmp_path: Path
) -> None:
    adapter = Adapter(kind="lora", rank=1, modules=["q_proj"])
    ended = []
    for decay in (0.0, 5.0):
        changed = settings.model_copy(update={"adapter": adapter, "weight_decay": decay})
        ended.append(run(model, rows, changed, compute, tmp_path / str(decay))[0])
    assert ended[0] != ended[1]
