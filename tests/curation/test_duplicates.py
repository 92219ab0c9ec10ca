import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q2t.curation.duplicates import (
    SIMILARITY,
    HeldOut,
    PromptIndex,
    normalize_answer,
    normalize_prompt,
    operands,
)
from q2t.records import Json, Problem, content_id

BUCK = "Design a 5V buck converter with feedback"


def target(family: str = "divider", question: str = "q", **inputs: Json) -> Problem:
    return Problem(
        id=content_id(family, inputs, question), family=family, domain="target", split="dev", inputs=inputs,
        question=question, check={},
    )  # fmt: skip


def general(question: str) -> Problem:
    return Problem(
        id=content_id("general", {}, question), family="general", domain="general", split="general_test",
        inputs={}, question=question, check={},
    )  # fmt: skip


def test_operands_are_the_same_in_other_words_other_types_and_another_order() -> None:
    one = target(vin=12, candidates=["A", "B"], question="Which?")
    assert operands(one) == operands(target(vin=12.0, candidates=["B", "A"], question="Choose one."))
    assert operands(one) != operands(target(vin=12.5, candidates=["A", "B"]))
    assert operands(one) != operands(target(vin=12, candidates=["A", "C"]))
    assert operands(one) != operands(target("led", vin=12, candidates=["A", "B"]))
    assert operands(target(a=1, b=2)) != operands(target(a=2, b=1))


def test_answers_keep_their_case_and_prompts_do_not() -> None:
    assert normalize_answer(" 5  mA\n") == normalize_answer("5 mA") != normalize_answer("5 MA")
    assert normalize_answer("10²") != normalize_answer("102")
    assert normalize_prompt("What's  a CAT?") == normalize_prompt("what s a cat")
    assert normalize_prompt("?!") == "?!"


@pytest.mark.parametrize(
    "prompt",
    [
        BUCK,
        "design a 5v  buck converter, with feedback!",
        "Please design a 5V buck converter with feedback for my board and explain each step",
        "Design a 5V buck converter with feedbacks",
    ],
)
def test_a_prompt_of_seven_words_is_matched(prompt: str) -> None:
    assert HeldOut([general(BUCK)]).find(general(prompt)) == general(BUCK).id


@pytest.mark.parametrize(
    "prompt",
    ["Design a boost converter", "What is the capital of Germany?", "Tell me a joke about cats", "", "?"],
)
def test_other_prompts_are_not(prompt: str) -> None:
    held_out = HeldOut([general(BUCK), general("What is the capital of France?"), general("Tell me a joke")])
    assert held_out.find(general(prompt)) is None


def test_eight_words_in_a_row_are_enough() -> None:
    held_out = HeldOut([general("Imagine that you live on the moon and write home about your first week there")])
    sharing = "My aunt wants to know how you live on the moon and write home, is that so?"
    assert held_out.find(general(sharing)) is not None
    assert held_out.find(general(sharing.replace("write", "phone"))) is None


def test_target_problems_are_matched_by_inputs_and_never_by_text() -> None:
    held_out = HeldOut([target(vin=12, vout=5, question="A divider makes 5 V from 12 V. Which resistors?")])
    assert held_out.find(target(vin=12, vout=5, question="Other words.")) is not None
    assert held_out.find(target(vin=12, vout=6, question="A divider makes 6 V from 12 V. Which resistors?")) is None


def jaccard(a: str, b: str) -> float:
    """Independent of the module: n-grams by zip, on texts already normal."""
    first, second = ({*zip(*(text[i:] for i in range(5)), strict=False)} for text in (a, b))
    return len(first & second) / len(first | second)


def test_minhash_finds_what_all_pairs_find() -> None:
    rng = random.Random(3)
    vocabulary = [f"{a}{b}" for a in ("ba", "ko", "tim", "ser", "lun") for b in ("do", "rek", "mi", "fas", "gol")]
    base = [" ".join(rng.choices(vocabulary, k=12)) for _ in range(40)]
    index = PromptIndex()
    for prompt in base:
        index.add(prompt, prompt)
    alike = 0
    for prompt in base:
        words = prompt.split()
        for _ in range(rng.randint(1, 2)):
            words[rng.randrange(12)] = rng.choice(vocabulary)
        edited = " ".join(words)
        best = max(jaccard(edited, other) for other in base)
        found = index.find(edited)
        assert (found is not None) == (best >= SIMILARITY)
        if found is not None:
            assert jaccard(edited, found) == best
            alike += 1
    assert 5 < alike < 35


def test_of_two_alike_the_more_alike_is_found() -> None:
    asked = "Explain to a child of eight how a rainbow comes about after the rain has gone"
    near, nearer = asked.replace("has gone", "is over"), asked.replace("has gone", "has gone by")
    for order in ((near, nearer), (nearer, near)):
        index = PromptIndex()
        for prompt in order:
            index.add(prompt, prompt)
        assert jaccard(asked, near) >= SIMILARITY
        assert index.find(asked) == nearer


@given(st.text(max_size=12))
def test_every_prompt_finds_itself(prompt: str) -> None:
    index = PromptIndex()
    index.add("other", "Explain how a rainbow forms")
    index.add("key", prompt)
    assert index.find(prompt) == "key"
