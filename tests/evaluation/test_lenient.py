"""What a reader would take from free text, and the prompts that lead to it."""

import copy
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from q2t.capability.electronics import catalog, values
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
    "text",
    [
        "<think>12e3=12000; 47e2=4700</think><answer>4.7e3 ohm</answer>",
        "<think>1</think><answer>the resistor is 4700 ohm, I think</answer>",
        "think 5 ohm <answer>7 ohm</answer> no: <answer> 4700 ohm </answer> 9 ohm",
        "5 ohm <answer>4.7e3 ohm",
        "<answer>4.7k ohm</answer> 9 ohm <answer>",
        "So R = 4.7k ohm.",
        "47e2ohm",
        "It is 4700 Ω, not 12 V or 20 mA.",
        "4700 \u2126",
        "4.7 \u33c0",
        "first 10 ohms, then **4,700 Ohms**",
        "$R_2 = 33.5 \\text{ k}\\Omega$ or $4.7\\,k\\Omega$",
        "4.7\\text{ k}\\Omega",
        "\\mathrm{4.7\\,k\\Omega}",
        "\\(4700 \\text{ ohms}\\)",
        "\\boxed{4.7 \\text{ k}\\Omega}",
        "\\boxed{4700}\\ \\Omega",
        "0.0047 Mohm",
        "0.0047 megaohms",
        "0.0047 megohm",
        "4.7 kilohms",
        "4.7 kilo-ohms",
        "4.7 Kiloohm",
        "4.7 k-ohm",
        "a 4700-ohm resistor",
        "4.7 K ohm",
        "4.7 x 10³ ohm",
        "4.7 × 10^3 ohm",
        "4 700 ohm",
        "4\u2009700 ohm",
        "4\u202f700 ohm",
        "4\\,700 ohm",
        "4{,}700 ohm",
    ],
)
def test_an_ohm_value_is_read_as_it_is_written(text):
    assert lenient.extract(value("ohm"), text) == "4700 ohm"


@pytest.mark.parametrize(
    "text",
    [
        "1.59 \\times 10^{-8} \\text{ F}",
        "$1.59 \\times 10^{-8}$ F",
        "1.59 \\cdot 10^{-8}\\,\\mathrm{F}",
        "1.59·10^-8 F",
        "1.59 * 10**-8 F",
        "1.59*10**(-8) F",
        "1.59 × 10⁻⁸ F",
        "1.59 x 10^(-8) F",
        "1.59 x 10^{−8} F",
        "1.59 x 10-8 F",
        "1.59e−8 F",
        "1.59E-8 farads",
        "159 e-10 F",
        "15.9 nF",
        "15.9 nanofarads",
        "0.0159 Microfarads",
        "15.9\\,\\mathrm{nF}",
        "0.0159 \\mu F",
        "0.0159 \\mu\\text{F}",
        "1 F, 0.0159 \u00b5F",
        "1 F, 0.0159 \u03bcF",
    ],
)
def test_a_farad_value_is_read_as_it_is_written(text):
    assert lenient.extract(value("F"), text) == "1.59e-08 F"


@given(
    st.sampled_from([*((letter, "ohm") for letter in "RkKM"), *((letter, "F") for letter in "pnuµm")]),
    st.integers(0, 999),
    st.integers(0, 99),
    st.sampled_from(["", " ", "unit"]),
)
def test_a_letter_stands_for_the_decimal_point(letter, whole, part, behind):
    (letter, unit), behind = letter, letter[1] if behind == "unit" else behind
    factor = {"R": 1, "k": 1e3, "K": 1e3, "M": 1e6, "p": 1e-12, "n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3}[letter]
    found = lenient.extract(value(unit), f"first 5{unit}, so {whole}{letter}{part}{behind}. Fine")
    assert float(found.removesuffix(unit)) == pytest.approx(float(f"{whole}.{part}") * factor)


def test_a_letter_may_end_the_code():
    assert lenient.extract(value("F"), "It is 100n, at 5 kHz") == "1e-07 F"
    assert lenient.extract(value("ohm"), "It is 100R, not 5k") == "100 ohm"


@pytest.mark.parametrize(
    ("text", "unit"), [("4k7", "F"), ("4u7", "ohm"), ("LM4k7", "ohm"), ("4k7 F", "F"), ("4k7x", "ohm")]
)
def test_such_a_code_of_another_unit_or_within_a_word_is_no_value(text, unit):
    assert lenient.judge(value(unit, 4700), text, "stop").rule == "no_quantity"


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("So it is 3.3 V.", "V"),
        ("3V3", "V"),
        ("3.3 volts", "V"),
        ("0.0033 kV", "V"),
        ("= 3300 mA", "A"),
        ("3.3 amps", "A"),
    ],
)
def test_every_unit_that_the_strict_verifier_reads_is_read(text, unit):
    assert lenient.judge(value(unit, 3.3), text, "stop").correct


def test_a_check_of_a_familys_own_sees_what_was_said():
    own = problem({"kind": "formula", "expected": "R2/R1"})
    assert lenient.extract(own, "first R1 <answer> R2/R1 </answer>") == "R2/R1"


@pytest.mark.parametrize("text", ["10⁻⁸ F", "10^-8 F", "10^(-8) F", "10^{-8} \\mathrm{F}", "10**-8 F"])
def test_a_power_of_ten_needs_no_factor(text):
    assert lenient.extract(value("F"), text) == "1e-08 F"


@pytest.mark.parametrize(
    "text",
    [
        "4700",
        "<answer>4700</answer>",
        "<answer>4.7k</answer>",
        "<answer> **4700** </answer>",
        "<answer>4.7 × 10³</answer>",
        "R = 5 V / 1 mA = 4700.",
        "R = 4.7k",
        "R \\approx 4700\nwhich is fine",
        "R ≈ 4700 = 4.7k",
        "\\[R = 4{,}700\\]",
        "The answer is 4700.",
        "Answer: 4700; 3*4=12",
        "\\boxed{4700}, since 3*4=12",
        "$\\boxed{4.7 \\times 10^{3}}$",
    ],
)
def test_a_bare_result_counts_where_nothing_has_the_unit(text):
    assert lenient.judge(value("ohm", 4700), text, "length").correct, lenient.extract(value("ohm"), text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Rf = -gain * Rin = -1.41e+06 ohm", "-1410000 ohm"),
        ("R is −4.7 kΩ", "-4700 ohm"),
        ("15-20 ohm", "20 ohm"),
        ("15 -20 ohm", "20 ohm"),
        ("4,7 kohm", "4700 ohm"),
        ("4,700 ohm", "4700 ohm"),
        ("(R=-20 ohm)", "-20 ohm"),
    ],
)
def test_signs_and_commas_are_read_as_they_are_meant(text, found):
    assert lenient.extract(value("ohm"), text) == found


def test_the_unit_counts_for_more_than_an_equals_sign():
    assert lenient.extract(value("ohm"), "R is 4.7k ohm. Check: 4700*2=9400") == "4700 ohm"


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("", "ohm"),
        ("no idea", "ohm"),
        ("20 F", "ohm"),
        ("20 ohmmeters", "ohm"),
        ("R20 ohm", "ohm"),
        ("Vds of 20 V", "ohm"),
        ("V = 20 V", "ohm"),
        ("V = 20.5 V.", "ohm"),
        ("V = 20,5 V", "ohm"),
        ("1/20 ohm", "ohm"),
        ("i = 20%", "ohm"),
        ("\\omega = 20\\omega", "ohm"),
        ("20 apples", "ohm"),
        ("at 20°F", "F"),
        ("at 20 °F", "F"),
        ("e^-20 F", "F"),
        ("2^20 F", "F"),
        ("<answer>", "ohm"),
    ],
)
def test_text_without_such_a_quantity_is_wrong(text, unit):
    assert lenient.judge(value(unit, 20), text, "stop").rule == "no_quantity"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("<think>A 1.8 ok 01.5 vs 01.2 low; B 75 vs 15 ok</think><answer>B</answer>", "LT1084"),
        ("<answer>B</answer> C", "LT1084"),
        ("<answer>B", "LT1084"),
        ("B is the best. <answer>A", "LT1084-3.3"),
        ("uA7805 is too weak, so LT1084.", "LT1084"),
        ("LT1084 is not enough; take LT1084-3.3 instead", "LT1084-3.3"),
        ("The answer is B", "LT1084"),
        ("The best option is B: A and C are too weak, and C has the wrong voltage.", "LT1084"),
        ("answer: **B**, not C", "LT1084"),
        ("The answer is 'B'.", "LT1084"),
        ("The answer is A because B and C are too weak.", "LT1084-3.3"),
        ("The answer is not B but A", "LT1084-3.3"),
        ("I choose candidate B over C.", "LT1084"),
        ("Do not choose C; B is enough", "LT1084"),
        ("Choose: A LT1084-3.3 3.3 V; B LT1084 5 V; C uA7805 5 V. B", "LT1084"),
        ("Choose a part: A 3 low, B 5 ok. So B", "LT1084"),
        ("Candidate A (see section B)", "LT1084-3.3"),
        ("Candidate A is too weak, so B", "LT1084"),
        ("B is the best; C and A are weak", "LT1084"),
        ("A is right, rated to 125°C", "LT1084-3.3"),
        ("LT1084 it is, at 25 °C", "LT1084"),
        ("A fits, B doesn't; A", "LT1084-3.3"),
        ("**C)** because it carries 1.5 A", "uA7805"),
        ("C: 5 V, 1 A. A small part.", "uA7805"),
        ("0.6*2=1.2\nB", "LT1084"),
        ("(A)", "LT1084-3.3"),
        ("(I think B)", "LT1084"),
        ("\\boxed{B}", "LT1084"),
        ("\\boxed{\\text{B}}", "LT1084"),
        ("B fails. The best choice is A.", "LT1084-3.3"),
        ("A 250 vs 072 ok", "LT1084-3.3"),
    ],
)
def test_the_candidate_that_is_called_the_answer_or_the_last(text, name):
    assert lenient.extract(CHOICE, text) == name
    assert lenient.judge(CHOICE, text, "length").correct == (name == "LT1084")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a part for 0.5 A",
        "LT1084X",
        "BD30FC0WFP",
        "Choose well. A regulator does it.",
        "at 25 ° C",
        "at 25 °C",
        "at 25°C",
        "C's",
    ],
)
def test_a_unit_or_an_article_is_no_candidate(text):
    assert lenient.extract(CHOICE, text) == text
    assert not lenient.judge(CHOICE, text, "stop").correct


def test_a_name_that_begins_another_one():
    asked = problem({"kind": "choice", "candidates": ["X1", "X1/5"], "expected": "X1"})
    assert [lenient.extract(asked, f"X1/5, X1, {name}.") for name in ("X1", "X1/5")] == ["X1", "X1/5"]


pieces = st.lists(
    st.sampled_from(
        ["<answer>", "</answer>", "9" * 400, "e999", "1e-999", " x 10^", "-", "{", ",", ".", "k", "µ", "ohm", "Ω", "F"]
        + ["A", " ", "\n", "LT1084", "__import__('os')", "٣", "²", "\\boxed{", "\\times", "**", "(", "= ", "°", "⁻"]
    )
    | st.text(max_size=5)
).map("".join)


@given(st.text() | pieces)
@example("1e999 ohm")
@example("٣ ohm")
def test_any_text_gets_a_verdict(text):
    for asked in (CHOICE, value("ohm"), value("F"), value("ohm", 5e-324)):
        assert lenient.judge(asked, text, "stop").rule


@pytest.mark.parametrize(
    "piece",
    [
        "<answer>",
        "9",
        "9 ",
        "1,",
        "1 000 ",
        "9e",
        "e",
        " ",
        "\n",
        "(",
        "(a ",
        "\\",
        "{",
        "*",
        "⁻",
        "10^(",
        "x 10",
        "= 1 ",
    ]
    + ["answer", "answer is ", "answer: ", "choose ", "choose the ", "A ", "A is ", "LT1084", "kilo"],
)
@pytest.mark.parametrize("asked", [CHOICE, value("ohm")], ids=["choice", "value"])
def test_the_time_is_proportional_to_the_length(asked, piece):
    before = time.process_time()
    lenient.extract(asked, "choose 9" + piece * (60_000 // len(piece)))
    assert time.process_time() - before < 2


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
    (request,) = lenient.requests(runtime.tokenizer, [asked], given)
    prompt = request.prompt
    assert prompt.removeprefix(request.shared).count(asked.question) == 1
    assert request.shared.count("</answer>") == lenient.SHOTS
    places = [prompt.index(text) for lesson in lenient.examples(given, "gain") for text in (lesson.question,)]
    assert places == sorted(places)
    assert prompt.count("</answer>") == lenient.SHOTS
    assert prompt.endswith(runtime.prompt(asked.question))


def test_templates_that_take_reasoning_out_of_earlier_turns_show_it_here(runtime):
    tokenizer = copy.deepcopy(runtime.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'].split('</think>')[-1]"
    )
    given = lessons("gain")
    assert "<think>" not in tokenizer.apply_chat_template(
        [{"role": "assistant", "content": given[0].solution}], tokenize=False
    )
    (ours,) = lenient.requests(tokenizer, given[:1], given)
    (plain,) = lenient.requests(runtime.tokenizer, given[:1], given)
    assert ours == plain and ours.prompt.count("<think>") == lenient.SHOTS


def test_it_reads_the_units_that_the_verifier_does():
    assert lenient._UNITS.keys() == values.UNITS.keys()


@pytest.mark.parametrize(("width", "shares"), [(1, True), (10**6, False)])
def test_turns_are_shared_only_where_a_token_ends_with_them(width, shares):
    class Tokenizer:
        """Tokens of so many characters, and turns that nothing keeps apart."""

        def apply_chat_template(self, turns, **_):
            return "".join(turn["content"] for turn in turns)

        def __call__(self, texts, add_special_tokens):
            assert not add_special_tokens  # the template has written them
            return SimpleNamespace(input_ids=[[t[i : i + width] for i in range(0, len(t), width)] for t in texts])

    (request,) = lenient.requests(Tokenizer(), lessons("gain", 1), lessons("gain"))
    assert request.prompt.startswith(request.shared) and bool(request.shared) == shares


def test_the_harness_judges_a_model_leniently(runtime, monkeypatch):
    test = lessons("gain", 2) + lessons("regulator", 1)
    limits = Evaluate.model_construct(max_new_tokens=4, batch_size=2, confidence=0.95)
    requests = lenient.requests(runtime.tokenizer, test, test)
    asked, generate = [], runtime.generate
    monkeypatch.setattr(
        runtime, "generate", lambda requests, **options: asked.append(requests) or generate(requests, **options)
    )
    strict = harness.answer(runtime, test, limits)
    free = harness.answer(runtime, test, limits, requests, lambda asked, _, reason: lenient.judge(asked, "B", reason))
    assert [[request.prompt for request in requests] for requests in asked] == [
        [runtime.prompt(p.question) for p in test],
        [request.prompt for request in requests],
    ]
    assert [row.problem_id for row in free] == [p.id for p in test]
    assert [row.correct for row in free] == [False, False, test[2].check["expected"] == test[2].check["candidates"][1]]
    both = strict[2].beside(free[2])
    assert both.correct is False and both.text == strict[2].text and both.lenient["correct"] == free[2].correct


def test_chance_is_one_in_the_candidates():
    assert lenient.chance([CHOICE, value("ohm")]) == {"gain": 0, "regulator": pytest.approx(1 / 3)}
