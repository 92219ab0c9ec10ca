import random
from collections import Counter
from typing import Any

import pytest

from q2t.config import Filter, Weights
from q2t.curation.curate import Curated, Rejected, curate
from q2t.records import Completion, Problem, Verdict, content_id, dump_line

SUBJECTS = ["rivers", "bread", "chess", "tides", "violins", "comets", "glass", "honey", "maps", "paper"]


def problem(domain: str, number: int, **changes: Any) -> Problem:
    made: dict[str, Any] = {
        "id": content_id(domain, number),
        "family": "led" if domain == "target" else "general",
        "domain": domain,
        "split": "questions" if domain == "target" else "general",
        "inputs": {"vin": number} if domain == "target" else {},
        "question": f"R for {number} V?" if domain == "target" else f"Tell me how {SUBJECTS[number % 10]} came about",
        "check": {"expected": number} if domain == "target" else {},
    }
    return Problem(**made | changes)


def said(to: Problem, sample: int = 0, text: str | None = None, **changes: Any) -> Completion:
    right = f"<think>by rote {sample}</think><answer>{to.inputs.get('vin')} ohm</answer>"
    made: dict[str, Any] = {
        "id": content_id("answer", to.id, sample),
        "problem_id": to.id,
        "teacher": "expert",
        "sample": sample,
        "text": text if text is not None else (right if to.domain == "target" else f"Long ago, in year {sample}."),
        "finish_reason": "stop",
        "prompt_tokens": 5,
        "completion_tokens": 10,
        "settings": {},
    }
    return Completion(**made | changes)


def verify(problem: Problem, answer: str) -> Verdict:
    right = answer == f"{problem.check['expected']} ohm"
    return Verdict(correct=right, rule="ok" if right else "wrong_value")


TARGETS = [problem("target", number) for number in range(20)]
GENERALS = [problem("general", number) for number in range(6)]
CLEAN = [said(p) for p in TARGETS + GENERALS]


def run(
    completions: list[Completion],
    held_out: tuple[Problem, ...] = (),
    problems: list[Problem] = TARGETS + GENERALS,
    **settings: Any,
) -> Curated:
    given = {
        "teachers": ["expert"],
        "target_share": 0.8,
        "max_tokens": 100,
        "max_rows": None,
        "keep_incorrect": False,
        "weights": Weights(domain={"target": 1.0, "general": 1.0}, teacher={}, difficulty=0.0),
    } | settings
    return curate(completions, problems, Filter(**given), verify, 0, held_out)


def reasons(outcome: Curated) -> dict[str, tuple[str, str]]:
    return {row.id: (row.reason, row.detail) for row in outcome.rejected}


def test_clean_answers_are_mixed_and_only_the_surplus_goes() -> None:
    outcome = run(CLEAN)
    assert Counter(row.domain for row in outcome.examples) == {"target": 20, "general": 5}
    assert [row.reason for row in outcome.rejected] == ["surplus"]
    assert outcome.counts["kept_target"] == 20 and outcome.counts["kept_general"] == 5
    kept = next(row for row in outcome.examples if row.problem_id == TARGETS[3].id)
    assert kept.question == TARGETS[3].question and kept.text == CLEAN[3].text and kept.id == CLEAN[3].id


@pytest.mark.parametrize(
    "to, changes, reason, detail",
    [
        (TARGETS[0], {"finish_reason": "length"}, "truncated", "length"),
        (TARGETS[0], {"completion_tokens": 101}, "too_long", "over_100"),
        (TARGETS[0], {"text": "<think>a</think>0 ohm"}, "malformed", "no_answer"),
        (TARGETS[0], {"text": "<think>a</think><answer>7 ohm</answer>"}, "wrong", "wrong_value"),
        (
            TARGETS[0],
            {"text": "<think>a<|im_end|></think><answer>0 ohm</answer>"},
            "special_tokens",
            "<|im_end|>",
        ),
        (TARGETS[0], {"text": CLEAN[0].text + "\n"}, "duplicate", CLEAN[0].id),
        (GENERALS[0], {"finish_reason": "length"}, "truncated", "length"),
        (GENERALS[0], {"completion_tokens": 101}, "too_long", "over_100"),
        (GENERALS[0], {"text": " \n"}, "empty", "no_letter"),
        (GENERALS[0], {"text": "Well,<|im_end|>"}, "special_tokens", "<|im_end|>"),
        (GENERALS[0], {"text": "Well.</answer>"}, "leaked_tags", "</answer>"),
        (GENERALS[0], {"text": "so and " * 20}, "degenerate", "duplicate_5_grams"),
        (GENERALS[0], {"text": CLEAN[20].text}, "duplicate", CLEAN[20].id),
    ],
)
def test_every_reason(to: Problem, changes: dict[str, Any], reason: str, detail: str) -> None:
    bad = said(to, 1, **changes)
    outcome = run([*CLEAN, bad])
    assert reasons(outcome)[bad.id] == (reason, detail)
    assert outcome.counts["rejected"][reason] == 1  # type: ignore[index, call-overload]
    assert len(outcome.examples) == 25


def test_no_more_target_rows_than_asked_for_and_the_mix_follows() -> None:
    outcome = run(CLEAN, max_rows=8)
    assert outcome.counts["kept_target"] == 8 and outcome.counts["kept_general"] == 2
    assert outcome.counts["rejected"] == {"not_sampled": 12, "surplus": 4}
    assert ("not_sampled", "max_rows_8") in reasons(outcome).values()
    assert run(CLEAN, max_rows=99) == run(CLEAN)


def test_what_gives_away_a_held_out_question_goes() -> None:
    held_out = (
        problem("target", 4, id="dev", split="dev", question="In other words?"),
        problem("general", 2, id="general_test", split="general_test", question="tell me how CHESS came about?"),
    )
    found = reasons(run(CLEAN, held_out))
    assert found[CLEAN[4].id] == ("contaminated", "dev")
    assert found[CLEAN[22].id] == ("contaminated", "general_test")


def test_of_prompts_alike_the_first_with_a_kept_answer_stays() -> None:
    twin = problem("general", 3, id="0" * 16, question="Tell me how TIDES came about!")
    problems = [*TARGETS, *GENERALS, twin]
    found = reasons(run([*CLEAN, said(twin)], problems=problems))
    assert found[CLEAN[23].id] == ("near_duplicate", twin.id)
    found = reasons(run([*CLEAN, said(twin, text="")], problems=problems))
    assert found[said(twin).id] == ("empty", "no_letter") and CLEAN[23].id not in {
        key for key, (reason, _) in found.items() if reason == "near_duplicate"
    }


def messy(seed: int) -> list[Completion]:
    """Many answers with all kinds of faults, some repeated."""
    rng = random.Random(seed)
    rows = []
    for to in TARGETS + GENERALS:
        for sample in range(6):
            texts = [
                None,
                None,
                None,
                "",
                "<think>a</think><answer>7 ohm</answer>",
                "<think>a</think>",
                "no " * 40,
                "<|im_end|>",
            ]
            rows.append(
                said(
                    to,
                    sample,
                    rng.choice(texts),
                    finish_reason=rng.choice(["stop", "stop", "stop", "length"]),
                    completion_tokens=rng.choice([10, 50, 200]),
                )
            )
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_kept_and_rejected_are_all_and_the_counts_add_up(seed: int) -> None:
    rows = messy(seed)
    outcome = run(rows, (problem("target", 4, id="dev"),))
    ids = [row.id for row in outcome.examples] + [row.id for row in outcome.rejected]
    assert sorted(ids) == sorted(row.id for row in rows)
    counts: dict[str, Any] = outcome.counts  # type: ignore[assignment]
    assert counts["read"] == len(rows) == counts["kept"] + sum(counts["rejected"].values())
    assert counts["kept"] == len(outcome.examples) == counts["kept_target"] + counts["kept_general"]
    assert sum(counts["malformed"].values()) == counts["rejected"].get("malformed", 0)
    assert sum(counts["wrong"].values()) == counts["rejected"].get("wrong", 0)
    assert sum(family["read"] for family in counts["families"].values()) == len(rows)
    assert counts["kept_target"] == 4 * counts["kept_general"]


def test_the_order_of_the_answers_does_not_matter() -> None:
    rows = messy(0)
    shuffled = random.Random(1).sample(rows, len(rows))
    first, second = run(rows), run(shuffled)
    assert [dump_line(row) for row in first.examples] == [dump_line(row) for row in second.examples]
    assert [dump_line(row) for row in first.rejected] == [dump_line(row) for row in second.rejected]
    assert first.counts == second.counts


def test_the_control_keeps_what_the_verdict_alone_rejects() -> None:
    rows = [*messy(2), *(said(to, 9) for to in GENERALS)]
    filtered, control = run(rows, target_share=1.0), run(rows, target_share=1.0, keep_incorrect=True)
    assert {row.id for row in filtered.examples} < {row.id for row in control.examples}
    gained = {row.id for row in control.examples} - {row.id for row in filtered.examples}
    assert {reasons(filtered)[key][0] for key in gained} == {"wrong"}
    assert "wrong" not in {row.reason for row in control.rejected}


def test_an_answer_given_twice_is_kept_once() -> None:
    outcome = run([*CLEAN, CLEAN[0]])
    assert len(outcome.examples) == 25 and reasons(outcome)[CLEAN[0].id] == ("duplicate", CLEAN[0].id)


def test_an_answer_to_an_unknown_problem_is_an_error() -> None:
    with pytest.raises(ValueError, match="not among the prompts"):
        run(CLEAN, problems=TARGETS)


def test_a_rejected_row_travels() -> None:
    row = run(CLEAN).rejected[0]
    assert Rejected.model_validate_json(dump_line(row)) == row


def test_rows_are_weighted_by_the_share_of_right_answers() -> None:
    """Of all that were given: a duplicate is right, and wrong ones count though they are not learnt."""
    hard, easy, general = TARGETS[0], TARGETS[1], GENERALS[0]
    rows = [said(hard), *(said(hard, sample, "<think>no</think><answer>-1 ohm</answer>") for sample in (1, 2, 3))]
    rows += [said(easy, sample, said(easy).text) for sample in range(3)] + [said(general, sample) for sample in (0, 1)]
    weights = Weights(domain={"target": 1.0, "general": 1.0}, teacher={}, difficulty=1.0)
    kept = run(rows, target_share=0.5, weights=weights).examples
    by_problem = {row.problem_id: row.weight for row in kept}
    assert by_problem[hard.id] == pytest.approx(4 * by_problem[easy.id])
    assert by_problem[general.id] == pytest.approx(by_problem[easy.id])
    assert all(row.weight == 1.0 for row in run(rows, target_share=0.5).examples)
