"""Variations of chats: user turns that lose a few words, or say some of them otherwise.

What the assistant says stays as it is, and so must what its answer depends on: numbers and
negations are never dropped or replaced, tags never touched.

Besides, as MiniMind has it, a share of all chats begins with some system prompt, and a share
loses its empty thoughts, which a model would else put before every answer.
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from minimind.chat.template import Message
from minimind.errors import UserError
from minimind.params import Section, Seed

SHORT_TURN = 5  # words; of so few, each is needed

# Chinese and Japanese have no spaces: each of these characters counts as a word, unless it is
# part of a word that the table of synonyms knows.
_CJK = r"\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_PUNCTUATION = (
    r"!-&(-,./:-@\[-^`{-~\xa1-\xbf\u2010-\u2018\u201a-\u2027\u2030-\u205e"
    r"\u3000-\u3040\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_LETTER = rf"[^\s{_PUNCTUATION}{_CJK}]"  # of other words, also their digits, ' and -
_TAG = r"<[^<>\s]+>"
_END = re.compile(r"[.,;:!?)\]}]|\Z")  # has no space before it

_NUMBERS_AND_NEGATIONS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty "
    "ninety hundred thousand million billion dozen half quarter once twice thrice double triple "
    "first second third no not never none nor without "
    "两 俩 仨 半 双 倍 几 第 不 没 无 非 未 别 勿 莫"
)
_NEEDED = frozenset(_NUMBERS_AND_NEGATIONS.split())
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
SYSTEM_PROMPTS = [
    *("You are a helpful assistant.", "Answer briefly and correctly."),
    *("You are minimind, a small language model.", "If you do not know something, say so."),
    *("你是一个乐于助人的助手。", "请简短、准确地回答。"),
    *("你是小型语言模型 minimind。", "不知道的事情，请直接说不知道。"),
]


class AugmentConfig(Section):
    """The keys of an `encode.<name>` section that are about variations."""

    augment_copies: int = Field(0, ge=0, le=100)  # of each chat, beside the original
    seed: Seed = 1
    word_dropout: float = Field(0.1, ge=0, lt=1)  # share of the words left out
    synonym_share: float = Field(0.5, ge=0, le=1)  # of the words that have synonyms, replaced
    system_share: float = Field(0.0, ge=0, le=1)  # of chats without a system turn, given one
    system_prompts: list[Annotated[str, Field(min_length=1)]] = Field(SYSTEM_PROMPTS, min_length=1)
    empty_thought_dropout: float = Field(0.0, ge=0, le=1)  # share of chats that lose them

    @property
    def changes_chats(self) -> bool:
        return bool(self.augment_copies or self.system_share or self.empty_thought_dropout)


class Augmentation:
    """Makes the variations of chats: a pure function of seed, row and copy."""

    def __init__(self, config: AugmentConfig, synonyms: Sequence[Sequence[str]]) -> None:
        self.config = config
        self._others = {
            word.casefold(): [other for other in group if other != word]
            for group in synonyms
            for word in group
        }
        longest_first = sorted(self._others, key=lambda word: (-len(word), word))
        known = "|".join(map(_whole_word, longest_first)) or r"(?!)"
        self._words = re.compile(rf"(?:{known})|{_TAG}|[{_CJK}]|{_LETTER}+", re.IGNORECASE)

    def variants(self, chat: Sequence[Message], row: int) -> list[list[Message]]:
        """The chat that is row number `row` of its source, and its variations."""
        chats = [[*chat], *self.copies(chat, row)]
        seeds = [f"{self.config.seed} {row} {copy} frame" for copy in range(len(chats))]
        return [
            self._frame(chat, random.Random(seed)) for chat, seed in zip(chats, seeds, strict=True)
        ]

    def copies(self, chat: Sequence[Message], row: int) -> list[list[Message]]:
        """The variations of the chat, before system prompts and empty thoughts."""
        seeds = [f"{self.config.seed} {row} {copy}" for copy in range(self.config.augment_copies)]
        return [self._vary(chat, random.Random(seed)) for seed in seeds]

    def _frame(self, chat: list[Message], rng: random.Random) -> list[Message]:
        if rng.random() < self.config.empty_thought_dropout:
            chat = [_without_empty_thought(turn) for turn in chat]
        if chat[0]["role"] != "system" and rng.random() < self.config.system_share:
            prompt = rng.choice(self.config.system_prompts)
            chat = [{"role": "system", "content": prompt}, *chat]
        return chat

    def _vary(self, chat: Sequence[Message], rng: random.Random) -> list[Message]:
        return [
            {**turn, "content": self._vary_text(turn["content"], rng)}
            if turn["role"] == "user"
            else turn
            for turn in chat
        ]

    def _vary_text(self, text: str, rng: random.Random) -> str:
        words = list(self._words.finditer(text))
        may_drop = len(words) > SHORT_TURN
        varied = ""
        end = 0
        for match in words:
            varied += text[end : match.start()]
            word, end = match.group(), match.end()
            if may_drop and rng.random() < self.config.word_dropout and _can_go(word):
                # One of the spaces around it goes too.
                if not varied or varied[-1].isspace():
                    end += text.startswith(" ", end)
                if _END.match(text, end):
                    varied = varied.rstrip(" ")
                continue
            if (others := self._others.get(word.casefold())) and (
                rng.random() < self.config.synonym_share
            ):
                other = others[int(rng.random() * len(others))]
                word = other[0].upper() + other[1:] if word[0].isupper() else other
            varied += word
        varied += text[end:]
        return varied if varied.strip() else text


def load_synonyms(file: Path) -> list[list[str]]:
    """Read a JSON list of groups, each a list of words that can stand for one another.

    Raises:
        UserError: it is none, or a word has a digit or tag bracket in it, or stands there twice.
    """
    try:
        groups = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; correct data.synonyms.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}; it must be JSON in UTF-8.") from None
    if not isinstance(groups, list):
        raise UserError(f"{file} must be a list of groups of words: [[word, word], ...].")
    seen: set[str] = set()
    for number, group in enumerate(groups, 1):
        where = f"{file}: group {number}"
        if not isinstance(group, list) or len(group) < 2:
            raise UserError(f"{where} is {group!r}; it must be a list of two words or more.")
        for word in group:
            if not isinstance(word, str) or not word or word != word.strip():
                raise UserError(f"{where} has {word!r}; it must be a word without outer space.")
            if re.search(r"[\d<>]", word):
                raise UserError(f"{where} has {word!r}; digits and < > must stay as they are.")
            if word.casefold() in seen:
                raise UserError(f"{where} has {word!r}, which stands in the table before.")
            seen.add(word.casefold())
    return groups


def _without_empty_thought(turn: Message) -> Message:
    """Of an assistant's turn, unless it is all that there is."""
    text = turn["content"] or ""
    found = _EMPTY_THOUGHT.match(text)
    if turn["role"] != "assistant" or not found:
        return turn
    rest = text[found.end() :]
    return {**turn, "content": rest} if rest or turn.get("tool_calls") else turn


def _whole_word(word: str) -> str:
    """A pattern for the word where it is not a part of a longer one."""
    before = rf"(?<!{_LETTER})" if re.match(_LETTER, word[0]) else ""
    after = rf"(?!{_LETTER})" if re.match(_LETTER, word[-1]) else ""
    return before + re.escape(word) + after


def _can_go(word: str) -> bool:
    """Whether the answer can be the same without the word."""
    folded = word.casefold()
    return (
        any(map(str.isalpha, word))
        and not any(map(str.isnumeric, word))  # 12, x2, but also 三 and 百
        and not word.startswith("<")
        and _NEEDED.isdisjoint([*folded, *re.split(r"[\s-]", folded)])
        and not folded.endswith(("n't", "n’t"))
    )
