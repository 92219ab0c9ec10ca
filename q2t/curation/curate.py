"""From all answers to the training rows. Every answer is kept or rejected for one counted reason."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from q2t.config import Filter
from q2t.curation import rules
from q2t.curation.duplicates import HeldOut, PromptIndex, normalize_answer, operands
from q2t.curation.mixing import mix, sample
from q2t.curation.weights import weigh
from q2t.records import Completion, Example, Json, Problem, Record

Reason = Literal[
    "truncated", "too_long", "empty", "special_tokens", "leaked_tags", "malformed", "degenerate", "wrong",
    "contaminated", "near_duplicate", "duplicate", "not_sampled", "surplus",
]  # fmt: skip
"""In this order the first one counts. `wrong` needs a well-formed answer; `not_sampled` is beyond `max_rows`, and
`surplus` did not fit the mix."""
Rule = Callable[[Problem, Completion], str | None]


class Rejected(Record):
    """An answer that is not learnt, and why."""

    id: str
    """The id of the completion."""
    problem_id: str
    family: str
    teacher: str
    reason: Reason
    detail: str
    """What the rule found; for contaminated and near_duplicate a problem's id, for duplicate an answer's."""
    text: str


@dataclass(frozen=True)
class Curated:
    """The outcome, every list sorted by id."""

    examples: list[Example]
    rejected: list[Rejected]
    counts: dict[str, Json]
    """read, kept, kept_target, kept_general; rejected by reason; malformed and wrong by detail; and each
    family's read and kept."""


def curate(
    completions: Iterable[Completion],
    problems: Iterable[Problem],
    settings: Filter,
    verify: rules.Verify,
    seed: int,
    held_out: Iterable[Problem],
) -> Curated:
    """Judge every answer, drop duplicates and give-aways of `held_out`, and mix target with general rows.

    The order of `completions` does not matter. With `settings.keep_incorrect` the verifier is not asked, and
    what it alone would reject stays: the control, where every answer counts as right.

    Raises:
        ValueError: an answer to a problem that is not among `problems`, or too few rows for the mix.
    """
    by_id = {problem.id: problem for problem in problems}
    judge = _Judge(settings, verify, held_out)
    kept: list[Example] = []
    rejected: list[Rejected] = []
    rows = sorted(completions, key=lambda row: (row.problem_id, row.sample, row.id))
    answers = {row.id: row for row in rows}
    asked = Counter(row.problem_id for row in rows)
    right: Counter[str] = Counter()
    for row in rows:
        if row.problem_id not in by_id:
            raise ValueError(
                f"answer {row.id} of teacher {row.teacher!r} is to problem {row.problem_id}, which is not "
                "among the prompts; generate again from the present prompts"
            )
        problem = by_id[row.problem_id]
        verdict = judge.reject(problem, row)
        right[problem.id] += verdict is None or verdict[0] == "duplicate"
        if verdict is None:
            kept.append(_example(problem, row))
        else:
            rejected.append(_rejected(problem, row, *verdict))
    target = [row for row in kept if row.domain == "target"]
    general = [row for row in kept if row.domain == "general"]
    limit = len(target) if settings.max_rows is None else settings.max_rows
    target, beyond = sample(target, limit, seed)
    examples, surplus = mix(target, general, settings.target_share, seed)
    left_out: list[tuple[list[Example], Reason, str]] = [
        (beyond, "not_sampled", f"max_rows_{limit}"),
        (surplus, "surplus", f"share_{settings.target_share}"),
    ]
    for out, reason, detail in left_out:
        rejected += [_rejected(by_id[row.problem_id], answers[row.id], reason, detail) for row in out]
    rejected.sort(key=lambda row: row.id)
    verified = {name: count / asked[name] for name, count in right.items()}
    return Curated(weigh(examples, verified, settings.weights), rejected, _count(examples, rejected))


class _Judge:
    """The rules, and the memory of what was kept that finding duplicates takes."""

    def __init__(self, settings: Filter, verify: rules.Verify, held_out: Iterable[Problem]) -> None:
        too_long = partial(rules.too_long, max_tokens=settings.max_tokens)
        self._rules: dict[str, list[tuple[Reason, Rule]]] = {
            "target": [
                ("truncated", rules.truncated),
                ("too_long", too_long),
                ("special_tokens", rules.special_tokens),
                ("malformed", rules.malformed),
            ],
            "general": [
                ("truncated", rules.truncated),
                ("too_long", too_long),
                ("empty", rules.empty),
                ("special_tokens", rules.special_tokens),
                ("leaked_tags", rules.leaked_tags),
                ("degenerate", rules.degenerate),
            ],
        }
        if not settings.keep_incorrect:
            self._rules["target"].append(("wrong", partial(rules.wrong, verify=verify)))
        self._held_out = HeldOut(held_out)
        self._contamination: dict[str, str | None] = {}
        self._prompts = PromptIndex()
        self._texts: dict[tuple[str, str], str] = {}

    def reject(self, problem: Problem, row: Completion) -> tuple[Reason, str] | None:
        """Reason and detail, or None: the row is kept, and later rows are compared with it."""
        for reason, rule in self._rules[problem.domain]:
            if (detail := rule(problem, row)) is not None:
                return reason, detail
        if problem.id not in self._contamination:
            self._contamination[problem.id] = self._held_out.find(problem)
        if (other := self._contamination[problem.id]) is not None:
            return "contaminated", other
        if problem.domain == "general":
            # Rows come sorted by problem, so the first kept prompt of two alike is the one that stays.
            other = self._prompts.find(problem.question)
            if other not in (None, problem.id):
                return "near_duplicate", str(other)
            self._prompts.add(problem.id, problem.question)
        same = operands(problem) if problem.domain == "target" else problem.id
        key = same, normalize_answer(row.text)
        if key in self._texts:
            return "duplicate", self._texts[key]
        self._texts[key] = row.id
        return None


def _example(problem: Problem, row: Completion) -> Example:
    return Example(
        id=row.id,
        problem_id=problem.id,
        family=problem.family,
        domain=problem.domain,
        teacher=row.teacher,
        question=problem.question,
        text=row.text,
    )


def _rejected(problem: Problem, row: Completion, reason: Reason, detail: str) -> Rejected:
    return Rejected(
        id=row.id,
        problem_id=problem.id,
        family=problem.family,
        teacher=row.teacher,
        reason=reason,
        detail=detail,
        text=row.text,
    )


def _count(examples: list[Example], rejected: list[Rejected]) -> dict[str, Json]:
    kept = Counter(row.family for row in examples)
    lost = Counter(row.family for row in rejected)
    return {
        "read": len(examples) + len(rejected),
        "kept": len(examples),
        "kept_target": sum(row.domain == "target" for row in examples),
        "kept_general": sum(row.domain == "general" for row in examples),
        "rejected": dict(Counter(row.reason for row in rejected)),
        "malformed": dict(Counter(row.detail for row in rejected if row.reason == "malformed")),
        "wrong": dict(Counter(row.detail for row in rejected if row.reason == "wrong")),
        "families": {
            family: {"read": kept[family] + lost[family], "kept": kept[family]} for family in sorted(kept | lost)
        },
    }
