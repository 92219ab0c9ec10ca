import json
import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from endpoint import Reply, Server, chat, serving
from tenacity import RetryCallState, Retrying, wait_none

from q2t.config import Teacher
from q2t.records import Completion, Problem, content_id, read_jsonl
from q2t.teachers import openai
from q2t.teachers.journal import Journal
from q2t.teachers.openai import ATTEMPTS, Pointer, answers, lacks, load_pointer

SECRET = "sk-very-secret"


def error(status: int, message: str = "no", **headers: str) -> Reply:
    return (
        status,
        {k.replace("_", "-"): v for k, v in headers.items()},
        json.dumps({"error": message}).encode(),
    )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(openai, "BACKOFF", wait_none())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("EXPERT_KEY", SECRET)
    with serving() as running:
        yield running


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl")


def problem(number: int, domain: str = "target") -> Problem:
    question = f"question {number}"
    return Problem(
        id=content_id(domain, number),
        family="f",
        domain=domain,  # type: ignore[arg-type]
        split="questions",
        inputs={},
        question=question,
        check={},
    )


PROBLEMS = [problem(number) for number in range(10)]


def ask(server: Server, journal: Journal, problems: list[Problem] = PROBLEMS, **changes: Any) -> list[Completion]:
    teacher = {
        "model": "models/pointer",
        "prompts": "questions",
        "samples": 1,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 64,
        "batch_size": 4,
    }
    pointer = {"base_url": server.url, "model": "big", "api_key_env": "EXPERT_KEY", "system": "Think first."}
    seed = changes.pop("seed", 1)
    for name, value in changes.items():
        (teacher if name in teacher else pointer)[name] = value
    return answers(problems, Teacher(**teacher), Pointer(**pointer), journal, name="expert", seed=seed)  # type: ignore[arg-type]


def test_answers_come_in_order_and_each_is_asked_once(server: Server, journal: Journal) -> None:
    rows = ask(server, journal, samples=2)
    assert [(row.problem_id, row.sample) for row in rows] == [(p.id, k) for p in PROBLEMS for k in (0, 1)]
    assert rows[4].text == "answer to question 2" and rows[4].finish_reason == "stop"
    assert (rows[4].prompt_tokens, rows[4].completion_tokens, rows[4].teacher) == (7, 3, "expert")
    assert sorted(row.id for row in read_jsonl(journal.path, Completion)) == sorted(row.id for row in rows)
    assert ask(server, Journal(journal.path), samples=2) == rows
    assert len(server.requests) == 20
    assert ask(server, Journal(journal.path), samples=3)[::3] == rows[::2]
    assert len(server.requests) == 30


def test_the_request_says_all_that_was_set(server: Server, journal: Journal) -> None:
    ask(server, journal, PROBLEMS[:1], samples=3)
    request = server.requests[0]
    assert server.paths[0] == "/v1/chat/completions"
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert request["messages"] == [
        {"role": "system", "content": "Think first."},
        {"role": "user", "content": "question 0"},
    ]
    assert (request["model"], request["temperature"], request["top_p"], request["max_tokens"]) == (
        "big",
        0.7,
        0.9,
        64,
    )
    assert len({request["seed"] for request in server.requests}) == 3
    server.requests.clear()
    ask(server, journal, PROBLEMS[:1], system="", api_key_env=None)
    assert [message["role"] for message in server.requests[0]["messages"]] == ["user"]
    assert "Authorization" not in server.headers[-1]


@pytest.mark.parametrize(
    "change",
    [
        {"system": "Think twice."},
        {"temperature": 0.8},
        {"top_p": 1.0},
        {"max_new_tokens": 65},
        {"seed": 2},
    ],
)
def test_whatever_shapes_the_answer_makes_a_new_question(
    server: Server, journal: Journal, change: dict[str, Any]
) -> None:
    first = ask(server, journal, PROBLEMS[:1])
    # The folder's name is no part of the answer, nor is how many are asked at once.
    assert ask(server, journal, PROBLEMS[:1], model="models/other", batch_size=1) == first
    assert ask(server, journal, PROBLEMS[:1], **change)[0].id != first[0].id
    assert len(server.requests) == 2


def test_model_and_endpoint_make_a_new_question(server: Server, journal: Journal) -> None:
    teacher = Teacher(
        model="m", prompts="questions", samples=1, temperature=0.0, top_p=1.0, max_new_tokens=8, batch_size=1
    )
    pointers = [
        Pointer(base_url=server.url, model="big"),
        Pointer(base_url=server.url, model="bigger"),
        Pointer(base_url=server.url.replace("127.0.0.1", "localhost"), model="big"),
    ]
    ids = {answers(PROBLEMS[:1], teacher, p, journal, name="expert", seed=1)[0].id for p in pointers}
    assert len(ids) == 3
    same = Pointer(base_url=server.url + "/", model="big")
    assert answers(PROBLEMS[:1], teacher, same, journal, name="expert", seed=1)[0].id in ids


@pytest.mark.parametrize(
    "bad",
    [
        error(500),
        error(503),
        error(429, Retry_After="0"),
        error(408),
        (200, {}, chat("a")[2][:-20]),
        (200, {"Content-Length": "5000"}, b'{"choi'),
        (200, {}, b'{"error": "overloaded"}'),
        (200, {}, b"[]"),
        (200, {}, b'{"choices": [], "usage": {}}'),
        (200, {}, b'{"choices": [{"message": null, "finish_reason": "stop"}], "usage": {}}'),
        (200, {}, b"<html>Bad gateway</html>"),
    ],
)
def test_what_passes_is_tried_again(server: Server, journal: Journal, bad: Reply) -> None:
    server.script = lambda request, attempt: bad if attempt < 3 else chat("at last")
    assert [row.text for row in ask(server, journal, PROBLEMS[:2])] == ["at last"] * 2
    assert len(server.requests) == 6


def test_one_failure_loses_no_other_answer_and_the_next_run_asks_for_it_alone(server: Server, journal: Journal) -> None:
    server.script = lambda request, attempt: (
        error(500, "boom") if request["messages"][-1]["content"] == "question 3" else chat("fine")
    )
    with pytest.raises(ValueError, match="1 of 10 answers failed") as caught:
        ask(server, journal)
    assert PROBLEMS[3].id in str(caught.value) and "HTTP 500" in str(caught.value)
    assert len(server.requests) == 9 + ATTEMPTS
    assert len(Journal(journal.path).rows) == 9
    server.requests.clear()
    server.script = lambda request, attempt: chat("now")
    rows = ask(server, Journal(journal.path))
    assert [row.text for row in rows] == ["fine"] * 3 + ["now"] + ["fine"] * 6
    assert len(server.requests) == 1


def test_a_bad_request_fails_at_once_and_alone(server: Server, journal: Journal) -> None:
    server.script = lambda request, attempt: (
        error(400, "too long") if request["messages"][-1]["content"] == "question 0" else chat("fine")
    )
    with pytest.raises(ValueError, match="1 of 10 answers failed.*\n.*HTTP 400.*too long"):
        ask(server, journal)
    assert len(server.requests) == 10 and len(journal.rows) == 9


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_stops_the_asking_and_does_not_tell_the_key(
    server: Server, journal: Journal, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(request: dict[str, Any], attempt: int) -> Reply:
        time.sleep(0.02)
        return error(status, f"Incorrect API key: {SECRET}")

    server.script = refuse
    many = [problem(number) for number in range(200)]
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(ValueError, match=f"200 of 200.*\n.*{status}") as caught,
    ):
        ask(server, journal, many)
    assert len(server.requests) < 50
    assert SECRET not in str(caught.value) + caplog.text
    assert "and 180 more" in str(caught.value)


def test_a_key_that_straddles_the_end_of_the_message_is_not_told(server: Server, journal: Journal) -> None:
    server.script = lambda request, attempt: (401, {}, b"x" * 190 + SECRET.encode())
    with pytest.raises(ValueError, match="HTTP 401") as caught:
        ask(server, journal, PROBLEMS[:1])
    assert SECRET[:6] not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk one", "sk-ключ"])
def test_a_key_that_no_header_takes_is_refused_and_not_told(
    server: Server, journal: Journal, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERT_KEY", key)
    with pytest.raises(ValueError, match="EXPERT_KEY holds a space") as caught:
        ask(server, journal, PROBLEMS[:1])
    assert "sk" not in str(caught.value) and not server.requests


def test_a_server_that_counts_no_tokens_is_paid_once(server: Server, journal: Journal) -> None:
    _, _, body = chat("a")
    without = json.dumps({key: value for key, value in json.loads(body).items() if key != "usage"}).encode()
    server.script = lambda request, attempt: (200, {}, without)
    with pytest.raises(ValueError, match="without usage"):
        ask(server, journal, batch_size=1)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"message": {"content": "a"}}, "without finish_reason"),
        ({"message": {"content": "a"}, "finish_reason": "done"}, "finish_reason 'done'"),
        ({"message": {"content": {"text": "a"}}, "finish_reason": "stop"}, "whose content is no text"),
        ({"message": {"content": [{"type": "text"}]}, "finish_reason": "stop"}, "whose content is no text"),
        ({"message": {"content": "a", "reasoning": 5}, "finish_reason": "stop"}, "whose content is no text"),
    ],
)
def test_an_answer_in_a_form_that_is_not_known_is_paid_once(
    server: Server, journal: Journal, choice: dict[str, Any], message: str
) -> None:
    body = {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
    server.script = lambda request, attempt: (200, {}, json.dumps(body).encode())
    with pytest.raises(ValueError, match=message):
        ask(server, journal, batch_size=1)
    assert len(server.requests) == 1


def test_counts_in_a_form_that_is_not_known_are_paid_once(server: Server, journal: Journal) -> None:
    body = json.loads(chat("a")[2]) | {"usage": {"input_tokens": 7, "output_tokens": 3}}
    server.script = lambda request, attempt: (200, {}, json.dumps(body).encode())
    with pytest.raises(ValueError, match="input_tokens.* without prompt_tokens and completion_tokens"):
        ask(server, journal, batch_size=1)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("usage", "prompt_tokens"),
    [({"total_tokens": 5}, 0), ({"prompt_tokens": 3, "completion_tokens": None}, 3), ({"prompt_tokens": "x"}, 0)],
)
def test_an_answer_with_half_a_count_is_kept(
    server: Server, journal: Journal, usage: dict[str, Any], prompt_tokens: int
) -> None:
    def script(request: dict[str, Any], attempt: int) -> Reply:
        status, headers, body = chat("a")
        half = request["messages"][-1]["content"] == PROBLEMS[0].question
        return status, headers, json.dumps(json.loads(body) | ({"usage": usage} if half else {})).encode()

    server.script = script
    first, *others = ask(server, journal, batch_size=1)
    assert (first.prompt_tokens, first.completion_tokens) == (prompt_tokens, 0)
    assert {(row.prompt_tokens, row.completion_tokens) for row in others} == {(7, 3)}
    assert len(server.requests) == len(journal.rows) == len(PROBLEMS)


def test_what_a_journal_lacks_is_known_before_anything_is_asked(server: Server, journal: Journal) -> None:
    """Then what was published has to be at hand, or it would be paid for again."""
    teacher = Teacher(
        model="models/pointer",
        prompts="questions",
        samples=2,
        temperature=0.7,
        top_p=0.9,
        max_new_tokens=64,
        batch_size=4,
    )
    pointer = Pointer(base_url=server.url, model="big")
    known = {"name": "expert", "seed": 1}
    assert lacks(PROBLEMS, teacher, pointer, journal, **known)
    answers(PROBLEMS, teacher, pointer, journal, **known)
    assert not lacks(PROBLEMS, teacher, pointer, journal, **known)
    assert lacks(PROBLEMS, teacher, pointer, journal, name="expert", seed=2)
    assert lacks([*PROBLEMS, problem(77)], teacher, pointer, journal, **known)


def test_a_system_prompt_that_the_endpoint_would_not_get_is_refused(server: Server, journal: Journal) -> None:
    teacher = Teacher(
        model="models/pointer", prompts="questions", samples=1, temperature=0.7, top_p=0.9, max_new_tokens=64,
        batch_size=4, system="Answer in tags."
    )  # fmt: skip
    pointer = Pointer(base_url=server.url, model="big")
    with pytest.raises(
        ValueError, match=r"teachers.expert.system is for a model folder: .*models/pointer/pointer.json"
    ):
        answers(PROBLEMS, teacher, pointer, journal, name="expert", seed=1)


def test_no_more_requests_at_once_than_asked_for(server: Server, journal: Journal) -> None:
    def slow(request: dict[str, Any], attempt: int) -> Reply:
        time.sleep(0.02)
        return chat("a")

    server.script = slow
    ask(server, journal, batch_size=3)
    assert server.most_at_once == 3


def test_as_many_requests_at_once_as_asked_for(server: Server, journal: Journal) -> None:
    """httpx opens a hundred connections, unless told otherwise."""
    together = threading.Barrier(110)

    def meet(request: dict[str, Any], attempt: int) -> Reply:
        together.wait(timeout=30)
        return chat("a")

    server.script = meet
    ask(server, journal, PROBLEMS[:1], batch_size=110, samples=110)
    assert server.most_at_once == 110


def test_retry_after_is_obeyed(server: Server, journal: Journal) -> None:
    server.script = lambda request, attempt: error(429, Retry_After="0.3") if attempt == 1 else chat("a")
    start = time.monotonic()
    ask(server, journal, PROBLEMS[:1])
    assert 0.3 <= time.monotonic() - start < 3


def test_retry_after_may_be_a_date(server: Server, journal: Journal) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    server.script = lambda request, attempt: error(429, Retry_After=date) if attempt == 1 else chat("a")
    start = time.monotonic()
    ask(server, journal, PROBLEMS[:1])
    assert 0.5 <= time.monotonic() - start < 10  # a date has whole seconds


@pytest.mark.parametrize("date", ["soon", "Sat, 28 Nov 2026 06:00:00", "Sat, 28 Nov 2020 06:00:00 GMT"])
def test_a_date_that_says_nothing_is_no_wait(server: Server, journal: Journal, date: str) -> None:
    server.script = lambda request, attempt: error(429, Retry_After=date) if attempt == 1 else chat("a")
    assert len(ask(server, journal, PROBLEMS[:1])) == 1


def test_the_waits_outlast_a_limit_of_a_minute() -> None:
    def state(attempt: int) -> RetryCallState:
        made = RetryCallState(Retrying(), None, (), {})
        made.attempt_number = attempt
        return made

    assert sum(openai.BACKOFF(state(attempt)) for attempt in range(1, openai.ATTEMPTS)) >= 60


def test_a_full_disk_stops_the_asking(server: Server, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(request: dict[str, Any], attempt: int) -> Reply:
        time.sleep(0.02)
        return chat("a")

    def full(rows: Any) -> None:
        raise OSError(28, "No space left on device")

    server.script = slow
    monkeypatch.setattr(journal, "append", full)
    with pytest.raises(OSError, match="No space left"):
        ask(server, journal, [problem(number) for number in range(200)], batch_size=3)
    assert len(server.requests) <= 3


def test_after_a_full_disk_no_failed_answer_is_asked_again(
    server: Server, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_only(request: dict[str, Any], attempt: int) -> Reply:
        if request["messages"][-1]["content"] == "question 0":
            time.sleep(0.1)  # until the others wait for another attempt
            return chat("a")
        return error(503, Retry_After="30")

    def full(rows: Any) -> None:
        raise OSError(28, "No space left on device")

    server.script = first_only
    monkeypatch.setattr(journal, "append", full)
    start = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        ask(server, journal, PROBLEMS[:4])
    assert time.monotonic() - start < 10
    assert len(server.requests) == 4


def test_finish_reasons(server: Server, journal: Journal) -> None:
    server.script = lambda request, attempt: chat("half an ans", "length")
    assert ask(server, journal, PROBLEMS[:1])[0].finish_reason == "length"
    server.script = lambda request, attempt: chat("an answer", "end_turn")
    assert ask(server, journal, PROBLEMS[2:3])[0].finish_reason == "stop"
    server.script = lambda request, attempt: chat("", "content_filter")  # one question stops no run
    assert ask(server, journal, PROBLEMS[3:4])[0].finish_reason == "length"
    server.script = lambda request, attempt: chat("", "tool_calls")
    assert ask(server, journal, PROBLEMS[1:2])[0].finish_reason == "length"
    server.script = lambda request, attempt: chat("an answer", "STOP")
    assert ask(server, journal, PROBLEMS[4:5])[0].finish_reason == "stop"


def test_reasoning_that_the_server_took_apart_is_put_back_for_target_problems(server: Server, journal: Journal) -> None:
    server.script = lambda request, attempt: chat("<answer>5</answer>", reasoning_content="2 + 3")
    assert ask(server, journal, PROBLEMS[:1])[0].text == "<think>2 + 3</think><answer>5</answer>"
    assert ask(server, journal, [problem(1, "general")])[0].text == "<answer>5</answer>"
    server.script = lambda request, attempt: chat("<think>a</think><answer>5</answer>", reasoning="other")
    assert ask(server, journal, PROBLEMS[1:2])[0].text == "<think>a</think><answer>5</answer>"
    server.script = lambda request, attempt: chat(None, "length", reasoning="2 +")
    assert ask(server, journal, PROBLEMS[2:3])[0].text == "<think>2 +</think>"


def test_an_answer_in_parts_is_put_together(server: Server, journal: Journal) -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "2 +"}, {"type": "text", "text": " 3"}]},
        {"type": "text", "text": "<answer>"},
        {"type": "text", "text": "5</answer>"},
    ]
    server.script = lambda request, attempt: chat(parts)
    assert ask(server, journal, PROBLEMS[:1])[0].text == "<think>2 + 3</think><answer>5</answer>"
    assert ask(server, journal, [problem(1, "general")])[0].text == "<answer>5</answer>"


def test_half_an_emoji_is_replaced_and_a_whole_one_kept(server: Server, journal: Journal) -> None:
    server.script = lambda request, attempt: chat("ok 🙂 \ud83d", "length")
    assert ask(server, journal, PROBLEMS[:1])[0].text == "ok 🙂 \ufffd"
    assert len(Journal(journal.path).rows) == 1


def test_an_unreachable_server_is_named(server: Server, journal: Journal) -> None:
    with pytest.raises(ValueError, match="1 of 1 answers failed.*\n.*ConnectError"):
        ask(server, journal, PROBLEMS[:1], base_url="http://127.0.0.1:9/v1")


def test_a_missing_key_is_named_unless_nothing_is_to_be_asked(
    server: Server, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ask(server, journal)
    monkeypatch.delenv("EXPERT_KEY")
    assert ask(server, journal) == rows
    with pytest.raises(ValueError, match="EXPERT_KEY is empty"):
        ask(server, journal, seed=2)


def test_a_pointer_is_read_and_its_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pointer\.json is missing"):
        load_pointer(tmp_path)
    file = tmp_path / "pointer.json"
    file.write_text('{"base_url": "http://localhost:8000/v1", "model": "big"}')
    assert load_pointer(tmp_path) == Pointer(base_url="http://localhost:8000/v1", model="big")
    for text, named in [
        ('{"model": "big"}', "base_url"),
        ('{"base_url": "localhost:8000/v1", "model": "m"}', "base_url.*https"),
        ('{"base_url": "http://u", "model": "m", "api_key": "sk-1"}', "api_key: .*valid keys: .*api_key_env"),
        ("{", "the file"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=named) as caught:
            load_pointer(tmp_path)
        assert "sk-1" not in str(caught.value)
