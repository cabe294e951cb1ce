"""What may be wrong with rows that can be trained on: duplicates, evaluation data, lost characters.

Stage encode counts it and `minimind lint` shows it. Rows pass one at a time; what is kept of them
is a hash and a place, 16 bytes of a table that is up to two thirds full.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minimind.chat.template import Message, turns
from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.formats import (
    Format,
    Formats,
    Preference,
    has_turns_as_prompt,
    parse_messages,
    parse_text,
    read_rows,
    text_of,
)
from minimind.datasets.sources import Place, Record

Doubt = Literal[
    "duplicate",
    "overlap",
    "near_overlap",
    "lossy",
    "truncated",
    "order",
    "tags",
    "damaged",
    "control",
    "unread",
    "gold",
]
"""What may be wrong with a row, in a word; docs/data.md has their meaning."""

_LINE_BITS = 40
_SHOWN_CHARACTERS = 8


class Warned(NamedTuple):
    """Something to look at in a row that can be trained on."""

    doubt: Doubt
    message: str


class RowChecks:
    """The checks that need no more of a row than its text; one object for each data set."""

    def __init__(self, tokenizer: ChatTokenizer | None, evaluation: "EvaluationQuestions") -> None:
        self._first_seen = FirstSeen()
        self._lost_characters = None if tokenizer is None else LostCharacters(tokenizer)
        self._evaluation = evaluation

    def warnings(self, place: Place, value: Any) -> Iterator[Warned]:
        """What is doubtful about ``value``, which a ``parse`` function made of the row there."""
        if first := self._first_seen.place_of(value, place):
            yield Warned("duplicate", f"the same as {first}")
        if asked := self._evaluation.place_of(value):
            yield Warned("overlap", f"asks what {asked} asks, which is for evaluation")
        if self._lost_characters and (lost := self._lost_characters.of(texts(value))):
            yield Warned("lossy", f"the tokenizer does not give back {shown_characters(lost)}")


class FirstSeen:
    """Where each value was first seen: a hash table of 64-bit hashes, without the values.

    Two values of a million share a hash with a probability of 3e-8.
    """

    def __init__(self) -> None:
        self._files: list[Path] = []
        self._num_values = 0
        self._keys, self._places = _slots(2**12), _slots(2**12)

    def place_of(self, value: Any, place: Place) -> Place | None:
        """Where an equal value stood; None, and ``place`` is remembered, if there was none."""
        if not self._files or self._files[-1] is not place.file:
            self._files.append(place.file)
        key = _hash64(repr(value)) or 1  # 0 marks an empty slot
        slot = self._slot_of(key)
        if self._keys[slot]:
            file, line = divmod(self._places[slot], 2**_LINE_BITS)
            return Place(self._files[file], line)
        self._keys[slot] = key
        self._places[slot] = ((len(self._files) - 1) << _LINE_BITS) + place.line
        self._num_values += 1
        if 3 * self._num_values > 2 * len(self._keys):
            self._grow()
        return None

    def _slot_of(self, key: int) -> int:
        """The key's slot, or the empty one where it belongs."""
        keys, last = self._keys, len(self._keys) - 1
        slot = key & last
        while keys[slot] and keys[slot] != key:
            slot = (slot + 1) & last
        return slot

    def _grow(self) -> None:
        keys, places = self._keys, self._places
        self._keys, self._places = _slots(2 * len(keys)), _slots(2 * len(keys))
        for key, place in zip(keys, places, strict=True):
            if key:
                slot = self._slot_of(key)
                self._keys[slot], self._places[slot] = key, place


def _slots(number: int) -> "array[int]":
    return array("Q", bytes(8 * number))


class EvaluationQuestions:
    """What evaluation data asks, to be found again in training data, but for white space."""

    def __init__(self, sources: Sequence[Path]) -> None:
        self._places: dict[int, Place] = {}
        for source in sources:
            for place, question, *_ in read_rows(source, parse_question):
                self._places.setdefault(_question_hash(question), place)

    def place_of(self, value: Any) -> Place | None:
        """Where the first question of ``value`` that is for evaluation stands."""
        places = map(self._places.get, map(_question_hash, questions(value)))
        return next(filter(None, places), None) if self._places else None


class LostCharacters:
    """Finds characters that are not what they were once encoded and decoded."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_kept: dict[str, bool] = {}

    def of(self, texts: Iterable[str]) -> list[str]:
        """Characters of ``texts`` that are lost, sorted; each is tried out once only."""
        found = set().union(*texts)
        for character in found - self._is_kept.keys():
            # Between letters: tokenizers may join accents to them, or strip space at an end.
            text = f"a{character}a"
            back = self._tokenizer.decode(self._tokenizer.encode_text(text))
            self._is_kept[character] = back == text
        return sorted(character for character in found if not self._is_kept[character])


def _asked(key: str, record: Record) -> str:
    return "\n".join(_user_turns(parse_messages(record, key, may_end_empty=True)))


# What a row of evaluation data asks.
parse_question = Formats(
    [
        Format("minimind", {"conversations"}, partial(_asked, "conversations")),
        Format("openai", {"messages"}, partial(_asked, "messages")),
        Format("prompt", {"prompt"}, partial(_asked, "prompt"), tells=has_turns_as_prompt),
        Format("prompt", {"prompt"}, partial(text_of, key="prompt")),
        *parse_text.formats,
    ]
)


def questions(value: Any) -> list[str]:
    """What a row asks: a text as a whole; a user's turns, each and all together."""
    if isinstance(value, str):
        return [value]
    turns = _user_turns(value.prompt if isinstance(value, Preference) else value)
    return turns if len(turns) < 2 else [*turns, "\n".join(turns)]


def texts(value: Any) -> list[str]:
    """All text of a row."""
    if isinstance(value, str):
        return [value]
    chats = value if isinstance(value, Preference) else [value]
    return [turn.text for turn in chain(*map(turns, chats))]


def shown_characters(characters: Sequence[str]) -> str:
    """The first of them by their code points: "U+00E9 é"."""
    named = [
        f"U+{ord(character):04X}" + (f" {character}" if character.isprintable() else "")
        for character in characters[:_SHOWN_CHARACTERS]
    ]
    num_others = len(characters) - len(named)
    return ", ".join(named) + (f" and {num_others} others" if num_others else "")


def _hash64(text: str) -> int:
    """The same in every process, as Python's own hashes are not."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _question_hash(question: str) -> int:
    return _hash64(" ".join(question.split()))


def _user_turns(messages: Sequence[Message]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]
