"""The answer format of target rows, DeepSeek-R1's: `<think>reasoning</think><answer>answer</answer>`."""

import re
from dataclasses import dataclass

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_TAG = re.compile("|".join(TAGS))


@dataclass(frozen=True)
class Trajectory:
    """A worked answer. Both parts are stripped, non-empty and free of tags."""

    reasoning: str
    answer: str


class Malformed(ValueError):
    """The text is no trajectory.

    `rule` says why: no_think, no_answer (the opening tag is missing), unclosed_think, unclosed_answer,
    two_thinks, two_answers (a tag stands twice), order, text_outside, empty_think or empty_answer.
    """

    def __init__(self, rule: str) -> None:
        super().__init__(f"not <think>...</think><answer>...</answer>: {rule}")
        self.rule = rule


def parse(text: str) -> Trajectory:
    """Take a trajectory apart: each tag once, in order, no part empty, nothing but whitespace elsewhere.

    Raises:
        Malformed: anything else; `rule` names the first reason in the order of its docstring.
    """
    found = _TAG.findall(text)
    if found != list(TAGS):
        raise Malformed(_wrong_tags(found))
    before, reasoning, between, answer, after = (part.strip() for part in _TAG.split(text))
    if before or between or after:
        raise Malformed("text_outside")
    if not reasoning:
        raise Malformed("empty_think")
    if not answer:
        raise Malformed("empty_answer")
    return Trajectory(reasoning, answer)


def render(reasoning: str, answer: str) -> str:
    """The one text that `parse` reads back as these two parts (stripped).

    Raises:
        Malformed: a part is empty or holds a tag.
    """
    parts = Trajectory(reasoning.strip(), answer.strip())
    text = f"<think>{parts.reasoning}</think><answer>{parts.answer}</answer>"
    parse(text)
    return text


def _wrong_tags(found: list[str]) -> str:
    for part in ("think", "answer"):
        if f"<{part}>" not in found:
            return f"no_{part}"
    for part in ("think", "answer"):
        if f"</{part}>" not in found:
            return f"unclosed_{part}"
    for part in ("think", "answer"):
        if found.count(f"<{part}>") > 1 or found.count(f"</{part}>") > 1:
            return f"two_{part}s"
    return "order"
