"""The rows that travel through the pipeline, and their JSON Lines files."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

Split = Literal["lessons", "questions", "dev", "test", "general", "general_test"]
Json = str | int | float | bool | None | list[Any] | dict[str, Any]


class Record(BaseModel):
    """A frozen row. Unknown fields are refused: they would be lost on the way."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Problem(Record):
    """One question, and what a right answer to it has to satisfy."""

    id: str
    """Content hash: `content_id(family, inputs, question)`."""
    family: str
    """Name of the family; "general" for prompts outside the target."""
    domain: Literal["target", "general"]
    split: Split
    inputs: dict[str, Json]
    """The operands. Two target problems with equal inputs are the same problem in other words."""
    question: str
    check: dict[str, Json]
    """The verifier's own spec, e.g. {"kind": "value", "unit": "ohm", "expected": 560, "tolerance": 0.0}.
    Empty for general prompts: nothing decides them."""
    solution: str = ""
    """A worked solution as a trajectory; lessons only."""


class Completion(Record):
    """One answer of one teacher, with all that shaped it."""

    id: str
    """Content hash of everything that shaped the answer; the key of the generation journal."""
    problem_id: str
    teacher: str
    """Name in params.yaml's `teachers`."""
    sample: int
    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    settings: dict[str, Json]
    """Model fingerprint, template hash, sampling settings, seed."""


class Verdict(Record):
    """What a verifier says of an answer."""

    correct: bool
    rule: str
    """The rule that decided: "ok", or why not ("unparsable", "wrong_value", "not_a_candidate", ...)."""
    measured: Json = None
    """The value read from the answer, in the unit of the check."""


class Example(Record):
    """One training row: a kept answer."""

    id: str
    """The id of the completion that it comes from."""
    problem_id: str
    family: str
    domain: Literal["target", "general"]
    teacher: str
    question: str
    text: str
    weight: float = 1.0


R = TypeVar("R", bound=Record)


def content_id(*parts: Json) -> str:
    """The first 16 hex digits of the SHA-256 of the parts' canonical JSON."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def operands(problem: Problem) -> str:
    """What makes two target problems the same one: a hash of family and inputs.

    Numbers count by value (1 is 1.0), lists in any order: the order of candidates makes no new problem.
    """
    return content_id(problem.family, _canonical(problem.inputs))


def _canonical(value: Json) -> Json:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return sorted((_canonical(item) for item in value), key=content_id)
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    return value


def dump_line(row: Record) -> str:
    """One line of JSON with sorted keys and no newline: equal rows are equal bytes."""
    return json.dumps(row.model_dump(), sort_keys=True, ensure_ascii=False)


def read_jsonl(path: Path, kind: type[R]) -> list[R]:
    """All rows of a file.

    Raises:
        ValueError: a line is no valid `kind`; names the file, the line and the field.
    """
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                rows.append(kind.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(map(str, first["loc"])) or "the line"
                raise ValueError(
                    f"{path}:{number}: {field} of {kind.__name__}: {first['msg']}. Correct or delete that line."
                ) from None
    return rows


def write_jsonl(path: Path, rows: Iterable[Record]) -> None:
    """Write all rows, or nothing: the file appears by rename when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as out:
        for row in rows:
            out.write(dump_line(row) + "\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Sorted, indented JSON, published by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
