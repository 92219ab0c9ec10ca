import random
from pathlib import Path

import pytest

from q2t.capability.electronics import catalog
from q2t.capability.families import make_families
from q2t.config import Evaluate, Scratch, Source
from q2t.deployment.runtime import Answer
from q2t.evaluation import harness
from q2t.evaluation.harness import Judged, degenerate, judge, score
from q2t.sources import fetch, load_model

SETTINGS = Evaluate(models={"teacher": "m"}, lenient=[], max_new_tokens=8, batch_size=4, confidence=0.95, resamples=100)
(GAIN,) = make_families(["gain"], catalog.read(Path("data/catalog")))
PROBLEM = GAIN.pose(random.Random(0))


def test_a_right_answer_counts_only_whole_and_in_the_template():
    assert judge(PROBLEM, PROBLEM.solution, "stop").correct
    assert judge(PROBLEM, PROBLEM.solution, "length").rule == "truncated"
    assert judge(PROBLEM, PROBLEM.solution + " indeed", "stop").rule.startswith("malformed")
    answer = PROBLEM.solution.split("<answer>")[1].removesuffix("</answer>")
    assert not judge(PROBLEM, answer, "stop").correct


def judged(family, correct, text="a", domain="target", finish="stop"):
    return Judged(
        problem_id="p", family=family, domain=domain, question="q", text=text, finish_reason=finish,
        correct=correct, rule="", expected=None, measured=None,
    )  # fmt: skip


class Parrot:
    """Answers with the prompt."""

    def prompt(self, question, system=""):
        return f"{system}{question}"

    def generate(self, requests, **_):
        yield [(place, Answer(request.prompt, "stop", 1, 1)) for place, request in enumerate(requests)]


def test_only_what_is_verified_is_asked_behind_the_system_prompt():
    general = PROBLEM.model_copy(update={"domain": "general", "check": {}})
    told, open_ended = harness.answer(Parrot(), [PROBLEM, general], SETTINGS, system="In short: ")
    assert (told.text, open_ended.text) == ("In short: " + PROBLEM.question, PROBLEM.question)


def test_a_family_may_verify_by_its_inputs_alone():
    own = PROBLEM.model_copy(update={"check": {}})
    right = judge(PROBLEM, PROBLEM.solution, "stop")
    (found,) = harness.answer(Parrot(), [own], SETTINGS, judge=lambda *_: right, system="In short: ")
    assert found.correct and found.text.startswith("In short: ")


def test_accuracy_is_the_mean_of_the_families_not_of_the_problems():
    rows = [judged("a", True)] * 9 + [judged("a", False)] + [judged("b", False, finish="length")] * 2
    scored = score(rows + [judged("general", None, domain="general")], SETTINGS)
    assert scored["accuracy"] == pytest.approx(0.45)
    assert scored["families"] == {"a": {"correct": 9, "total": 10}, "b": {"correct": 0, "total": 2}}
    assert scored["truncated"] == pytest.approx(2 / 12)
    low, high = scored["interval"]
    assert low <= 0.45 <= high


def test_held_out_problems_are_those_with_the_value_that_only_test_has():
    (colours,) = make_families(["bands"], [])
    operand, value = GAIN.held_out
    others = [PROBLEM.model_copy(update={"inputs": PROBLEM.inputs | {operand: other}}) for other in (value, value + 1)]
    problems = [others[0], others[1], others[0], colours.pose(random.Random(0))]
    verdicts = [judged("gain", True), judged("gain", True), judged("gain", False), judged("bands", True)]
    assert harness.held_out(problems, verdicts) == {"correct": 1, "total": 2}


def test_degenerate_answers_are_empty_or_repeat():
    good = "The river Rhine runs from the Alps to the North Sea through several countries."
    rows = [judged("general", None, text=t, domain="general") for t in (good, "", "so it goes " * 40, good)]
    assert degenerate(rows) == 0.5


def test_size_counts_tied_weights_once(tmp_path):
    shape = Scratch(vocabulary=300, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2)
    fetch("tiny", Source(scratch=shape), tmp_path / "m")
    model = load_model(tmp_path / "m")
    found = harness.size(tmp_path / "m")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["embedding_parameters"] == model.get_input_embeddings().weight.numel()
    assert found["bytes"] > 4 * found["parameters"]
