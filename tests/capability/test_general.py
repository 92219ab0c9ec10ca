import itertools
import re

import pytest

from q2t.capability.general import PROMPTS, TEST_PROMPTS, problems
from q2t.records import content_id

# Words that prompts for short answers share whatever they ask for.
COMMON = set(
    "a an the and or of to in on at for with is are was were it do does did i me my you your what how why "
    "who which when one two three four number few no more than most enough short brief briefly please only "
    "just sentence sentences line lines word words answer reply give name list write tell say explain".split()
)


def overlap(a: str, b: str) -> float:
    """Share of the shorter prompt's telling words that the other has too."""
    first, second = (set(re.findall(r"[a-z0-9']+", text.lower())) - COMMON for text in (a, b))
    return len(first & second) / min(len(first), len(second))


def test_there_are_204_prompts_and_60_others_for_the_test():
    assert (len(PROMPTS), len(TEST_PROMPTS)) == (204, 60)


@pytest.mark.parametrize("prompt", PROMPTS + TEST_PROMPTS)
def test_prompt_is_short_and_not_about_electronics(prompt):
    assert 8 <= len(prompt.split()) <= 25
    electronics = r"electr|circuit|\b(volt|amp|ohm|chip|wire|current)|resist|capacit|transist|diode|batter"
    assert not re.search(electronics, prompt, re.IGNORECASE)


def test_no_two_prompts_are_near_duplicates():
    close = [pair for pair in itertools.combinations(PROMPTS + TEST_PROMPTS, 2) if overlap(*pair) >= 0.5]
    assert close == []


def test_overlap_finds_a_near_duplicate():
    assert overlap(PROMPTS[9], "A bakery sells 15 rolls at 4 coins each. What do they cost?") >= 0.5


def test_problems_take_the_first_prompts_of_both_splits():
    rows = problems(3, 2)
    assert [(row.split, row.question) for row in rows] == [
        *(("general", prompt) for prompt in PROMPTS[:3]),
        *(("general_test", prompt) for prompt in TEST_PROMPTS[:2]),
    ]
    assert all((row.domain, row.family, row.check) == ("general", "general", {}) for row in rows)
    assert all(row.inputs == {"prompt": row.question} for row in rows)


def test_ids_are_unique_and_stable():
    rows = problems(len(PROMPTS), len(TEST_PROMPTS))
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.id == content_id("general", row.inputs, row.question) for row in rows)
    assert rows[0].id == "7a4f02fd7c55e0cd"


@pytest.mark.parametrize(("counts", "key"), [((205, 1), "general is 205"), ((1, 61), "general_test is 61")])
def test_more_prompts_than_exist_are_refused(counts, key):
    with pytest.raises(ValueError, match=rf"capability\.{key}, but only"):
        problems(*counts)
