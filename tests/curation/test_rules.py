import pytest

from q2t.curation import rules
from q2t.records import Completion, Problem, Verdict

PROBLEM = Problem(
    id="p", family="led", domain="target", split="questions", inputs={}, question="Which resistor?", check={}
)
PROSE = (
    "A capacitor stores energy in the field between two plates. When a voltage is applied, charge builds up "
    "until the plates hold as much as their area and spacing allow. Take the supply away and a charge stays "
    "and the part can smooth a ripple, block a constant current, or set the pace of an oscillator together "
    "with a resistor. Its unit, the farad, is large; most circuits use micro, nano or pico."
)


def said(text: str, finish_reason: str = "stop", tokens: int = 10) -> Completion:
    return Completion(
        id="c", problem_id="p", teacher="t", sample=0, text=text, finish_reason=finish_reason,  # type: ignore[arg-type]
        prompt_tokens=5, completion_tokens=tokens, settings={},
    )  # fmt: skip


def test_truncated_and_too_long() -> None:
    assert rules.truncated(PROBLEM, said("a", "length")) == "length"
    assert rules.truncated(PROBLEM, said("a")) is None
    assert rules.too_long(PROBLEM, said("a", tokens=101), max_tokens=100) == "over_100"
    assert rules.too_long(PROBLEM, said("a", tokens=100), max_tokens=100) is None


def test_malformed_names_the_rule_of_the_parser() -> None:
    assert rules.malformed(PROBLEM, said("560 ohm")) == "no_think"
    assert rules.malformed(PROBLEM, said("<think>a</think><answer>560</answer>")) is None


def test_wrong_asks_the_verifier_about_the_answer_alone() -> None:
    def verify(problem: Problem, answer: str) -> Verdict:
        return Verdict(correct=answer == "560 ohm", rule="ok" if answer == "560 ohm" else "wrong_value")

    assert rules.wrong(PROBLEM, said("<think>a</think><answer> 560 ohm </answer>"), verify) is None
    assert rules.wrong(PROBLEM, said("<think>560 ohm</think><answer>470 ohm</answer>"), verify) == "wrong_value"


@pytest.mark.parametrize("text, found", [("", True), (" \n\t", True), ("...!?", True), ("4", False), ("да", False)])
def test_empty(text: str, found: bool) -> None:
    assert (rules.empty(PROBLEM, said(text)) is not None) is found


@pytest.mark.parametrize(
    "text",
    [
        "Hi<|im_end|>",
        "<|im_start|>user",
        "<|eot_id|>",
        "<｜User｜>",
        "<start_of_turn>model",
        "[INST] x",
        "<|endoftext|>",
    ],
)
def test_marks_of_chat_templates_are_found(text: str) -> None:
    assert rules.special_tokens(PROBLEM, said(f"Sure. {text}"))


@pytest.mark.parametrize("text", ["a | b | c", "<b>bold</b>", "if a <|b| then", "x[INSTANCE]", "1 < 2 |> 3", PROSE])
def test_other_brackets_are_no_marks(text: str) -> None:
    assert rules.special_tokens(PROBLEM, said(text)) is None


def test_leaked_tags() -> None:
    assert rules.leaked_tags(PROBLEM, said("Paris.</answer>")) == "</answer>"
    assert rules.leaked_tags(PROBLEM, said("<Think>hm")) == "<Think>"
    assert rules.leaked_tags(PROBLEM, said("I think the answer is <b>Paris</b>.")) is None


@pytest.mark.parametrize(
    "text",
    [
        "no no no no no no no no",
        "I am a model. I am a model. I am a model. I am a model.",
        PROSE + " The end of it is not in sight." * 5,
        "one two three four five six seven eight nine ten eleven " * 3,
    ],
)
def test_loops_are_degenerate(text: str) -> None:
    assert rules.degenerate(PROBLEM, said(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris.",
        "Paris is the capital of France. Paris is on the Seine.",
        "New York, New York.",
        PROSE,
        "1. Red\n2. Green\n3. Blue\n4. Yellow\n5. Violet",
    ],
)
def test_prose_and_short_answers_are_not(text: str) -> None:
    assert rules.degenerate(PROBLEM, said(text)) is None


def test_the_frequent_pair_counts_only_in_texts_of_gophers_length() -> None:
    words = [f"w{i}" for i in range(30)]
    long = " ".join(f"{word} big cat" for word in words)  # "big cat" is most of it, no five words come twice
    assert rules.repetition(long) == "top_2_gram"
    assert rules.repetition(" ".join(long.split()[: rules.TOP_NGRAM_WORDS - 1])) is None


def test_repeated_ngrams_are_measured_in_characters_behind_the_first_occurrence() -> None:
    # 5 words repeated once, in 34 words of equal length: 5/34 = 0.147 passes 0.15, and 5/33 = 0.152 does not.
    fillers = [f"w{i:02}" for i in range(29)]
    repeated = fillers[:5]
    assert rules.repetition(" ".join(fillers + repeated)) is None
    assert rules.repetition(" ".join(fillers[:28] + repeated)) == "duplicate_5_grams"
