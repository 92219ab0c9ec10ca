"""Feature distillation: the teacher's hidden states and attention maps as targets, beside what it says.

Sources: FitNets (arXiv 1412.6550) for hints through a learned regressor, TinyBERT (arXiv 1909.10351) for the layer
map, MiniLM (arXiv 2002.10957) for KL between attention distributions. Needs the teacher itself, online, and tokens
that are the same for both: `in_teacher_ids` refuses others.

Like `losses`, everything is one value per completion token, never a mean over tokens. Values count at the
positions that predict completion tokens, and nowhere else: no prompt, no padding.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from q2t.distillation.batches import Batch
from q2t.distillation.rows import Row

LayerMap = Sequence[Sequence[int]]
"""Pairs of a student layer and the teacher layer that it imitates. Layer n is the output of the n-th block, 0 the
embeddings, and the last one comes after the final norm; layer n of attention maps is the n-th block's."""


class States(NamedTuple):
    """What a model computes at the positions that predict a batch's targets, in the order of the layers asked
    for."""

    last: Tensor
    """[tokens, width]: final hidden states, as `batches.predicting_states` has them."""
    hidden: tuple[Tensor, ...]
    """[tokens, width] for each layer."""
    attentions: tuple[Tensor, ...]
    """[tokens, heads, length] for each layer: distributions over the positions up to the token's own."""


def check_layer_map(field: str, pairs: LayerMap, student: Any, teacher: Any, *, embeddings: bool) -> None:
    """Refuse layers that a model doesn't have.

    Args:
        field: name of the setting that the pairs come from.
        student: its configuration, as the teacher's.
        embeddings: layer 0 exists, as it does among hidden states and not among attention maps.

    Raises:
        ValueError: a layer is out of range, or there is none.
    """
    if not pairs:
        raise ValueError(f"{field} is empty: name at least one [student layer, teacher layer], or leave this loss out")
    first = 0 if embeddings else 1
    for pair in pairs:
        for name, layer, config in zip(("student", "teacher"), pair, (student, teacher), strict=True):
            layers = config.get_text_config().num_hidden_layers
            if not first <= layer <= layers:
                raise ValueError(f"{field}: {list(pair)} names {name} layer {layer}: choose from {first} to {layers}")


def in_teacher_ids(rows: Sequence[Row], student: Any, teacher: Any) -> list[Row]:
    """The rows as the teacher reads them, without labels; a trimmed student's ids are others than its teacher's.

    Args:
        student: its tokenizer, as the teacher's.

    Raises:
        ValueError: the teacher's tokens of a row differ from the student's; names the row and the first such
            token.
    """
    mapped = []
    for row in rows:
        parts = [row.input_ids[: row.prompt_length].tolist(), row.input_ids[row.prompt_length :].tolist()]
        texts = [student.decode(part, clean_up_tokenization_spaces=False) for part in parts]
        encoded = [teacher(text, add_special_tokens=False).input_ids for text in texts]
        for part, ids in zip(parts, encoded, strict=True):
            ours, theirs = student.convert_ids_to_tokens(part), teacher.convert_ids_to_tokens(ids)
            if ours != theirs:
                at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
                raise ValueError(
                    f"row {row.id}: the student reads {ours[at]!r} where the teacher reads {theirs[at]!r}, so their "
                    "hidden states belong to other tokens. Take a teacher with the student's tokenizer, or leave the "
                    "feature losses out"
                )
        ids = np.array([*encoded[0], *encoded[1]], np.int32)
        mapped.append(Row(row.id, row.domain, row.family, row.weight, ids, row.prompt_length))
    return mapped


def capture(model: Any, batch: Batch, layers: Sequence[int], attention_layers: Sequence[int]) -> States:
    """One forward pass, with the states that the losses need.

    Attention maps take the model's eager attention: `model.set_attn_implementation("eager")`. The fused kernels
    never have them.
    """
    eager = model.config.get_text_config()._attn_implementation == "eager"
    assert eager or not attention_layers, "fused attention has no maps: set eager"
    output = model.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=torch.ones_like(batch.input_ids),
        use_cache=False,
        output_hidden_states=bool(layers),
        output_attentions=bool(attention_layers),
    )
    return States(
        output.last_hidden_state[batch.predicts],
        tuple(output.hidden_states[layer][batch.predicts] for layer in layers),
        tuple(output.attentions[layer - 1].transpose(1, 2)[batch.predicts] for layer in attention_layers),
    )


def teacher_states(teacher: Any, batch: Batch, layers: Sequence[int], attention_layers: Sequence[int]) -> States:
    """`capture` without a gradient and without dropout.

    Args:
        batch: of the same rows as the student's, `in_teacher_ids`.
    """
    teacher.eval()
    with torch.no_grad():
        return capture(teacher, batch, layers, attention_layers)


class Projections(nn.Module):
    """One map per pair from the student's width to the teacher's, TinyBERT's W_h.

    They are of use in training alone: optimise their parameters with the student's, then drop them. Where the
    widths agree there is nothing to learn, and a student that equals its teacher has a loss of 0. A new
    projection is orthogonal, so that it starts by keeping lengths, and follows from the seed alone.
    """

    def __init__(self, pairs: int, student_width: int, teacher_width: int, seed: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList()
        if student_width == teacher_width:
            self.maps.extend(nn.Identity() for _ in range(pairs))
            return
        generator = torch.Generator().manual_seed(seed)
        for _ in range(pairs):
            linear = nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False)
            nn.init.orthogonal_(linear.weight, generator=generator)
            self.maps.append(linear)

    def forward(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        return [project(states) for project, states in zip(self.maps, hidden, strict=True)]


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], projections: Projections, kind: Literal["mse", "cosine"]
) -> Tensor:
    """Distance of projected student states to the teacher's, [tokens]: a mean over the pairs.

    "mse" is the mean squared difference over the width; a few channels of great magnitude can dominate it.
    "cosine" is 1 - cos, between 0 and 2, and leaves magnitudes free.

    Args:
        student: [tokens, student width] for each pair, as `capture` has them.
        teacher: [tokens, teacher width] for each pair.
    """
    return _mean_over_pairs(
        [
            (ours - theirs).square().mean(1) if kind == "mse" else 1 - F.cosine_similarity(ours, theirs, dim=1)
            for ours, theirs in zip(map(_exact, projections(student)), map(_exact, teacher), strict=True)
        ]
    )


def head_groups(student: Any, teacher: Any) -> int:
    """Groups of heads to compare: each head with its like if both models have as many, else as many groups as
    both models' key/value heads can be dealt into.

    So query heads that share a key/value head stay together. Heads of a group stand beside each other.

    Args:
        student: its configuration, as the teacher's.
    """
    ours, theirs = student.get_text_config(), teacher.get_text_config()
    if ours.num_attention_heads == theirs.num_attention_heads:
        return ours.num_attention_heads
    return math.gcd(ours.num_key_value_heads, theirs.num_key_value_heads)


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], groups: int) -> Tensor:
    """KL(teacher || student) of attention distributions, [tokens], in nats: a mean over pairs and head groups.

    A group's distribution is the mean of its heads'. Equal models give 0.

    Args:
        student: [tokens, student heads, length] for each pair, as `capture` has them.
        teacher: [tokens, teacher heads, length] for each pair.
        groups: see `head_groups`.
    """
    values = []
    for ours, theirs in zip(student, teacher, strict=True):
        # Where a sliding window of the student's ends, it can learn nothing: the teacher's distribution over the rest.
        seen = _of_groups(ours, groups) > 0
        q, p = (_log_of_groups(maps, groups, seen) for maps in (ours, theirs))
        values.append((p.exp() * (p - q)).sum(2).mean(1))
    return _mean_over_pairs(values)


def _of_groups(maps: Tensor, groups: int) -> Tensor:
    """[tokens, groups, length]: the mean of each group's heads."""
    return _exact(maps).unflatten(1, (groups, -1)).mean(2)


def _log_of_groups(maps: Tensor, groups: int, seen: Tensor) -> Tensor:
    """[tokens, groups, length]. Renormalised, for maps in bfloat16 don't sum to 1 and KL could be negative."""
    merged = _of_groups(maps, groups) * seen
    merged = merged.clamp(min=torch.finfo(merged.dtype).tiny)  # behind the token too, where both are 0
    return (merged / merged.sum(2, keepdim=True)).log()


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _mean_over_pairs(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(values)).mean(0)
