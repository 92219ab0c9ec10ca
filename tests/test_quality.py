import json
import logging
import re
import subprocess
import sys

import numpy as np
import pytest

from q2t import quality
from q2t.distillation.rows import Row
from q2t.records import Completion, Example, Problem, content_id

FAMILIES = ("led", "rc")


def problem(number: int, split="lessons", family="led", **changes) -> Problem:
    values = {
        "id": content_id(family, split, number),
        "family": family,
        "domain": "general" if family == "general" else "target",
        "split": split,
        "inputs": {"volts": number},
        "question": f"Which resistor for {number} V, please?",
        "check": {},
        "solution": "<think>a</think><answer>b</answer>" if split == "lessons" else "",
    }
    return Problem(**(values | changes))


PROBLEMS = [
    problem(1),
    problem(2, family="rc"),
    problem(3, "questions"),
    problem(4, "test"),
    problem(5, "general", "general"),
]


def completion(number: int, **changes) -> Completion:
    values = {
        "id": content_id(number),
        "problem_id": content_id("p", number),
        "teacher": "expert",
        "sample": 0,
        "text": "x",
        "finish_reason": "stop",
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "settings": {},
    }
    return Completion(**(values | changes))


def example(number: int, domain="target", family="led", **changes) -> Example:
    values = {
        "id": content_id(number),
        "problem_id": content_id("p", number),
        "family": family if domain == "target" else "general",
        "domain": domain,
        "teacher": "expert",
        "question": "Which?",
        "text": "That one.",
    }
    return Example(**(values | changes))


EXAMPLES = [*(example(n, family=FAMILIES[n % 2]) for n in range(8)), *(example(n, "general") for n in (8, 9))]


def labelled(number: int, **changes) -> Row:
    values = {
        "id": content_id(number),
        "domain": "target",
        "family": "led",
        "weight": 1.0,
        "input_ids": np.arange(5, dtype=np.int32),
        "prompt_length": 2,
        "top_ids": np.zeros((3, 2), np.uint16),
        "top_logprobs": np.full((3, 2), -1.0, np.float16),
        "tail_logprob": np.full(3, -1.3, np.float32),
    }
    return Row(**(values | changes))


def same(row: Problem):
    return row.family, sorted(row.inputs.items())


def check(name, frame, suite, tmp_path) -> list[str]:
    return quality.validate(name, frame, suite, tmp_path)


def check_problems(rows, tmp_path):
    return check("problems", quality.problem_frame(rows, same), quality.problems(FAMILIES), tmp_path)


def check_completions(rows, tmp_path):
    return check("completions", quality.completion_frame(rows), quality.completions(), tmp_path)


def check_examples(rows, tmp_path):
    return check("examples", quality.example_frame(rows), quality.examples(FAMILIES, 0.8), tmp_path)


def check_labels(rows, tmp_path):
    return check("labels", quality.label_frame(rows), quality.labels(), tmp_path)


@pytest.mark.parametrize(
    ("checked", "rows"),
    [
        (check_problems, PROBLEMS),
        (check_completions, [completion(n) for n in range(3)]),
        (check_examples, EXAMPLES),
        (check_labels, [labelled(n) for n in range(3)]),
    ],
)
def test_good_rows_pass_without_a_warning(checked, rows, tmp_path):
    assert checked(rows, tmp_path) == []


@pytest.mark.parametrize(
    ("checked", "rows", "column"),
    [
        (check_problems, [*PROBLEMS, PROBLEMS[0]], "id"),
        (check_problems, [*PROBLEMS, problem(6, id="no-hash")], "id"),
        (check_problems, [*PROBLEMS, problem(6, question="Huh?")], "question_length"),
        (check_problems, [*PROBLEMS, problem(6, family="opamp")], "family"),
        (check_problems, [*PROBLEMS, problem(1, "test")], "splits"),
        (check_problems, [*PROBLEMS, problem(6, solution=" ")], "unsolved_lesson"),
        (check_completions, [completion(1), completion(1)], "id"),
        (check_completions, [], "table"),
        (check_examples, EXAMPLES[:8], "target"),
        (check_examples, [*EXAMPLES[1:], example(0, weight=0.0)], "weight"),
        (check_examples, [*EXAMPLES[1:], example(0, text=" ")], "text_length"),
        (check_labels, [labelled(1, top_ids=np.zeros((2, 2), np.uint16))], "misfit"),
        (check_labels, [labelled(1, tail_logprob=np.full(2, -1.0, np.float32))], "misfit"),
        (check_labels, [labelled(1, tail_logprob=np.array([-1, 0.5, -1], np.float32))], "largest_logprob"),
        (check_labels, [labelled(1, tail_logprob=np.array([-1, np.nan, -1], np.float32))], "nan"),
        (check_labels, [labelled(1, top_logprobs=np.full((3, 2), np.nan, np.float16))], "nan"),
        (check_labels, [labelled(1, prompt_length=5)], "answer_length"),
    ],
)
def test_each_critical_expectation_stops_the_stage(checked, rows, column, tmp_path):
    with pytest.raises(quality.QualityError, match=rf"\n  {column}: expect_"):
        checked(rows, tmp_path)


def test_the_error_shows_the_rows_that_failed_and_the_report_is_written(tmp_path):
    wrong = problem(6, question="Huh?")
    with pytest.raises(ValueError, match="question_length.*1 of 6 rows differ") as error:
        check_problems([*PROBLEMS, wrong], tmp_path)
    assert wrong.id in str(error.value) and PROBLEMS[0].id not in str(error.value)
    report = json.loads((tmp_path / "problems.json").read_text())
    failed = [r["column"] for r in report["results"] if not r["success"]]
    assert failed == ["question_length"] and report["success"] is False


@pytest.mark.parametrize(
    ("checked", "rows", "warning"),
    [
        (check_problems, [r for r in PROBLEMS if r.family != "rc"], r"family: .*missing \['rc'\]"),
        (
            check_completions,
            [completion(1, finish_reason="length"), completion(2)],
            "truncated: .*observed 0.5",
        ),
        (
            check_completions,
            [completion(1, prompt_tokens=0), completion(2)],
            "prompt_tokens: .*1 of 2",
        ),
        (
            check_completions,
            [completion(1, text="", completion_tokens=0), completion(2)],
            "completion_tokens: .*1 of 2",
        ),
        (check_examples, [r.model_copy(update={"family": "led"}) for r in EXAMPLES], "family: .*'rc'"),
        (
            check_labels,
            [
                labelled(
                    1,
                    top_ids=np.empty((0, 2), np.uint16),
                    top_logprobs=np.empty((0, 2), np.float16),
                    tail_logprob=np.empty(0, np.float32),
                )
            ],
            "labelled: .*observed 0.0",
        ),
    ],
)
def test_warnings_are_returned_and_logged(checked, rows, warning, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "q2t.quality"):
        (line,) = checked(rows, tmp_path)
    assert line in caplog.text
    assert re.search(warning, line), line


def test_equal_rows_give_equal_bytes(tmp_path):
    rows = [completion(n, finish_reason="length") for n in range(5)]
    for name in ("a", "b"):
        check_completions(rows, tmp_path / name)
    report = (tmp_path / "a/completions.json").read_bytes()
    assert report == (tmp_path / "b/completions.json").read_bytes()
    assert b"time" not in report and b"completions-completions" not in report


def test_what_is_missing_is_listed_in_order(tmp_path):
    """Great Expectations lists it in the order of a set of texts, another in every process."""
    families = [f"family {n}" for n in range(9)]
    frame, expected = quality.example_frame(EXAMPLES), quality.examples([*FAMILIES, *reversed(families)], 0.8)
    check("examples", frame, expected, tmp_path)
    results = json.loads((tmp_path / "examples.json").read_text())["results"]
    (found,) = [one["found"] for one in results if not one["success"]]
    assert found["partial_missing_list"] == families


def test_a_missing_column_is_a_failure_and_not_a_pass(tmp_path):
    frame = quality.completion_frame([completion(1)]).drop(columns="finish_reason")
    with pytest.raises(quality.QualityError, match='finish_reason: .*"finish_reason" in BatchData does not exist'):
        check("completions", frame, quality.completions(), tmp_path)


def test_great_expectations_is_not_imported_before_it_is_needed():
    heavy = "{'great_expectations', 'mlflow', 'pandas', 'dvc'}"
    code = f"import sys, q2t.quality, q2t.tracking; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
