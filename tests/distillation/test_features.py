"""Feature losses on tiny models: what counts, what is 0, and what is refused."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from q2t.distillation.batches import Batch, collate, predicting_states
from q2t.distillation.features import (
    Projections,
    attention_loss,
    capture,
    check_layer_map,
    head_groups,
    hidden_loss,
    in_teacher_ids,
    teacher_states,
)
from q2t.distillation.rows import encode
from q2t.smollm import train_tokenizer

LAYERS = [0, 1, 2, 3]
MAPS = [1, 2, 3]


def tiny(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: float) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2) | changes
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        intermediate_size=32,
        initializer_range=0.3,
        pad_token_id=1,
        eos_token_id=1,
        attn_implementation="eager",
        **shape,
    )
    return LlamaForCausalLM(config).to(dtype)


def losses(student: Any, teacher: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """MSE, cosine and attention KL, [tokens] each, layer by layer; projections are in the student's dtype."""
    ours, theirs = capture(student, batch, LAYERS, MAPS), teacher_states(teacher, batch, LAYERS, MAPS)
    widths = (student.config.hidden_size, teacher.config.hidden_size)
    projections = Projections(len(LAYERS), *widths, seed=0).to(student.dtype)
    return (
        hidden_loss(ours.hidden, theirs.hidden, projections, "mse"),
        hidden_loss(ours.hidden, theirs.hidden, projections, "cosine"),
        attention_loss(ours.attentions, theirs.attentions, head_groups(student.config, teacher.config)),
    )


def test_equal_models_have_no_loss_and_others_have_at_every_token(rows):
    batch = collate(rows(5))
    for values in losses(tiny(0), tiny(0), batch):
        assert values.shape == batch.targets.shape and values.abs().max() < 1e-12
    for values in losses(tiny(0), tiny(1), batch):
        # Before the first token there is but one place to look at.
        assert (values > 0).sum() >= len(values) - 5 and values.min() > -1e-12


def test_a_shift_by_one_is_seen(rows):
    batch = collate(rows(3))
    states = capture(tiny(), batch, LAYERS, MAPS)
    projections = Projections(len(LAYERS), 24, 24, seed=0)
    ours, theirs = [h[1:] for h in states.hidden], [h[:-1] for h in states.hidden]
    assert hidden_loss(ours, theirs, projections, "mse").min() > 0.1
    assert hidden_loss(ours, theirs, projections, "cosine").min() > 0.1
    ours, theirs = [a[1:] for a in states.attentions], [a[:-1] for a in states.attentions]
    assert attention_loss(ours, theirs, 4).min() > 0.1


def test_states_are_those_that_predict_the_targets(rows):
    model, batch = tiny(), collate(rows(4))
    states = capture(model, batch, LAYERS, MAPS)
    torch.testing.assert_close(states.last, predicting_states(model, batch))
    torch.testing.assert_close(states.hidden[3], states.last)
    torch.testing.assert_close(states.hidden[0], model.get_input_embeddings()(batch.input_ids[batch.predicts]))
    query = batch.predicts.nonzero()[:, 1]
    for maps in states.attentions:
        torch.testing.assert_close(maps.sum(2), torch.ones_like(maps[..., 0]), rtol=0, atol=1e-6)  # a float32 softmax
        assert (maps[torch.arange(len(query)), :, query] > 0).all(), "a token sees itself"
        assert not any(token[:, at + 1 :].any() for token, at in zip(maps, query.tolist(), strict=True))


def test_gradient_reaches_states_at_predicting_positions_alone(rows):
    batch, student, seen = collate(rows(4)), tiny(0), []
    # The last block is what the map names, so nothing can reach its other positions by attention.
    block = student.model.layers[-1].register_forward_hook(
        lambda *hooked: hooked[2].retain_grad() or seen.append(hooked[2])
    )
    ours, theirs = capture(student, batch, [3], []), teacher_states(tiny(1), batch, [3], [])
    hidden_loss(ours.hidden, theirs.hidden, Projections(1, 24, 24, 0), "mse").sum().backward()
    block.remove()
    (output,) = seen
    torch.testing.assert_close(output.grad.abs().sum(2) > 0, batch.predicts)


def test_the_teacher_gets_no_gradient_and_no_dropout(rows):
    batch, teacher = collate(rows(2)), tiny(1, attention_dropout=0.5).train()
    first, second = (teacher_states(teacher, batch, [2], [2]) for _ in range(2))
    assert not first.hidden[0].requires_grad and not first.attentions[0].requires_grad
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_padding_changes_nothing_though_pad_is_eos(rows):
    student, teacher, some = tiny(0), tiny(1), rows(6)
    longest = max(some, key=lambda row: len(row.input_ids))
    for row in some:
        alone = losses(student, teacher, collate([row]))
        padded = losses(student, teacher, collate([row, longest]))
        for a, b in zip(alone, padded, strict=True):
            torch.testing.assert_close(a, b[: row.completion_tokens])
    batch = collate(some)
    lengths = torch.tensor([len(row.input_ids) for row in some])
    padding = torch.arange(batch.input_ids.shape[1])[None] >= lengths[:, None]
    assert padding.any()
    as_eos = replace(batch, input_ids=batch.input_ids.masked_fill(padding, 1))
    torch.testing.assert_close(losses(student, teacher, as_eos), losses(student, teacher, batch))


@pytest.mark.parametrize("per_micro_batch", [1, 4, 5])
def test_micro_batches_add_up(rows, per_micro_batch):
    some, teacher = rows(8), tiny(1)
    gradients = []
    for size in (8, per_micro_batch):
        student = tiny(0)
        for start in range(0, len(some), size):
            batch = collate(some[start : start + size])
            values = torch.stack(losses(student, teacher, batch))
            (values @ batch.weights.double()).sum().backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_gradient_by_finite_differences(kind):
    generator = torch.Generator().manual_seed(0)
    projections = Projections(2, 5, 7, seed=1).double()
    ours = [torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    theirs = [torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(2)]
    inputs = (*ours, *projections.parameters())
    assert len(inputs) == 4
    assert torch.autograd.gradcheck(lambda a, b, *_: hidden_loss([a, b], theirs, projections, kind), inputs)


@pytest.mark.parametrize(("heads", "teacher_heads", "groups"), [(4, 4, 4), (2, 6, 2), (4, 2, 1)])
def test_attention_gradient_by_finite_differences(heads, teacher_heads, groups):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, heads, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(3, teacher_heads, 5, generator=generator, dtype=torch.float64).softmax(2)
    assert torch.autograd.gradcheck(lambda x: attention_loss([x.softmax(2)], [theirs], groups), scores)


def test_attention_value_is_the_kl_of_group_means_by_hand():
    ours = torch.tensor([[[0.5, 0.5, 0.0]]])
    theirs = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]])
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    torch.testing.assert_close(attention_loss([ours], [theirs], 1), expected[None])
    torch.testing.assert_close(attention_loss([ours, theirs[:, 1:]], [theirs, ours], 1), expected[None] / 2)


def test_what_a_sliding_window_hides_is_no_loss():
    """The student sees two of four positions: it learns the teacher's shares of these, and the rest can't be learnt."""
    student = torch.tensor([[[0.0, 0.0, 0.5, 0.5]]])
    teacher = torch.tensor([[[0.4, 0.2, 0.3, 0.1]]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(attention_loss([student], [teacher], 1)) == pytest.approx(expected, abs=1e-6)


def test_rounded_attention_gives_no_negative_kl():
    scores = torch.randn(200, 3, 40, generator=torch.Generator().manual_seed(0))
    ours, theirs = scores.softmax(2).bfloat16(), (scores + 1e-3).softmax(2).bfloat16()
    assert attention_loss([ours], [theirs], 3).min() > -1e-6
    assert attention_loss([0.99 * ours], [theirs], 3).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("student", "teacher", "groups"),
    [
        ((4, 2), (4, 2), 4),
        ((4, 1), (4, 4), 4),
        ((4, 2), (8, 2), 2),
        ((9, 3), (15, 5), 1),
        ((6, 6), (4, 4), 2),
        ((8, 4), (32, 8), 4),
    ],
)
def test_groups_keep_the_heads_of_one_key_together(student, teacher, groups):
    from transformers import LlamaConfig

    configs = [LlamaConfig(num_attention_heads=a, num_key_value_heads=b) for a, b in (student, teacher)]
    assert head_groups(*configs) == groups
    if student[0] != teacher[0]:
        assert all(b % groups == 0 for _, b in (student, teacher))


def test_another_shape_learns_through_projections(rows):
    """Everything differs: width, depth, heads. The loss falls, the projections are apart from the student."""
    batch = collate(rows(4))
    student = tiny(0, torch.float32, hidden_size=16, num_hidden_layers=2, num_key_value_heads=1)
    teacher = tiny(1, torch.float32, num_attention_heads=6, num_key_value_heads=3)
    layer_map, maps = [(0, 0), (1, 2), (2, 3)], [(1, 2), (2, 3)]
    projections = Projections(len(layer_map), 16, 24, seed=0)
    assert [p.shape for p in projections.parameters()] == [(24, 16)] * 3
    theirs = teacher_states(teacher, batch, [t for _, t in layer_map], [t for _, t in maps])
    optimizer = torch.optim.Adam([*student.parameters(), *projections.parameters()], lr=0.01)
    names, history = list(student.state_dict()), []
    for _ in range(15):
        ours = capture(student, batch, [s for s, _ in layer_map], [s for s, _ in maps])
        values = torch.stack(
            [
                hidden_loss(ours.hidden, theirs.hidden, projections, "mse").sum(),
                attention_loss(ours.attentions, theirs.attentions, head_groups(student.config, teacher.config)).sum(),
            ]
        )
        history.append(values.detach())
        optimizer.zero_grad()
        values.sum().backward()
        optimizer.step()
    assert (history[-1] < 0.8 * history[0]).all()
    assert list(student.state_dict()) == names


def test_projections_follow_from_the_seed_and_keep_lengths():
    before = torch.random.get_rng_state()
    a, b, c = (Projections(2, 5, 7, seed).maps[0].weight for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.testing.assert_close(a.T @ a, torch.eye(5))
    assert not list(Projections(2, 5, 5, 0).parameters())


def test_layers_that_do_not_exist_are_refused():
    student, teacher = tiny(num_hidden_layers=2).config, tiny().config
    check_layer_map("layers", [(0, 0), (2, 3)], student, teacher, embeddings=True)
    for pairs, embeddings, message in [
        ([(1, 1), (3, 3)], True, r"layers: \[3, 3\] names student layer 3: choose from 0 to 2"),
        ([(2, 4)], True, r"layers: \[2, 4\] names teacher layer 4: choose from 0 to 3"),
        ([(-1, 3)], True, r"student layer -1: choose from 0 to 2"),
        ([(1, 0)], False, r"teacher layer 0: choose from 1 to 3"),
        ([], True, r"layers is empty: name at least one"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_layer_map("layers", pairs, student, teacher, embeddings=embeddings)


def test_fused_attention_has_no_maps(rows):
    model = tiny()
    model.set_attn_implementation("sdpa")
    with pytest.raises(AssertionError, match="eager"):
        capture(model, collate(rows(1)), [], [1])


def test_a_trimmed_student_and_its_teacher_read_the_same_rows(examples):
    from q2t.compression.vocabulary import trim

    some = examples(6)
    texts = [example.text + example.question for example in some]
    teacher = train_tokenizer([*texts * 3, "voltage divider resistor " * 9], 300)
    trimmed = trim(teacher, [*texts, "<|im_start|>user\nassistant\n<|im_end|>"], 285)
    rows = encode(trimmed.tokenizer, some)
    mapped = in_teacher_ids(rows, trimmed.tokenizer, teacher)
    kept = torch.tensor(trimmed.kept)
    assert any(ours != theirs for ours, theirs in enumerate(trimmed.kept))
    for row, theirs, own in zip(rows, mapped, encode(teacher, some), strict=True):
        assert theirs.input_ids.tolist() == kept[torch.from_numpy(row.input_ids).long()].tolist()
        assert theirs.input_ids.tolist() == own.input_ids.tolist()
        assert (theirs.id, theirs.weight, theirs.prompt_length) == (row.id, row.weight, row.prompt_length)
    torch.testing.assert_close(collate(rows).predicts, collate(mapped).predicts)


def test_other_tokens_are_refused(examples, tokenizer):
    some = examples(3)
    with pytest.raises(ValueError, match="row e0: the student reads .* where the teacher reads .* leave the feature"):
        in_teacher_ids(encode(tokenizer(), some), tokenizer(), train_tokenizer(["think" * 9], 270))


def test_as_many_tokens_are_not_the_same_tokens():
    from q2t.distillation.rows import Row

    student, teacher = (train_tokenizer([f"{pair} "] * 9, 260) for pair in ("ab", "bc"))
    ids = student("xabc").input_ids
    assert len(ids) == len(teacher("xabc").input_ids)
    row = Row("r", "target", "f", 1.0, np.array([*ids, student.eos_token_id], np.int32), 1)
    with pytest.raises(ValueError, match="row r: the student reads 'ab' where the teacher reads 'a'"):
        in_teacher_ids([row], student, teacher)
