"""A model that was never trained on the answer format, measured at its best: worked examples, free text.

The strict figure of such a model is that of its formatting. Here it sees three worked lessons as earlier turns of
the chat (few-shot prompting: Brown et al., Language Models are Few-Shot Learners, 2020), and the answer is looked
for in whatever it writes, as a reader would: the last <answer> if there is one; in it, the last quantity in the unit
that was asked for, else the last bare number that is given as a result; or the candidate that is called the answer,
else the last one. The family's own verifier decides. Text is only ever searched, never run.
"""

import re
import unicodedata
from collections.abc import Sequence

from quantiphy import Quantity
from transformers import PreTrainedTokenizerBase

from q2t.capability.families import verify
from q2t.deployment.runtime import Request
from q2t.records import Problem, Verdict
from q2t.sources import render

SHOTS = 3
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_TEN = r"10 ?(?:\^|\*\*|(?=-)) ?[({]? ?([-+]?) ?(\d{1,3})(?!\.?\d) ?[)}]?"
_NORMAL_FORM = (
    (r"[\u2010-\u2014\u2212]", "-"),
    (r"(?:[^\S\n]|[$~]|\\[,;:! ])+", " "),
    (r"\{,\}", ","),
    (r"\\(?:text|math)[a-z]*", ""),
    (r"\\boxed", " answer: "),
    (r"\\approx|≈", "="),
    (r"\\mu(?![a-z])", "μ"),
    (r"\\", ""),
    (r"(?<![\w.,^-])(\d{1,3})[ ,](\d{3})(?:[ ,](\d{3}))?(?:[ ,](\d{3}))?(?!\d)", r"\1\2\3\4"),
    (r"(?<![\w.,/])(\d+),(\d{1,2})(?![\d,])", r"\1.\2"),
    (rf"(?<=\d) ?(?:[xX×·⋅*]|times|cdot) ?{_TEN}", r"e\1\2"),
    (rf"(?<![\w.]){_TEN}", r"1e\1\2"),
    (r"[ {}*]+", " "),
)
"""LaTeX, Markdown and typography to plain text, in this order; all powers of ten become an exponent, as in 4.7e3."""
_PREFIXES = {"kil": "k", "meg": "M", "gig": "G", "mil": "m", "mic": "u", "nan": "n", "pic": "p"}
_NUMBER = (
    # An exponent whose base was not understood is no number of its own.
    # Nor is what stands behind a fraction's stroke or a comma. A minus behind a digit is an operator, or from .. to.
    r"(?<![\w.^])(?<![eE^][-+])(?<!\d[,/])"
    r"(?P<number>(?:(?<![^\s=(:])(?<!\d )-)?(?:\d+(?:\.\d+)?|\.\d+)(?: ?[eE][-+]?\d{1,3})?)"
    r"[ -]?(?P<prefix>(?i:kilo?|mega?|giga?|milli|micro|nano|pico)|[kKMGmuμnp])?"
)
_RKM = {"ohm": "RkKM", "F": "pnuμm", "V": "V", "A": "A"}
"""Letters that stand for the decimal point: 4k7, 2R2, 100n (IEC 60062), and 3V3; R, V and A are the unit itself."""
_UNITS = {"ohm": r"(?i:ohms?)|Omega|Ω", "F": r"F|(?i:farads?)", "H": r"H|(?i:henr(?:ys?|ies))", "V": r"V|(?i:volts?)"}
_UNITS |= {"A": r"A|(?i:amp(?:ere)?s?)", "W": r"W|(?i:watts?)", "Hz": r"(?i:hz|hertz)", "s": r"s|(?i:sec(?:ond)?s?)"}
"""How people write the units that `capability.electronics.values` reads."""
_END = r"(?= ?(?:[.,;](?!\d)|[)\]<=\n]|$))"
"""What may stand behind a bare number: nothing that could be its unit, an operator or more digits."""
_CUE = (
    r"(?<!n[o'’]t )\b(?i:(?:answer|choice|option)(?: is|:)+|choose|pick|select|take)"
    r"[\s*(\"']*(?i:(?:the|candidate|part|option)[\s*]+)*"
)
"""Words that a choice stands behind. A colon after "choose" is not one of them: so do questions list candidates."""
_VERDICT = r"\W? (?:is|it is) (?:the )?(?:right|correct|best|answer)"
_ASIDE = re.compile(r"\([^()\s]+\s[^()]*\)")
"""Two or more words in brackets, where a letter seldom is the choice: (see section B)."""


def examples(lessons: Sequence[Problem], family: str) -> list[Problem]:
    """The family's first SHOTS lessons that are worded differently, or as many of them as there are.

    The wording is the long words in small letters: what else a question holds are operands, units and part names.
    """
    first: dict[tuple[str, ...], Problem] = {}
    for lesson in lessons:
        if lesson.family == family:
            first.setdefault(tuple(re.findall(r"[a-z]{4,}", lesson.question)), lesson)
    return list(first.values())[:SHOTS]


def requests(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], lessons: Sequence[Problem]
) -> list[Request]:
    """Each question in the chat template, after the worked lessons of its family, which the family shares."""
    before = {family: examples(lessons, family) for family in {problem.family for problem in problems}}
    rendered = []
    for problem in problems:
        # Put in behind the template: those of models that think take the reasoning out of earlier turns.
        solutions = {f"⟦{place}⟧": lesson.solution for place, lesson in enumerate(before[problem.family])}
        turns = []
        for mark, lesson in zip(solutions, before[problem.family], strict=True):
            turns.append({"role": "user", "content": lesson.question})
            turns.append({"role": "assistant", "content": mark})
        shown = render(tokenizer, turns) if turns else ""
        turns.append({"role": "user", "content": problem.question})
        prompt = render(tokenizer, turns, begin_answer=True)
        for mark, solution in solutions.items():
            shown, prompt = shown.replace(mark, solution), prompt.replace(mark, solution)
        begin, whole = tokenizer([shown, prompt], add_special_tokens=False).input_ids
        # A template may end the last turn in another way than those before it, or a token may reach into the next turn.
        rendered.append(Request(prompt, shared=shown if whole[: len(begin)] == begin else ""))
    return rendered


def judge(problem: Problem, text: str, finish_reason: str) -> Verdict:
    """The family's verdict on the answer found in `text`. A truncated text counts by what it says so far."""
    return verify(problem, extract(problem, text))


def extract(problem: Problem, text: str) -> str:
    """The answer that a reader would take from free text; all of it where none can be told. Never fails."""
    answers = [answer for answer in _ANSWER.findall(text) if answer.strip()]
    said = (answers or [text])[-1].strip()
    if problem.check.get("kind") == "choice":
        return _candidate([str(name) for name in problem.check["candidates"]], said) or said  # type: ignore[union-attr]
    unit = str(problem.check.get("unit"))
    if unit not in _UNITS:
        return said  # a check of the family's own, which reads it by itself
    plain = _normal_form(said)
    return _quantity(unit, plain) or plain


def chance(problems: Sequence[Problem]) -> dict[str, float]:
    """Family to the accuracy of blind guesses: one in so many candidates, nothing where a value is asked for."""
    by_family: dict[str, list[float]] = {}
    for problem in problems:
        candidates = problem.check.get("candidates")
        by_family.setdefault(problem.family, []).append(1 / len(candidates) if isinstance(candidates, list) else 0.0)
    return {family: sum(each) / len(each) for family, each in sorted(by_family.items())}


def _candidate(candidates: list[str], text: str) -> str | None:
    """The name of the candidate that is called the answer, else of the last one, by name or letter (A is the first)."""
    letters = {chr(ord("A") + place): name for place, name in enumerate(candidates)}
    names = "|".join(re.escape(name) for name in sorted(candidates, key=len, reverse=True))
    # Behind a number or a degree sign a letter is a unit; an "A" that opens a sentence is mostly an article.
    article = r"(?<![a-z,;] )A (?!(?:is|it|has|fits|meets|because)\b)[a-z]"
    letter = rf"(?<!\d )(?<!°)(?<!° )(?!{article})[{''.join(letters)}](?!['’][a-z])"
    mention = rf"(?<![\w-])(?P<candidate>{names}|{letter})(?![\w-])"
    patterns = (_CUE + mention, mention + _VERDICT, mention)
    found = _last(patterns, _ASIDE.sub("", text)) or _last(patterns, text)
    return letters.get(found["candidate"], found["candidate"]) if found else None


def _quantity(unit: str, text: str) -> str | None:
    """The last quantity in `unit`, else the last bare number in a box, of an "answer is" or behind an equals sign."""
    patterns = (
        rf"{_NUMBER}[ -]?(?:{_UNITS[unit]})(?!\w)",
        rf"(?i:answer)(?: is|[ :=])*{_NUMBER}{_END}",
        rf"= ?{_NUMBER}{_END}",
    )
    if letters := _RKM.get(unit):
        # Without digits behind it only a letter that is hardly an operand's: 100n, but not 5k.
        code = rf"(?<![\w.^-])(\d{{1,3}})([{letters}])(\d{{1,2}}|(?<=[Rpnuμ]))(?: ?(?:{_UNITS[unit]}))?(?!\w|\.\d)"
        own = "R" if unit == "ohm" else unit
        text = re.sub(code, lambda m: f"{m[1]}.{m[3] or 0} {m[2].removeprefix(own)}{unit}", text)
    found = _last(patterns, text)
    if not found:
        return None
    prefix = found["prefix"] or ""
    factor = Quantity(f"1{_PREFIXES.get(prefix[:3].lower(), prefix)}")
    return f"{float(found['number'].replace(' ', '')) * float(factor):.9g} {unit}"


def _last(patterns: Sequence[str], text: str) -> re.Match[str] | None:
    """The last match of the first pattern that has any."""
    for pattern in patterns:
        if found := list(re.finditer(pattern, text)):
            return found[-1]
    return None


def _normal_form(text: str) -> str:
    """`text` with its numbers and units in plain characters."""
    # The compatibility form makes one sign of the two ohms and of the two micros, but takes exponents down.
    text = unicodedata.normalize("NFKC", re.sub(r"[⁺⁻⁰¹²³⁴-⁹]+", r"^\g<0>", text))
    for pattern, plain in _NORMAL_FORM:
        text = re.sub(pattern, plain, text)
    return text.strip()
