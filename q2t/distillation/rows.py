"""Training rows: what a model reads of an example, in its own tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from q2t.records import Example
from q2t.sources import chat_prompt

NO_SYSTEMS: Mapping[str, str] = MappingProxyType({})


def _no_labels() -> np.ndarray:
    return np.empty((0, 0), np.uint16)


@dataclass(frozen=True, eq=False)
class Row:
    """A training row. Labels are per completion token: entry i is of the position that predicts token i."""

    id: str
    domain: str
    family: str
    weight: float
    input_ids: np.ndarray
    """[prompt + completion], int32; the last one is eos."""
    prompt_length: int
    answer_start: int = 0
    """Completion tokens of the reasoning, which stand before those of the answer; 0 where nothing is reasoned."""
    top_ids: np.ndarray = field(default_factory=_no_labels)
    """[completion, k], uint16 or int32, most probable first; [0, k] if the teacher gives no labels."""
    top_logprobs: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float16))
    """[completion, k], float16, natural logarithm."""
    tail_logprob: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    """[completion], float32: log of the mass of all other tokens, those that the student lacks among them."""

    @property
    def completion_tokens(self) -> int:
        return len(self.input_ids) - self.prompt_length


def prompts(tokenizer: Any, examples: Sequence[Example], systems: Mapping[str, str] = NO_SYSTEMS) -> list[str]:
    """The questions in the model's chat template, up to where the answers begin.

    Args:
        systems: the system prompt of each teacher that has one, by name: for a row that it wrote.
    """
    return [chat_prompt(tokenizer, example.question, systems.get(example.teacher, "")) for example in examples]


def encode(tokenizer: Any, examples: Sequence[Example], systems: Mapping[str, str] = NO_SYSTEMS) -> list[Row]:
    """Rows without labels: the prompt as at generation, then text and eos.

    Prompt and completion are segmented apart, since a model that answers has its prompt segmented alone.

    Args:
        systems: as for `prompts`; for a teacher, which answered so, and never for a student.
    """
    if not examples:
        return []
    asked = tokenizer(prompts(tokenizer, examples, systems), add_special_tokens=False).input_ids
    written = tokenizer([e.text for e in examples], add_special_tokens=False, return_offsets_mapping=True)
    rows = []
    for example, prompt, completion, offsets in zip(
        examples, asked, written.input_ids, written.offset_mapping, strict=True
    ):
        ids = np.array([*prompt, *completion, tokenizer.eos_token_id], np.int32)
        answer = example.text.find("<answer>") if example.domain == "target" else 0
        reasoning = sum(start < answer for start, _ in offsets)
        rows.append(Row(example.id, example.domain, example.family, example.weight, ids, len(prompt), reasoning))
    return rows
