"""Duplicates among the rows, and rows that give away a held-out question.

Templated problems that differ only in their numbers look like near-duplicates to any text measure: target
problems are compared by their inputs. Written prompts are compared by their text.
"""

import re
import unicodedata
from collections.abc import Iterable

from q2t.records import Problem, operands

SHINGLE = 5
"""Characters in an n-gram. Words would leave nothing to compare in a prompt of seven."""
SIMILARITY = 0.8
"""Jaccard similarity of n-grams that makes two prompts near-duplicates; as in Gopher, arXiv 2112.11446."""
PASSAGE = 8
"""Words in a row that a prompt may not share with a held-out one: the n-gram of open-r1's decontamination."""
SHORTEST_PASSAGE = 5
"""A held-out prompt of fewer words is only matched as a whole: "tell me a joke" stands in many a prompt."""
BANDS, ROWS = 32, 4
"""MinHash bands. A pair at SIMILARITY becomes a candidate with probability 1 - (1 - 0.8**4)**32 > 0.9999."""


def normalize_answer(text: str) -> str:
    """Equal for texts that differ in whitespace only. Case stays: mA is not MA."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def normalize_prompt(text: str) -> str:
    """Equal for prompts that differ in case, punctuation and whitespace only."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(words) or text.strip()


class PromptIndex:
    """Prompts to be found again by text alike. MinHash proposes, the exact Jaccard similarity decides."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        self._keys: dict[str, str] = {}
        self._shingles: dict[str, frozenset[str]] = {}
        self._lsh = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))

    def add(self, key: str, prompt: str) -> None:
        """Put a prompt under a key. A prompt that equals an earlier one stays under that one's key."""
        text = normalize_prompt(prompt)
        if text not in self._keys:
            self._keys[text] = key
            self._shingles[text] = _shingles(text)
            self._lsh.insert(text, _minhash(self._shingles[text]))

    def find(self, prompt: str) -> str | None:
        """The key of the prompt most alike, None if all are below SIMILARITY; of equals the first by text."""
        text = normalize_prompt(prompt)
        if text in self._keys:
            return self._keys[text]
        shingles = _shingles(text)
        alike = [
            (-similarity, other)
            for other in self._lsh.query(_minhash(shingles))
            if (similarity := _jaccard(shingles, self._shingles[other])) >= SIMILARITY
        ]
        return self._keys[min(alike)[1]] if alike else None


class HeldOut:
    """The questions that measure: no training row may give one away."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self._operands: dict[str, str] = {}
        self._prompts = PromptIndex()
        self._passages: dict[int, dict[tuple[str, ...], str]] = {}
        for problem in problems:
            if problem.domain == "target":
                self._operands.setdefault(operands(problem), problem.id)
                continue
            self._prompts.add(problem.id, problem.question)
            words = normalize_prompt(problem.question).split()
            if len(words) >= SHORTEST_PASSAGE:
                size = min(PASSAGE, len(words))
                for passage in _passages(words, size):
                    self._passages.setdefault(size, {}).setdefault(passage, problem.id)

    def find(self, problem: Problem) -> str | None:
        """The id of a held-out problem that this one repeats, or None.

        Target problems: equal family and inputs. General ones: equal or near-duplicate prompts, or PASSAGE
        words in a row in common; a shorter held-out prompt counts when it stands in this one as a whole.
        """
        if problem.domain == "target":
            return self._operands.get(operands(problem))
        words = normalize_prompt(problem.question).split()
        for size, known in self._passages.items():
            for passage in _passages(words, size):
                if passage in known:
                    return known[passage]
        return self._prompts.find(problem.question)


def _passages(words: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]


def _shingles(text: str) -> frozenset[str]:
    """All n-grams of SHINGLE characters; of a shorter text the text itself."""
    return frozenset(text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1)))


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def _minhash(shingles: frozenset[str]):  # type: ignore[no-untyped-def]  # datasketch is imported when needed
    from datasketch import MinHash

    made = MinHash(num_perm=BANDS * ROWS, seed=1)
    made.update_batch(shingle.encode() for shingle in shingles)
    return made
