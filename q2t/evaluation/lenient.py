"""A model that was never trained on the answer format, measured at its best: worked examples, free text.

The strict figure of such a model is that of its formatting. Here it sees three worked lessons as earlier turns of
the chat (few-shot prompting: Brown et al., Language Models are Few-Shot Learners, 2020), and the answer is looked
for in whatever it writes, as a reader would: the last <answer> if there is one, else the last quantity in the unit
that was asked for, or the last candidate. The family's own verifier decides. Text is only ever searched, never run.
"""

import re
from collections.abc import Sequence

from quantiphy import Quantity
from transformers import PreTrainedTokenizerBase

from q2t.capability.families import verify
from q2t.records import Problem, Verdict

SHOTS = 3
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = r"(?<![\w.])(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_POWER = r"(?:\s?(?:[x×*]|\\times)\s?10\s?\^?\s?\{?(?P<power>[-−+]?\d{1,3})\}?|[eE](?P<exponent>[-+]?\d{1,3}))?"
_PREFIXES = {"kilo": "k", "mega": "M", "giga": "G", "milli": "m", "micro": "u", "nano": "n", "pico": "p"}
_PREFIX = rf"(?:\\,|[\s$*~\\]){{0,3}}(?P<prefix>{'|'.join(_PREFIXES)}|[kKMGmuµμnp]\s?)?"
_UNITS = {
    "ohm": r"[oO]hms?|\\?[oO]mega|[ΩΩ]",
    "F": r"F|[fF]arads?",
    "V": r"V|[vV]olts?",
    "A": r"A|[aA]mp(?:ere)?s?",
}
"""How people write the units of the families; the two ohm signs are two characters."""


def examples(lessons: Sequence[Problem], family: str) -> list[Problem]:
    """The family's first SHOTS lessons that are worded differently, or as many of them as there are.

    The wording is the long words in small letters: what else a question holds are operands, units and part names.
    """
    first: dict[tuple[str, ...], Problem] = {}
    for lesson in lessons:
        if lesson.family == family:
            first.setdefault(tuple(re.findall(r"[a-z]{4,}", lesson.question)), lesson)
    return list(first.values())[:SHOTS]


def prompts(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], lessons: Sequence[Problem]) -> list[str]:
    """Each question in the chat template, after the worked lessons of its family."""
    before = {family: examples(lessons, family) for family in {problem.family for problem in problems}}
    rendered = []
    for problem in problems:
        turns = []
        for lesson in before[problem.family]:
            turns.append({"role": "user", "content": lesson.question})
            turns.append({"role": "assistant", "content": lesson.solution})
        turns.append({"role": "user", "content": problem.question})
        rendered.append(str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)))
    return rendered


def judge(problem: Problem, text: str, finish_reason: str) -> Verdict:
    """The family's verdict on the answer found in `text`. A truncated text counts by what it says so far."""
    return verify(problem, extract(problem, text))


def extract(problem: Problem, text: str) -> str:
    """The answer that a reader would take from free text; all of it where none can be told. Never fails."""
    said = (_ANSWER.findall(text) or [text])[-1].strip()
    if problem.check["kind"] == "choice":
        return _last_candidate([str(name) for name in problem.check["candidates"]], said) or said  # type: ignore[union-attr]
    return _last_quantity(str(problem.check["unit"]), said) or said


def chance(problems: Sequence[Problem]) -> dict[str, float]:
    """Family to the accuracy of blind guesses: one in so many candidates, nothing where a value is asked for."""
    by_family: dict[str, list[float]] = {}
    for problem in problems:
        candidates = problem.check.get("candidates")
        by_family.setdefault(problem.family, []).append(1 / len(candidates) if isinstance(candidates, list) else 0.0)
    return {family: sum(each) / len(each) for family, each in sorted(by_family.items())}


def _last_candidate(candidates: list[str], text: str) -> str | None:
    """The name of the candidate that is mentioned last, by name or by letter (A is the first)."""
    letters = {chr(ord("A") + place): name for place, name in enumerate(candidates)}
    names = "|".join(re.escape(name) for name in sorted(candidates, key=len, reverse=True))
    others = "".join(list(letters)[1:])
    # An "A" behind a number is a unit, and before a small letter an article, but for "A is".
    letter = rf"(?<!\d\s)(?:A(?!\s(?!is\b)[a-z])|[{others}])(?!['’])"
    found = re.findall(rf"(?<![\w-])({names}|{letter})(?![\w-])", text)
    return letters.get(found[-1], found[-1]) if found else None


def _last_quantity(unit: str, text: str) -> str | None:
    """The last quantity in `unit`, as a number without prefix and the unit."""
    found = list(re.finditer(rf"{_NUMBER}{_POWER}{_PREFIX}(?:{_UNITS.get(unit, re.escape(unit))})(?![A-Za-z])", text))
    if not found:
        return None
    part = found[-1].groupdict(default="")
    prefix = _PREFIXES.get(part["prefix"], part["prefix"].strip())
    exponent = (part["power"] or part["exponent"]).replace("−", "-")
    number = f"{part['number'].replace(',', '')}{f'e{exponent}' if exponent else ''}"
    return f"{float(number) * float(Quantity(f'1{prefix}')):.9g} {unit}"
