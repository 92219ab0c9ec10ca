"""The summary's figures, its order, and the README's table."""

import json
from typing import Any

import pytest
from report_results import MODELS, Results

from q2t.evaluation.retention import retention, retention_interval
from q2t.report import summary

BOOTSTRAP: dict[str, Any] = {"resamples": 200, "confidence": 0.95, "seed": 7}


def test_figures_and_order(results: Results) -> None:
    built = summary.build(results.reports, MODELS, **BOOTSTRAP)
    assert list(built) == list(summary.load(results.reports)) == MODELS
    assert built["teacher"]["retention"] == 1
    assert built["teacher"]["retention_interval"] is None
    assert built["untrained"]["retention"] == 0 and built["untrained"]["retention_interval"] is None
    assert built["student"]["accuracy"] == 0.55
    assert built["student"]["retention"] == pytest.approx(0.55 / 0.65)
    low, high = built["student"]["retention_interval"]
    assert low < 0.55 / 0.65 < high <= 1
    assert built["student"]["held_out"]["correct"] == 7 and built["student"]["held_out"]["accuracy"] == 0.7
    led = built["student"]["families"]["led"]
    assert (led["correct"], led["total"], led["accuracy"]) == (11, 20, 0.55)
    assert led["interval"][0] < 0.55 < led["interval"][1]


def test_the_lenient_base_and_chance(results: Results) -> None:
    built = summary.build(results.reports, MODELS, **BOOTSTRAP)
    base = built["base"]
    assert base["chance"]["accuracy"] == pytest.approx(1 / 15) and base["chance"]["families"]["mosfet"] == 1 / 3
    assert base["lenient"]["families"]["led"]["interval"][0] < 0.1 < base["lenient"]["families"]["led"]["interval"][1]
    assert all("lenient" not in built[name] and "chance" not in built[name] for name in MODELS[1:])
    assert list(summary.measured(built))[:3] == ["base", "base, worked examples", "teacher"]
    table = summary.markdown_table(built).splitlines()
    assert table[2].startswith("| base | 1.0% (0.0–10.0%) | 1.5% (0.0–")
    assert table[3:4] + table[-1:] == [
        "| base, worked examples | 10.0% (5.0–18.0%) | – | 134.5M | 269 MB |",
        "| chance | 6.7% | – | – | – |",
    ]
    assert "| untrained | 0.0% (0.0–9.0%) | 0.0% | 80.0M | 160 MB |" in table
    assert "| teacher | 65.0% (56.0–74.0%) | – | 134.5M | 269 MB |" in table


def test_answers_are_paired_by_problem_not_by_line(results: Results) -> None:
    answers = results.reports / "answers" / "student.jsonl"
    before = summary.build(results.reports, MODELS, **BOOTSTRAP)
    answers.write_text("".join(reversed(answers.read_text().splitlines(keepends=True))))
    assert summary.build(results.reports, MODELS, **BOOTSTRAP) == before


def test_bytes_repeat(results: Results) -> None:
    summary.build(results.reports, MODELS, **BOOTSTRAP)
    first = (results.reports / "summary.json").read_bytes()
    summary.build(results.reports, MODELS, **BOOTSTRAP)
    assert (results.reports / "summary.json").read_bytes() == first
    entries = json.loads(first)
    assert all(list(entry) == sorted(entry) for entry in entries.values())


def test_a_missing_answer_is_an_error(results: Results) -> None:
    answers = results.reports / "answers" / "int8.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"int8\.jsonl.*dvc repro"):
        summary.build(results.reports, MODELS, **BOOTSTRAP)


def test_the_teacher_has_to_be_there(results: Results) -> None:
    with pytest.raises(ValueError, match="teacher"):
        summary.build(results.reports, ["base", "student"], **BOOTSTRAP)


def test_a_teacher_with_nothing_right_leaves_retention_open(results: Results) -> None:
    path = results.reports / "answers" / "teacher.jsonl"
    path.write_text(path.read_text().replace('"correct": true', '"correct": false'))
    built = summary.build(results.reports, MODELS, **BOOTSTRAP)
    assert built["student"]["retention"] is None
    assert "| student | 55.0% (46.0–64.0%) | – | 80.0M | 160 MB |" in summary.markdown_table(built)


def test_retention_matches_the_library(results: Results) -> None:
    def verdicts(name: str) -> dict[str, list[bool]]:
        families: dict[str, list[bool]] = {}
        for row in summary.read_rows(results.reports / "answers" / f"{name}.jsonl"):
            if row["domain"] == "target":
                families.setdefault(row["family"], []).append(row["correct"])
        return families

    built = summary.build(results.reports, MODELS, **BOOTSTRAP)["pruned"]
    assert built["retention"] == retention(verdicts("pruned"), verdicts("teacher"))
    expected = retention_interval(verdicts("pruned"), verdicts("teacher"), **BOOTSTRAP)
    assert built["retention_interval"] == expected
