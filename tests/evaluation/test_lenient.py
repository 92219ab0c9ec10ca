"""What a reader would take from free text, and the prompts that lead to it."""

import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from q2t.capability.electronics import catalog
from q2t.capability.families import make_families
from q2t.config import Compute, Evaluate, Scratch, Source
from q2t.deployment.runtime import load
from q2t.evaluation import harness, lenient
from q2t.records import Problem
from q2t.sources import fetch

NAMES = ["LT1084-3.3", "LT1084", "uA7805"]


def problem(check, family="regulator"):
    return Problem(
        id="p", family=family, domain="target", split="test", inputs={}, question="Which one?", check=check
    )  # fmt: skip


CHOICE = problem({"kind": "choice", "candidates": NAMES, "expected": "LT1084"})


def value(unit, expected=1.0):
    return problem({"kind": "value", "unit": unit, "expected": expected, "tolerance": 0.0}, "gain")


@pytest.mark.parametrize(
    ("text", "unit", "found"),
    [
        ("So R = 4.7k ohm.", "ohm", 4700),
        ("It is 390 Ω, not 12 V or 20 mA.", "ohm", 390),
        ("first 10 ohms, then **1,200 Ohms**", "ohm", 1200),
        ("$R_2 = 33.5 \\text{ k}\\Omega$ or $47\\,k\\Omega$", "ohm", 47000),
        ("2.2 Mohm", "ohm", 2.2e6),
        ("2.2 megaohms or 3 kilo-ohms", "ohm", 2.2e6),
        ("C = 1.5 × 10^-9 F", "F", 1.5e-9),
        ("C = 1.5 x 10^{−9} F", "F", 1.5e-9),
        ("106e-12 F", "F", 106e-12),
        ("3.3 microfarads", "F", 3.3e-6),
        ("100 µF and 10 μF", "F", 1e-5),
        ("12V rail", "V", 12),
        ("about 250 mA at 5 V", "A", 0.25),
        ("think 5 ohm <answer>7 ohm</answer> no: <answer> 8 ohm </answer> 9 ohm", "ohm", 8),
        ("<answer>4.7k</answer>", "ohm", 4700),
        ("<think>1</think><answer>the resistor is 470 ohm, I think</answer>", "ohm", 470),
    ],
)
def test_the_last_quantity_of_the_unit(text, unit, found):
    assert lenient.judge(value(unit, found), text, "length").correct, lenient.extract(value(unit), text)


@pytest.mark.parametrize("text", ["", "no idea", "10 F", "5 ohmmeters", "R2 ohm", "Vds of 20 V", "12", "<answer>"])
def test_text_without_such_a_quantity_is_wrong(text):
    assert lenient.extract(value("ohm"), text) == text or text == "<answer>"
    assert not lenient.judge(value("ohm", 20), text, "stop").correct


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("uA7805 is too weak, so LT1084.", "LT1084"),
        ("LT1084 is not enough; take LT1084-3.3 instead", "LT1084-3.3"),
        ("The answer is B", "LT1084"),
        ("**C)** because it carries 1.5 A", "uA7805"),
        ("C: 5 V, 1 A. A small part.", "uA7805"),
        ("(A)", "LT1084-3.3"),
        ("B fails. The best choice is A.", "LT1084-3.3"),
        ("<answer>B</answer> C", "LT1084"),
        ("A 250 vs 072 ok", "LT1084-3.3"),
    ],
)
def test_the_last_candidate_by_name_or_letter(text, name):
    assert lenient.extract(CHOICE, text) == name
    assert lenient.judge(CHOICE, text, "length").correct == (name == "LT1084")


@pytest.mark.parametrize("text", ["", "a part for 0.5 A", "LT1084X", "BD30FC0WFP", "Choose well. A regulator does it."])
def test_a_unit_or_an_article_is_no_candidate(text):
    assert lenient.extract(CHOICE, text) == text
    assert not lenient.judge(CHOICE, text, "stop").correct


def test_a_name_that_begins_another_one():
    asked = problem({"kind": "choice", "candidates": ["X1", "X1/5"], "expected": "X1"})
    assert [lenient.extract(asked, f"X1/5, X1, {name}.") for name in ("X1", "X1/5")] == ["X1", "X1/5"]


pieces = st.lists(
    st.sampled_from(
        ["<answer>", "</answer>", "9" * 400, "e999", "1e-999", " x 10^", "-", "{", ",", ".", "k", "µ", "ohm", "Ω", "F"]
        + ["A", " ", "\n", "LT1084", "__import__('os')", "٣", "²"]
    )
    | st.text(max_size=5)
).map("".join)


@settings(deadline=None)
@given(st.text() | pieces)
@example("1e999 ohm")
@example("٣ ohm")
def test_any_text_gets_a_verdict(text):
    for asked in (CHOICE, value("ohm"), value("F"), value("ohm", 5e-324)):
        assert lenient.judge(asked, text, "stop").rule


@settings(deadline=None)
@given(st.sampled_from(["led", "gain", "rc", "mosfet", "regulator"]), st.integers(0, 50), st.text(alphabet="xyz .\n"))
def test_a_worked_solution_is_right_whatever_stands_around_it(name, seed, around):
    (family,) = make_families([name], PARTS)
    posed = family.pose(random.Random(seed))
    assert lenient.judge(posed, f"{around}{posed.solution}{around}", "length").correct
    bare = posed.solution.split("<answer>")[1].removesuffix("</answer>")
    assert lenient.judge(posed, f"{around} It is {bare}", "stop").correct


PARTS = catalog.read(Path("data/catalog"))


def lessons(name, count=30):
    (family,) = make_families([name], PARTS)
    rng = random.Random(3)
    return [family.pose(rng) for _ in range(count)]


@pytest.mark.parametrize("name", ["gain", "rc", "regulator"])
def test_examples_are_the_first_lessons_of_three_wordings(name):
    given = lessons("led", 2) + lessons(name)
    shown = lenient.examples(given, name)
    assert len(shown) == lenient.SHOTS and {lesson.family for lesson in shown} == {name}
    assert shown[0] == given[2]
    openings = {" ".join(w for w in lesson.question.split() if w.isalpha())[:12] for lesson in shown}
    assert len(openings) == lenient.SHOTS
    assert lenient.examples(given[:3], name) == given[2:3]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "m"
    shape = Scratch(vocabulary=300, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2)
    fetch("tiny", Source(scratch=shape), folder)
    return load(folder, Compute(threads=1, dtype="float32", device="cpu"))


def test_the_examples_are_earlier_turns_and_the_question_comes_last(runtime):
    given = lessons("gain")
    (asked,) = lessons("gain", 1)
    (prompt,) = lenient.prompts(runtime.tokenizer, [asked], given)
    places = [prompt.index(text) for lesson in lenient.examples(given, "gain") for text in (lesson.question,)]
    assert places == sorted(places)
    assert prompt.count("</answer>") == lenient.SHOTS
    assert prompt.endswith(runtime.prompt(asked.question))


def test_the_harness_judges_a_model_leniently(runtime, monkeypatch):
    test = lessons("gain", 2) + lessons("regulator", 1)
    limits = Evaluate.model_construct(max_new_tokens=4, batch_size=2, confidence=0.95)
    prompts = lenient.prompts(runtime.tokenizer, test, test)
    asked, generate = [], runtime.generate
    monkeypatch.setattr(
        runtime, "generate", lambda requests, **options: asked.append(requests) or generate(requests, **options)
    )
    strict = harness.answer(runtime, test, limits)
    free = harness.answer(runtime, test, limits, prompts, lambda asked, _, reason: lenient.judge(asked, "B", reason))
    assert [[request.prompt for request in requests] for requests in asked] == [
        [runtime.prompt(p.question) for p in test],
        prompts,
    ]
    assert [row.problem_id for row in free] == [p.id for p in test]
    assert [row.correct for row in free] == [False, False, test[2].check["expected"] == test[2].check["candidates"][1]]
    both = strict[2].beside(free[2])
    assert both.correct is False and both.text == strict[2].text and both.lenient["correct"] == free[2].correct


def test_chance_is_one_in_the_candidates():
    assert lenient.chance([CHOICE, value("ohm")]) == {"gain": 0, "regulator": pytest.approx(1 / 3)}
