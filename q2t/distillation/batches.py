"""Rows to tensors: which rows share a step, and which position predicts which token.

Rows are padded to the right, and attention is causal, so that no real token ever sees padding: no attention
mask is needed. What is padding is known from the lengths, never from an id, so pad == eos is no problem.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from q2t.distillation.rows import Row

BUCKET = 32
"""Lengths are padded to multiples of this: oneDNN keeps a primitive and its memory per shape."""
ACTIVATIONS, LAYER_INPUT = 60, 4
"""Bytes that a layer keeps for its backward, for each token and unit of width; or with gradient checkpointing, when a
layer at a time keeps the former."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")
"""What transformers' configurations call a cap on the logits, or a factor on them."""


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, and their completion tokens in one line, row after row."""

    input_ids: Tensor
    """[rows, length], int64."""
    predicts: Tensor
    """[rows, length], bool: position i predicts token i + 1, a completion token. Nothing else shifts."""
    targets: Tensor
    """[tokens], int64: the completion tokens."""
    weights: Tensor
    """[tokens], float32: the weight of the token's row."""
    reasoning: Tensor
    """[tokens], bool: the token stands before its row's answer."""
    top_ids: Tensor
    """[tokens, k], int64; -1 where the row has no labels, k = 0 where no row has."""
    top_logprobs: Tensor
    """[tokens, k], float32."""
    tail_logprob: Tensor
    """[tokens], float32."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def collate(rows: Sequence[Row]) -> Batch:
    """Pad rows to the right, to the next multiple of BUCKET."""
    lengths = [len(row.input_ids) for row in rows]
    shape = (len(rows), -(-max(lengths) // BUCKET) * BUCKET)
    input_ids = np.zeros(shape, np.int64)
    predicts = np.zeros(shape, bool)
    tokens = sum(row.completion_tokens for row in rows)
    k = max(row.top_ids.shape[1] for row in rows)
    top_ids = np.full((tokens, k), -1, np.int64)
    top_logprobs = np.zeros((tokens, k), np.float32)
    tail_logprob = np.zeros(tokens, np.float32)
    weights = np.empty(tokens, np.float32)
    reasoning = np.zeros(tokens, bool)
    end = 0
    for i, row in enumerate(rows):
        input_ids[i, : lengths[i]] = row.input_ids
        predicts[i, row.prompt_length - 1 : lengths[i] - 1] = True
        start, end = end, end + row.completion_tokens
        weights[start:end] = row.weight
        reasoning[start : start + row.answer_start] = True
        if len(row.top_ids):
            top_ids[start:end] = row.top_ids
            top_logprobs[start:end] = row.top_logprobs
            tail_logprob[start:end] = row.tail_logprob
    targets = np.concatenate([row.input_ids[row.prompt_length :] for row in rows]).astype(np.int64)
    arrays = (input_ids, predicts, targets, weights, reasoning, top_ids, top_logprobs, tail_logprob)
    return Batch(*map(torch.from_numpy, arrays))


def calibration(rows: Sequence[Row], size: int = 16) -> Iterator[dict[str, Tensor]]:
    """The rows as q2t.compression takes them: input_ids and attention_mask [rows, length], padded to the right."""
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        input_ids = collate(chosen).input_ids
        lengths = torch.tensor([len(row.input_ids) for row in chosen])
        mask = torch.arange(input_ids.shape[1])[None] < lengths[:, None]
        yield {"input_ids": input_ids, "attention_mask": mask.long()}


def held(model: torch.nn.Module) -> int:
    """Bytes that training holds from step to step: all weights, and of those trained a gradient and two moments."""
    return sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())


def room(device: str, held: int) -> int:
    """Bytes that a forward pass may keep for its backward: a quarter of what `held` bytes leave of a GPU's memory."""
    return max(0, int(torch.cuda.get_device_properties(device).total_memory) - held) // 4


def at_once(
    count: int, tokens: int, config: Any, device: str, held: int, *, checkpointing: bool = False, logits: int = 0
) -> int:
    """How many of `count` micro-batches go through a model of this configuration in one pass: 1 on a CPU.

    A GPU is done with a small model's four rows before the next kernel is launched. Padding to the longest row costs it
    less, and the gradient is the same.

    Args:
        count: micro-batches of a step and process, as many as the process with the most has.
        tokens: of the largest micro-batch of the step, its rows as long as the longest.
        held: bytes of the device that are taken.
        checkpointing: activations are computed again for the gradient.
        logits: bytes a token of those that are whole at once; 0 where the loss cuts them into chunks.
    """
    if device == "cpu":
        return 1
    layers = config.num_hidden_layers
    each = LAYER_INPUT * layers + ACTIVATIONS if checkpointing else ACTIVATIONS * layers
    most = max(1, room(device, held) // (tokens * (each * config.hidden_size + logits)))
    return math.ceil(count / math.ceil(count / most))  # in equal passes: a last one of few rows takes as long


def predicting_states(model: Any, batch: Batch) -> Tensor:
    """Final hidden states [tokens, width] of the positions that predict the batch's targets."""
    # All ones, padding too: transformers then takes the fused causal kernel. Given None, it builds a mask.
    everything = torch.ones_like(batch.input_ids)
    output = model.get_decoder()(input_ids=batch.input_ids, attention_mask=everything, use_cache=False)
    return output.last_hidden_state[batch.predicts]


def output_head(model: Any) -> Tensor:
    """The weight [vocabulary, width] whose product with `predicting_states` is the model's logits.

    Raises:
        ValueError: the model scales, caps or shifts its logits, which the losses would leave out.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    named = [name for name in CAPS if getattr(config, name, None)]
    named += [name for name in SCALES if getattr(config, name, 1.0) != 1.0]
    named += ["a bias of the output head"] * (getattr(head, "bias", None) is not None)
    if named:
        raise ValueError(
            f"a {config.model_type} has logits with {named[0]}, which no loss here knows: take a model without it, or, "
            "of a teacher, its words alone, from an endpoint"
        )
    weight: Tensor = head.weight
    return weight


def plan(lengths: Sequence[int], batch_size: int, micro_batch: int, *, seed: int, epoch: int) -> list[list[list[int]]]:
    """Row indices of an epoch: steps of batch_size rows, each cut into micro-batches of micro_batch rows.

    Rows of a micro-batch are near in length, which saves padding; the micro-batches of a step come from
    anywhere, since rows of one length are often of one family, and a step should see several. Every row comes
    once, and there are ceil(rows / batch_size) steps. Only the last step may be short, and of its micro-batches
    only the last, so that the order cut anew into micro_batch rows gives the same micro-batches. A function of
    its arguments alone, so that a resumed run needs no state.
    """
    assert batch_size % micro_batch == 0
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(lengths)).tolist()
    # Any rows may be the ones left over, or it would be the longest in every epoch.
    whole = len(shuffled) // micro_batch * micro_batch
    by_length = sorted(shuffled[:whole], key=lambda i: -(-lengths[i] // BUCKET))
    micro = [by_length[i : i + micro_batch] for i in range(0, whole, micro_batch)]
    micro = [micro[i] for i in rng.permutation(len(micro))]
    if whole < len(shuffled):
        micro.append(shuffled[whole:])
    per_step = batch_size // micro_batch
    return [micro[i : i + per_step] for i in range(0, len(micro), per_step)]
