import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from q2t.curation.trajectory import TAGS, Malformed, Trajectory, parse, render

ORACLE = re.compile(r"\s*<think>(?P<reasoning>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
"""Another way to say the grammar: no lookaheads, tags inside a part are refused afterwards."""

part = st.text(st.characters(codec="utf-8"), max_size=30).map(str.strip)
plain = part.filter(lambda text: text and not any(tag in text for tag in TAGS))
soup = st.lists(st.sampled_from([*TAGS, "<think", "<THINK>", "</ answer>", " ", "\n", "a", "4.7k ohm"]), max_size=12)


def by_oracle(text: str) -> Trajectory | None:
    match = ORACLE.fullmatch(text)
    if match is None or any(tag in match[name] for tag in TAGS for name in ("reasoning", "answer")):
        return None
    parts = Trajectory(match["reasoning"].strip(), match["answer"].strip())
    return parts if parts.reasoning and parts.answer else None


def by_parser(text: str) -> Trajectory | None:
    try:
        return parse(text)
    except Malformed:
        return None


@given(soup.map("".join))
@example("<think>a</think><answer>b</answer>")
@example("<think>a</think>\n\n<answer>b</answer>\n")
@settings(max_examples=1000)
def test_a_soup_of_tags_is_accepted_exactly_by_the_grammar(text: str) -> None:
    assert by_parser(text) == by_oracle(text)


@given(part, part, st.lists(st.sampled_from(["", " ", "\n", "x", "<answer>"]), min_size=3, max_size=3))
@settings(max_examples=500)
def test_near_trajectories_are_accepted_exactly_by_the_grammar(reasoning: str, answer: str, gaps: list[str]) -> None:
    text = f"{gaps[0]}<think>{reasoning}</think>{gaps[1]}<answer>{answer}</answer>{gaps[2]}"
    assert by_parser(text) == by_oracle(text)


@given(plain, plain)
def test_what_is_rendered_is_parsed_back(reasoning: str, answer: str) -> None:
    assert parse(render(reasoning, answer)) == Trajectory(reasoning, answer)


@pytest.mark.parametrize("reasoning, answer", [("", "1"), ("a", " "), ("a<think>", "1"), ("a", "1</answer>")])
def test_render_refuses_what_would_not_come_back(reasoning: str, answer: str) -> None:
    with pytest.raises(Malformed):
        render(reasoning, answer)


@pytest.mark.parametrize(
    "text, rule",
    [
        ("", "no_think"),
        ("560 ohm", "no_think"),
        ("a</think><answer>b</answer>", "no_think"),
        ("<think>a</think>560 ohm", "no_answer"),
        ("<think>a <answer>b</answer>", "unclosed_think"),
        ("<think>a</think><answer>b", "unclosed_answer"),
        ("<think>a</think><think>b</think><answer>c</answer>", "two_thinks"),
        ("<think>a</think><answer>b</answer><answer>c</answer>", "two_answers"),
        ("<answer>b</answer><think>a</think>", "order"),
        ("<think><answer>b</answer></think>", "order"),
        ("Well: <think>a</think><answer>b</answer>", "text_outside"),
        ("<think>a</think> so <answer>b</answer>", "text_outside"),
        ("<think>a</think><answer>b</answer> Done.", "text_outside"),
        ("<think> </think><answer>b</answer>", "empty_think"),
        ("<think>a</think><answer>\n</answer>", "empty_answer"),
    ],
)
def test_the_rule_says_why(text: str, rule: str) -> None:
    with pytest.raises(Malformed, match=rule) as caught:
        parse(text)
    assert caught.value.rule == rule
