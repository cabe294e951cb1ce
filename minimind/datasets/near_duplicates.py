"""Evaluation questions that training data asks in nearly the same words.

Two texts are near-duplicates if their sets of five-character shingles, without case, punctuation
and white space, have at least a given Jaccard similarity (Broder 1997), and their numbers are the
same: a problem with other numbers is another problem, though all other words may be the same.
MinHash and LSH propose candidates, whose similarity is then computed exactly. Only the evaluation
questions are kept.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from minimind.datasets.formats import read_rows
from minimind.datasets.row_checks import parse_question, questions
from minimind.datasets.sources import Place

SHINGLE = 5  # characters
_NUM_PERM = 128
# Of false candidates and missed ones: the former cost a comparison each, the latter are lost.
_WEIGHTS = (0.1, 0.9)
_STEP = 4096  # shingles; each makes a table of all permutations of them

_NOT_IN_WORDS = re.compile(r"[\W_]+")
_NUMBER = re.compile(r"\d+")


class NearDuplicates:
    """Evaluation questions to which those of training rows are compared."""

    def __init__(self, sources: Sequence[Path], similarity: float) -> None:
        # Slow to import, and of no use to those who compare with nothing.
        from datasketch import MinHash, MinHashLSH

        self._similarity = similarity
        self._hasher = MinHash(num_perm=_NUM_PERM, hashfunc=crc32)
        self._index = MinHashLSH(threshold=similarity, num_perm=_NUM_PERM, weights=_WEIGHTS)
        self._questions: list[tuple[Place, str]] = []
        self._most_shingles = 0
        for source in sources:
            for place, question, *_ in read_rows(source, parse_question):
                if found := shingles(question):
                    self._index.insert(len(self._questions), self._minhash(found))
                    self._questions.append((place, question))
                    self._most_shingles = max(self._most_shingles, len(found))

    def find(self, value: Any) -> tuple[Place, float] | None:
        """The evaluation question most similar to one of the row's, if similar enough, and how."""
        nearest: tuple[Place, float] | None = None
        for question in questions(value):
            # No set with more is similar enough to any of those in the index.
            found = shingles(question, int(self._most_shingles / self._similarity))
            if not found:
                continue
            for index in sorted(self._index.query(self._minhash(found))):
                place, other = self._questions[index]
                if numbers(other) != numbers(question):
                    continue
                similarity = jaccard(found, shingles(other))
                if similarity >= (nearest[1] if nearest else self._similarity):
                    nearest = (place, similarity)
        return nearest

    def _minhash(self, found: set[str]) -> Any:
        minhash = self._hasher.copy()
        ordered = [shingle.encode() for shingle in found]
        for start in range(0, len(ordered), _STEP):
            minhash.update_batch(ordered[start : start + _STEP])
        return minhash


def shingles(text: str, most: int = sys.maxsize) -> set[str]:
    """All runs of five characters of a text, or a shorter text as a whole.

    None of a text that has more than ``most``, which is noticed without making them all.
    """
    text = words(text)
    found: set[str] = set()
    for start in range(max(1, len(text) - SHINGLE + 1)) if text else ():
        found.add(text[start : start + SHINGLE])
        if len(found) > most:
            return set()
    return found


def words(text: str) -> str:
    """A text without case, punctuation and white space."""
    return _NOT_IN_WORDS.sub("", text.casefold())


def numbers(text: str) -> list[str]:
    """Runs of digits, as if there were no punctuation and white space: 1,000 is 1000."""
    return _NUMBER.findall(words(text))


def jaccard(one: set[str], other: set[str]) -> float:
    """Share of the elements of either that are in both."""
    return len(one & other) / len(one | other)
