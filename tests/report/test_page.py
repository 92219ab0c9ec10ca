"""The page: self-contained, safe, deterministic, complete."""

import copy
import json
from html.parser import HTMLParser
from typing import get_args

import pytest
from report_results import EVIL, MODELS, Results, forget_lenient

from q2t.curation import curate
from q2t.report import excerpt, page, summary


@pytest.fixture
def html(results: Results) -> str:
    return _render(results)


def _render(results: Results) -> str:
    summary.build(results.reports, MODELS, resamples=100, confidence=0.95, seed=7)
    return page.render(results.reports, results.rejected, results.params, results.lock, results.requirements)


class Structure(HTMLParser):
    VOID = {"meta", "link", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.add(value or "")
            if key in ("href", "src", "srcset", "xlink:href"):
                self.addresses.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)  # SVG: closes itself

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def test_well_formed_and_self_contained(html: str) -> None:
    structure = Structure()
    structure.feed(html)
    assert structure.open == []
    assert structure.tags.isdisjoint({"script", "iframe", "img", "object", "form"})
    beside = {"data:,", "timings.html"}
    assert all(address in beside or address[1:] in structure.ids for address in structure.addresses)
    assert len(structure.addresses) == 12
    assert "@import" not in html and "url(" not in html


def test_model_output_is_escaped(html: str) -> None:
    assert EVIL not in html and "<script" not in html
    # one example for each of three reasons, three models' answers to the general prompt, and the base model's
    # answers after worked examples
    shown = html.count("base, worked examples <span")
    assert shown > 3 and html.count("&lt;/pre&gt;&lt;script&gt;alert(&#34;x&#34;)") == 6 + shown


def test_bytes_repeat_whatever_the_order_of_the_lock(results: Results, html: str) -> None:
    shuffled = copy.deepcopy(results)
    shuffled.lock["stages"] = dict(reversed(results.lock["stages"].items()))
    assert _render(shuffled) == html


def test_own_hash_and_tracking_are_left_out(results: Results, html: str) -> None:
    assert "models/student" in html
    assert results.lock["stages"]["report"]["outs"][0]["md5"] not in html
    assert "hidden.db" not in html
    assert str(results.reports) not in html


def test_every_section_has_its_figures(html: str) -> None:
    for text in (
        "int8 reaches 40.0% accuracy on 100 unseen problems, its teacher 65.0%",
        "61.5% retained, at 64 MB instead of 269 MB (24%).",
        "Judged by free text, base with worked examples 10.0%; blind guesses 6.7%.",
        "the teacher solves\n8 and int8 6 (60.0%, 31.3–83.2%)",
        "Expected: 470 ohm.",
        "✗ wrong value: 460 ohm",
        "(wrong value 1,500, wrong part 300)",
        "2,310 of 4,500 rows kept",
        "3 expectations of 2 tables, 1 not met",
        '<dt>torch</dt><dd class="mono">2.13.0</dd>',
        "2,310 of 4,500 answers were kept",
        "led, expert: read 471, expected 470",
        "412,345",
        "column mean to be between",
        "✗ 1 of 2 failed",
        "specialize</figcaption>",
    ):
        assert text in html, text
    assert "unused" not in html  # a reason that rejected nothing


def test_answers_show_every_pattern_of_right_and_wrong(results: Results) -> None:
    shown = page.answers(results.reports, ["base", "teacher", "int8"])
    patterns = [tuple(bool(row["correct"]) for row in p["rows"].values()) for p in shown["divider"]]
    assert patterns == [(True, True, True), (False, True, True), (False, True, False), (False, False, False)]
    assert list(shown)[-1] == "general"


def test_a_family_of_one_pattern_shows_as_many_problems_as_others(results: Results) -> None:
    for model in ("base", "teacher", "int8"):
        path = results.reports / f"answers/{model}.jsonl"
        (first, *_) = rows = summary.read_rows(path)
        more = [first | {"problem_id": f"p{n}", "family": "sure", "correct": model != "base"} for n in range(5)]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    shown = page.answers(results.reports, ["base", "teacher", "int8"])["sure"]
    assert [tuple(row["correct"] for row in problem["rows"].values()) for problem in shown] == [(False, True, True)] * 3
    assert len({problem["rows"]["base"]["problem_id"] for problem in shown}) == 3


def test_rejections_are_ordered_and_shared(results: Results) -> None:
    rows = page.rejections(results.reports, results.rejected)["rows"]
    assert [row["reason"] for row in rows] == ["wrong", "duplicate", "malformed"]
    assert rows[0]["share"] == 0.4
    assert [example["id"] for example in rows[0]["examples"]] == ["c0"]
    assert rows[0]["details"] == [("wrong_value", 1500), ("wrong_part", 300)]


def test_every_reason_is_explained() -> None:
    assert set(page.REASONS) == set(get_args(curate.Reason))


def test_few_examples_of_different_families(results: Results) -> None:
    (first, *_) = summary.read_rows(results.rejected)
    rows = [
        first | {"id": f"{n}", "family": family} for n, family in enumerate(["led", "led", "gain", "rc", "divider"])
    ]
    results.rejected.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = page.rejections(results.reports, results.rejected)["rows"][0]["examples"]
    assert [row["family"] for row in shown] == ["led", "gain", "rc"]


def test_graph_follows_the_files(results: Results) -> None:
    summary.build(results.reports, MODELS, resamples=100, confidence=0.95, seed=7)
    stages = page.pipeline(results.reports, summary.load(results.reports), results.params)
    nodes, edges = page.graph(stages, results.lock)
    assert edges == {("pose", "generate"), ("pose", "filter"), ("generate", "filter")}
    texts = {node["name"]: node["text"] for node in nodes}
    assert list(texts) == list(page.STAGES)
    assert (
        texts["pose"] == "2,450 problems" and texts["generate"] == "4,500 answers" and texts["distill"] == "160 steps"
    )


@pytest.mark.parametrize("stage", ["fetch@removed", "generate@removed", "evaluate@removed", "generate"])
def test_what_params_no_longer_have_is_left_out(results: Results, html: str, stage: str) -> None:
    lesson = {"path": "data/prompts/lessons.jsonl", "md5": "0"}
    results.lock["stages"][stage] = {
        "deps": [{"path": "models/student", "md5": "0"}, lesson],
        "outs": [{"path": "models/removed", "md5": "f" * 32, "size": 9}],
    }
    (results.reports / "metrics" / "generate_removed.json").write_text('{"answers": 77777}')
    (results.reports / "quality" / "generations_removed.json").write_text('{"results": []}')
    assert _render(results) == html


def test_a_run_without_a_lenient_measurement_says_nothing_of_it(results: Results) -> None:
    forget_lenient(results)
    html = _render(results)
    assert "hance" not in html and "guesses" not in html and "worked examples" not in html


def test_failed_checks_come_first(results: Results) -> None:
    examples, prompts = page.quality(results.reports, results.params)
    assert [check["passed"] for check in examples["checks"]] == [False, True]
    assert (examples["failed"], prompts["failed"]) == (1, 0)
    assert examples["checks"][0]["arguments"] == "max_value 200"
    assert examples["checks"][1]["seen"] == "0 of 2,310 unexpected"


def test_a_run_that_held_nothing_out_says_nothing_of_it(results: Results) -> None:
    """As profile `smoke`, whose test split is too small."""
    for path in (results.reports / "metrics").glob("evaluate_*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"held_out": {"correct": 0, "total": 0}}))
    assert "operand value" not in _render(results)


def test_a_run_without_optional_parts(results: Results) -> None:
    for folder in ("curves", "quality"):
        for path in (results.reports / folder).iterdir():
            path.unlink()
    teacher = results.reports / "answers" / "teacher.jsonl"
    teacher.write_text(teacher.read_text().replace('"correct": true', '"correct": false'))
    html = _render(results)
    assert "No training curve" in html and "No check" in html
    assert "leaves nothing to retain" in html


def test_excerpt_says_what_is_left_out() -> None:
    assert excerpt("x" * 20, 8) == "xxxxxxxx … (12 more characters)"
    assert excerpt("short", 8) == "short"
