"""Rules over one answer. Each returns None, or what is wrong with the answer in a few words."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from q2t.curation.trajectory import Malformed, parse
from q2t.records import Completion, Problem, Verdict

DUPLICATE_NGRAM_SHARE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Words in the n-gram, and the largest share of the text's characters that may lie in repetitions of n-grams.
Gopher, arXiv 2112.11446, table A1."""
TOP_NGRAM_SHARE = {2: 0.20, 3: 0.18, 4: 0.16}
"""Words in the n-gram, and the largest share of characters that its most frequent one takes. Same table."""
TOP_NGRAM_WORDS = 50
"""Shorter texts are exempt from TOP_NGRAM_SHARE: Gopher's shortest document. In a sentence, a name that comes
twice is already a fifth of the characters."""

SPECIAL_TOKEN = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]")
"""Marks of chat templates (ChatML, Llama, DeepSeek, Gemma, Mistral): control tokens, were they learnt."""
TAG = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)

Verify = Callable[[Problem, str], Verdict]
"""Decides on the text between the answer tags."""


def truncated(problem: Problem, completion: Completion) -> str | None:
    """The teacher ran into its token cap."""
    return "length" if completion.finish_reason == "length" else None


def too_long(problem: Problem, completion: Completion, max_tokens: int) -> str | None:
    """More tokens than the student shall learn to write, counted as the teacher counts them."""
    return f"over_{max_tokens}" if completion.completion_tokens > max_tokens else None


def malformed(problem: Problem, completion: Completion) -> str | None:
    """No trajectory; the rule of `trajectory.Malformed`."""
    try:
        parse(completion.text)
    except Malformed as error:
        return error.rule
    return None


def wrong(problem: Problem, completion: Completion, verify: Verify) -> str | None:
    """The verifier rejects the answer of a well-formed trajectory; the rule of its verdict."""
    verdict = verify(problem, parse(completion.text).answer)
    return None if verdict.correct else verdict.rule


def empty(problem: Problem, completion: Completion) -> str | None:
    """Not one letter or digit."""
    return None if any(map(str.isalnum, completion.text)) else "no_letter"


def special_tokens(problem: Problem, completion: Completion) -> str | None:
    """A mark of a chat template stands in the text."""
    found = SPECIAL_TOKEN.search(completion.text)
    return found.group() if found else None


def leaked_tags(problem: Problem, completion: Completion) -> str | None:
    """A general answer in the target's format."""
    found = TAG.search(completion.text)
    return found.group() if found else None


def degenerate(problem: Problem, completion: Completion) -> str | None:
    """The text repeats itself; see `repetition`."""
    return repetition(completion.text)


def repetition(text: str) -> str | None:
    """Which of Gopher's n-gram limits the text breaks, "top_3_gram" for example, or None.

    Gopher's limits on repeated lines are left out: n-grams run across line ends and see them too.
    """
    words = text.split()
    characters = sum(map(len, words))
    if len(words) >= TOP_NGRAM_WORDS:
        for n, limit in TOP_NGRAM_SHARE.items():
            if _top_ngram(words, n) > limit * characters:
                return f"top_{n}_gram"
    for n, limit in DUPLICATE_NGRAM_SHARE.items():
        if _duplicate_ngrams(words, n) > limit * characters:
            return f"duplicate_{n}_grams"
    return None


def _top_ngram(words: Sequence[str], n: int) -> int:
    """Characters in the most frequent n-gram, all its occurrences together; 0 if none comes twice."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    return max((count * sum(map(len, gram)) for gram, count in counts.items() if count > 1), default=0)


def _duplicate_ngrams(words: Sequence[str], n: int) -> int:
    """Characters in n-grams that stood before; none counts twice, and a first occurrence not at all."""
    seen: set[tuple[str, ...]] = set()
    repeated = start = 0
    while start + n <= len(words):
        gram = tuple(words[start : start + n])
        if gram in seen:
            repeated += sum(map(len, gram))
            start += n
        else:
            seen.add(gram)
            start += 1
    return repeated
