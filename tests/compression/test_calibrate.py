import pytest
import torch

from q2t.compression import calibrate, select


def test_modules_are_seen_on_real_tokens_only_and_hooks_are_removed(make_model, batches):
    model = make_model().train()
    layers = list(model.model.layers)
    seen = [0] * len(layers)

    def observe(index, entering, leaving):
        assert entering.shape == leaving.shape == (entering.shape[0], 32)
        assert not model.training and not entering.requires_grad
        seen[index] += len(entering)

    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert calibrate(model, batches, layers, observe) == real == 28
    assert seen == [real] * 4
    assert model.training
    assert not any(layer._forward_hooks for layer in layers)


def test_hooks_are_removed_after_an_error(make_model, batches):
    model = make_model()

    def observe(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        calibrate(model, batches, list(model.model.layers), observe)
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_no_real_token_is_refused(make_model, batches):
    masked = [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in batches]
    for empty in ([], masked):
        with pytest.raises(ValueError, match="0 real tokens"):
            calibrate(make_model(), empty, [], lambda *_: None)


def test_select_owns_contiguous_memory():
    parameter = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4), requires_grad=False)
    columns = select(parameter, [0, 3], dim=1)
    assert columns.tolist() == [[0, 3], [4, 7], [8, 11]]
    assert columns.is_contiguous() and not columns.requires_grad
    assert select(parameter, [0, 1, 2], dim=0).data_ptr() != parameter.data_ptr()
