"""A teacher behind any OpenAI-compatible chat endpoint, named by a pointer folder."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event
from typing import Any, Literal

import httpx
from pydantic import Field, ValidationError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from q2t.config import Section, Teacher
from q2t.records import Completion, Json, Problem, content_id
from q2t.sources import POINTER
from q2t.teachers.journal import Journal
from q2t.teachers.keys import completion_key

ATTEMPTS = 6
BACKOFF = wait_exponential(multiplier=2, max=60) + wait_random(0, 1)
"""Seconds between attempts, unless the server names them in Retry-After: 62 together at least, since the limits that
servers set are often those of a minute."""
LONGEST_WAIT = 300.0
"""Seconds of Retry-After that are obeyed."""
TIMEOUT = httpx.Timeout(600, connect=20)
"""Seconds; those of OpenAI's own client, with a shorter one to connect."""
NOT_ASKED = "not asked any more"
LONGEST_LIST = 20
"""Failed answers that an error message names."""
FINISHED: dict[str, Literal["stop", "length"]] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "model_length", "content_filter"), "length"),
    **dict.fromkeys(("tool_calls", "function_call", "abort", "insufficient_system_resource"), "length"),
}
"""What servers say of an answer that ended by itself, or that ended otherwise and is kept as one that was cut: it is
paid for."""


class Pointer(Section):
    """An endpoint instead of a model: the content of a pointer folder's pointer.json."""

    base_url: str = Field(pattern=r"^https?://")
    """Up to and including the version, "https://api.example.com/v1"."""
    model: str
    api_key_env: str | None = None
    """Environment variable that holds the key; null for a server that wants none."""
    system: str = ""
    """System prompt: where a teacher is told the answer format that the student shall learn."""


class Failed(Exception):
    """This answer can't be had."""


class Transient(Failed):
    """Worth another attempt, after `retry_after` seconds if the server named them."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Refused(Failed):
    """The server treats every request alike (wrong key, model or address, no usage): the rest need not be asked."""


@dataclass(frozen=True)
class _Question:
    """One answer to be had, under its key."""

    key: str
    problem: Problem
    sample: int
    settings: dict[str, Json]


def load_pointer(folder: Path) -> Pointer:
    """Read a pointer folder.

    Raises:
        ValueError: pointer.json is missing or wrong; names the key.
    """
    path = folder / POINTER
    try:
        return Pointer.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: a teacher's folder holds a model or a {POINTER}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path}: {key}: {first['msg']}; valid keys: {', '.join(Pointer.model_fields)}") from None


def answers(
    problems: Sequence[Problem], teacher: Teacher, pointer: Pointer, journal: Journal, *, name: str, seed: int
) -> list[Completion]:
    """`teacher.samples` answers to every problem, in the order of problems and samples.

    Only what the journal lacks is asked, `teacher.batch_size` requests at a time, and each answer goes into
    the journal as it arrives. The request's `seed` is drawn from the key: each sample has its own.

    Raises:
        ValueError: a system prompt that the endpoint would not get, no API key, or some answers failed; all others are
            in the journal.
        OSError: the journal could not be written; nothing more is asked.
    """
    if teacher.system:
        raise ValueError(f"teachers.{name}.system is for a model folder: put it into {teacher.model}/{POINTER}")
    wanted = _questions(problems, teacher, pointer, name, seed)
    if missing := [question for question in wanted if question.key not in journal.rows]:
        secret = _secret(pointer)
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        limits = httpx.Limits(max_connections=teacher.batch_size)
        with httpx.Client(base_url=pointer.base_url, headers=headers, timeout=TIMEOUT, limits=limits) as client:
            failed = _ask_all(missing, client, teacher, pointer, journal, name)
        if failed:
            report = _report(failed, len(missing), name)
            raise ValueError(report.replace(secret, "***") if secret else report)  # servers like to echo it
    return [journal.rows[question.key] for question in wanted]


def lacks(
    problems: Sequence[Problem], teacher: Teacher, pointer: Pointer, journal: Journal, *, name: str, seed: int
) -> bool:
    """Whether `answers` would have to ask."""
    wanted = _questions(problems, teacher, pointer, name, seed)
    return any(question.key not in journal.rows for question in wanted)


def _questions(
    problems: Sequence[Problem], teacher: Teacher, pointer: Pointer, name: str, seed: int
) -> list[_Question]:
    return [
        _question(problem, sample, teacher, pointer, name, seed)
        for problem in problems
        for sample in range(teacher.samples)
    ]


def _question(problem: Problem, sample: int, teacher: Teacher, pointer: Pointer, name: str, seed: int) -> _Question:
    sampling: dict[str, Json] = {
        "temperature": teacher.temperature,
        "top_p": teacher.top_p,
        "max_new_tokens": teacher.max_new_tokens,
    }
    model = f"{pointer.model} at {pointer.base_url.rstrip('/')}"
    system = content_id("system", pointer.system)
    key, settings = completion_key(name, model, system, sampling, problem.id, sample, seed)
    return _Question(key, problem, sample, settings)


def _secret(pointer: Pointer) -> str:
    if pointer.api_key_env is None:
        return ""
    secret = os.environ.get(pointer.api_key_env, "").strip()
    if not secret:
        raise ValueError(
            f"api_key_env: the environment variable {pointer.api_key_env} is empty; put the key for "
            f"{pointer.base_url} into it"
        )
    if not re.fullmatch(r"[!-~]+", secret):
        raise ValueError(
            f"api_key_env: the environment variable {pointer.api_key_env} holds a space, a line break or a character "
            "that no header takes: put the key alone into it"
        )
    return secret


def _ask_all(
    questions: list[_Question],
    client: httpx.Client,
    teacher: Teacher,
    pointer: Pointer,
    journal: Journal,
    name: str,
) -> list[tuple[_Question, str]]:
    """Ask and journal; what failed, and why."""
    failed = []
    stop = Event()

    def answer(question: _Question) -> None:
        known: dict[str, Any] = {"id": question.key, "problem_id": question.problem.id, "sample": question.sample}
        try:
            said = _ask(question, client, teacher, pointer, stop)
            journal.append([Completion(teacher=name, settings=question.settings, **known, **said)])
        except Exception as error:
            if isinstance(error, Refused) or not isinstance(error, Failed):
                stop.set()  # here, before this thread takes its next question
            raise

    pool = ThreadPoolExecutor(teacher.batch_size)
    try:
        asked: dict[Future[None], _Question] = {pool.submit(answer, question): question for question in questions}
        for future in as_completed(asked):
            try:
                future.result()
            except CancelledError:
                failed.append((asked[future], NOT_ASKED))
            except Failed as error:
                failed.append((asked[future], str(error)))
                if isinstance(error, Refused):
                    for other in asked:
                        other.cancel()
    finally:
        # After an interrupt or a full disk nothing is asked again; what is under way still gets journalled.
        stop.set()
        pool.shutdown(cancel_futures=True)
    return failed


def _ask(question: _Question, client: httpx.Client, teacher: Teacher, pointer: Pointer, stop: Event) -> dict[str, Any]:
    """Text, finish reason and token counts of one answer, after ATTEMPTS attempts at most; none once `stop` is set."""

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise Failed(NOT_ASKED)

    pause(0)
    messages = [{"role": "user", "content": question.problem.question}]
    if pointer.system:
        messages.insert(0, {"role": "system", "content": pointer.system})
    request = {
        "model": pointer.model,
        "messages": messages,
        "temperature": teacher.temperature,
        "top_p": teacher.top_p,
        "max_tokens": teacher.max_new_tokens,
        "seed": int(question.key, 16) % 2**31,
    }
    retrying = Retrying(
        retry=retry_if_exception_type(Transient),
        stop=stop_after_attempt(ATTEMPTS),
        wait=_wait,
        sleep=pause,
        reraise=True,
    )
    return retrying(_attempt, client, request, question.problem.domain == "target")


def _attempt(client: httpx.Client, request: dict[str, Any], target: bool) -> dict[str, Any]:
    try:
        reply = client.post("chat/completions", json=request)
    except httpx.RequestError as error:
        raise Transient(f"{type(error).__name__}: {error}") from None
    if not reply.is_success:
        message = f"HTTP {reply.status_code}: {_said(reply)}"
        if reply.status_code in (401, 403, 404):
            raise Refused(message)
        if reply.status_code in (408, 429) or reply.status_code >= 500:
            raise Transient(message, _retry_after(reply))
        raise Failed(message)
    try:
        body = reply.json()
        choice = body["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        content, reasoning = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
    except (ValueError, LookupError, TypeError, AttributeError):  # cut off, or an error under HTTP 200
        raise Transient(f"no chat completion: {_said(reply)}") from None
    # An answer from here on is paid for, and the next in a form that is not known would be too.
    try:
        text = _text(content, reasoning, target)
    except (LookupError, TypeError):
        raise Refused(f"a chat completion whose content is no text: {_said(reply)}") from None
    if reason is None:
        raise Refused(f"a chat completion without finish_reason: {_said(reply)}")
    if not isinstance(reason, str) or reason.lower() not in FINISHED:
        raise Refused(f"finish_reason {reason!r}, which says neither that the answer is whole nor that it was cut")
    said = {"text": text, "finish_reason": FINISHED[reason.lower()]}
    if not (usage := body.get("usage")):
        raise Refused(f"a chat completion without usage, the counts of its tokens: {_said(reply)}")
    if not isinstance(usage, dict) or not usage.keys() & {"prompt_tokens", "completion_tokens", "total_tokens"}:
        raise Refused(f"usage {str(usage)[:200]} without prompt_tokens and completion_tokens")
    return said | {key: _count(usage.get(key)) for key in ("prompt_tokens", "completion_tokens")}


def _said(reply: httpx.Response) -> str:
    """How a server's message begins; the key, which servers like to echo, is taken out before it is cut."""
    secret = reply.request.headers.get("Authorization", "").removeprefix("Bearer ")
    return (reply.text.replace(secret, "***") if secret else reply.text)[:200]


def _text(content: Any, reasoning: Any, target: bool) -> str:
    """The answer as one text. Servers that parse reasoning apart get it put back for target problems.

    Raises:
        LookupError, TypeError: neither a text nor a list of parts with texts.
    """
    text, reasoning = _joined(content, "text"), _joined(reasoning, "text") or _joined(content, "thinking")
    if target and reasoning and "<think>" not in text:
        text = f"<think>{reasoning}</think>{text}"
    return re.sub("[\ud800-\udfff]", "\ufffd", text)  # half an emoji, cut by the token cap, is no Unicode


def _joined(content: Any, kind: str) -> str:
    """The texts of one kind, of a content that may come in parts: {"type": "text", "text": "..."}, one of the kind
    "thinking" with parts of its own."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content if kind == "text" else ""
    parts = [part[kind] for part in content if part["type"] == kind]
    return "".join(part if isinstance(part, str) else _joined(part, "text") for part in parts)


def _count(tokens: Any) -> int:
    """0 for what is no number, which the data checks warn of: the answer is paid for all the same."""
    try:
        return int(tokens)
    except (ValueError, TypeError, OverflowError):
        return 0


def _retry_after(reply: httpx.Response) -> float | None:
    value = reply.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # missing, or a date without a zone
            return None
    return max(0.0, min(seconds, LONGEST_WAIT))


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, Transient) and error.retry_after is not None:
        return error.retry_after
    return BACKOFF(state)


def _report(failed: list[tuple[_Question, str]], asked: int, name: str) -> str:
    failed.sort(key=lambda item: (item[1] == NOT_ASKED, item[0].problem.id, item[0].sample))
    lines = [
        f"  {question.problem.id} sample {question.sample} (answer {question.key}): {why}"
        for question, why in failed[:LONGEST_LIST]
    ]
    if len(failed) > LONGEST_LIST:
        lines.append(f"  and {len(failed) - LONGEST_LIST} more")
    return (
        f"teachers.{name}: {len(failed)} of {asked} answers failed; the others are in the journal, and the "
        "next run asks only for these:\n" + "\n".join(lines)
    )
