"""Everything that can be said about the rows of a data set before anything is trained on them.

Errors are what stage encode refuses. Warnings are what it accepts and counts
(:mod:`minimind.datasets.row_checks`), and what only this module looks for.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from minimind.chat.template import Message
from minimind.chat.tokenizer import CONTROL_TOKENS, TAGS, ChatTokenizer
from minimind.datasets.encode import ENCODINGS, DroppedRow, EncodedSample, encode_rows, row_batches
from minimind.datasets.formats import (
    TAG_PATTERN,
    BadRowError,
    Preference,
    Row,
    parse_chat,
    parse_preference,
    parse_text,
    read_rows_and_bad_rows,
    shown_keys,
)
from minimind.datasets.near_duplicates import NearDuplicates
from minimind.datasets.row_checks import (
    Doubt,
    EvaluationQuestions,
    RowChecks,
    Warned,
    shown_characters,
    texts,
)
from minimind.datasets.sources import Fault, Place, Record
from minimind.datasets.unread_keys import UnreadKeys
from minimind.errors import UserError
from minimind.tasks.problem import Problem, parse_problem

LintFormat = Literal["text", "chat", "reason", "preference", "prompts"]
Level = Literal["error", "warning"]

# Which roles may follow one; None is before the first turn. System stands first or nowhere.
_MAY_FOLLOW: Mapping[str | None, Sequence[str]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_MAY_BE_TAGS: Sequence[Sequence[str]] = ([], list(TAGS), list(TAGS[:2]), list(TAGS[2:]))
_CONTROL_PATTERN = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
# What text shows that was once decoded as something it is not: the sign for undecodable bytes,
# control characters, and UTF-8 read as Latin-1 or Windows-1252 ("Ã©" for "é").
_DAMAGED_PATTERN = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]|[ÂÃ][\x80-\xbf]|â€")
_ROWS_TO_DETECT = 100


class Finding(NamedTuple):
    """Something wrong, or to look at, in one row."""

    place: Place
    level: Level
    kind: Fault | Doubt
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.level}: {self.kind}: {self.message}"


@dataclass(frozen=True)
class Against:
    """Evaluation data that training data must not hold, and how similar is too similar."""

    exact: EvaluationQuestions
    near: NearDuplicates | None

    @classmethod
    def read(cls, sources: Sequence[Path], similarity: float) -> "Against":
        near = NearDuplicates(sources, similarity) if sources else None
        return cls(EvaluationQuestions(sources), near)


def detect_format(source: Path) -> LintFormat:
    """What the first rows whose keys are those of some format are for.

    Raises:
        UserError: there are no such rows, or they are of a format that is not read.
    """
    rows = list(islice(read_rows_and_bad_rows(source, lambda r: r), _ROWS_TO_DETECT))
    for row in rows:
        if isinstance(row, Row) and (kind := _kind_of(row.value)):
            return kind
    for row in rows:
        if isinstance(row, BadRowError):
            raise UserError(f"no row of a known format; the first that cannot be read is {row}")
    first, names = rows[0], ", ".join(get_args(LintFormat))
    assert isinstance(first, Row)
    raise UserError(
        f"{first.place}: its format cannot be told from its keys, {shown_keys(first.value)}; there "
        "must be text, conversations, messages, instruction and output, chosen and rejected, or "
        f"prompt. Rename them, or name the format to `minimind lint --format`: {names}."
    )


def _kind_of(record: Record) -> LintFormat | None:
    if parse_preference.find(record) or not {"chosen", "rejected"}.isdisjoint(record):
        return "preference"
    if chat := parse_chat.find(record):
        if chat.name in ("agent", "rlaif"):
            return "prompts"
        return "reason" if TAG_PATTERN.search(str(record.get("conversations"))) else "chat"
    if parse_text.find(record):
        return "text"
    return "prompts" if "prompt" in record else None


def lint(
    source: Path,
    data_format: LintFormat,
    against: Against,
    tokenizer: ChatTokenizer | None,
    max_length: int | None,
    unread: UnreadKeys | None = None,
    formats: Counter[str] | None = None,
) -> Iterator[list[Finding]]:
    """What is found in each row of a source, as a stream; for most rows nothing.

    tokenizer: to look for characters it does not give back; None looks for none.
    max_length: tokens a row may have, as in ``encode.<name>.max_length``; None is any number.
    unread: gets the keys that the format does not read.
    formats: counts the rows of each format.

    Raises:
        UserError: the source is missing, has no rows, or a line without end.
    """
    assert max_length is None or tokenizer, "lengths are counted in tokens"
    checks = RowChecks(tokenizer, against.exact)
    parse = parse_problem if data_format == "prompts" else ENCODINGS[data_format].parse
    for batch in row_batches(read_rows_and_bad_rows(source, parse), 1):
        encoded: Sequence[Row[Any] | EncodedSample | BadRowError] = batch
        if tokenizer and max_length and data_format != "prompts":
            encoded = encode_rows(batch, tokenizer, data_format, max_length)
        for row, sample in zip(batch, encoded, strict=True):
            findings = []
            if isinstance(sample, DroppedRow):
                findings.append(Finding(sample.place, "warning", "length", sample.reason))
            elif isinstance(sample, BadRowError):
                findings.append(Finding(sample.place, "error", sample.fault, sample.reason))
            elif isinstance(sample, EncodedSample) and sample.is_truncated:
                message = f"longer than {max_length} tokens; its end will be cut off"
                findings.append(Finding(row.place, "warning", "truncated", message))
            if isinstance(row, Row):
                if unread:
                    unread.add(row)
                if formats is not None:
                    formats[row.format] += 1
                value, warned = row.value, []
                if data_format == "prompts":
                    problem = Problem.of_row(row)
                    value, warned = problem.chat, list(_gold_doubts(problem))
                warned += [*checks.warnings(row.place, value), *_doubts(value, data_format)]
                is_overlap = any(one.doubt == "overlap" for one in warned)
                if against.near and not is_overlap and (near := against.near.find(value)):
                    message = f"asks nearly what {near[0]} asks ({near[1]:.0%} the same)"
                    warned.append(Warned("near_overlap", f"{message}, which is for evaluation"))
                findings += [Finding(row.place, "warning", *one) for one in warned]
            yield findings


def _doubts(value: Any, data_format: LintFormat) -> Iterator[Warned]:
    """What can be doubted of a row without knowing any other."""
    if isinstance(value, Preference):
        yield from _turn_doubts([*value.prompt, *value.chosen], "chosen, ")
        # A rejected side may well have the tags wrong: that can be why.
        yield from _order_doubts([*value.prompt, *value.rejected], "rejected, ")
    elif data_format == "chat":
        yield from _turn_doubts(value, "")
    elif data_format == "reason":
        yield from _order_doubts(value, "")
    for text in texts(value):
        if damage := _DAMAGED_PATTERN.search(text):
            where = f"at character {damage.start() + 1}"
            shown = shown_characters(damage.group())
            yield Warned("damaged", f"{shown} {where} of a text looks like a wrong decoding")
        if control := _CONTROL_PATTERN.search(text):
            yield Warned("control", f"{control.group()} is no token there, but trained on as text")


def _gold_doubts(problem: Problem) -> Iterator[Warned]:
    """Whether the answer that a problem expects is right: alone, in its tags, as a sentence."""
    if problem.answer is None:
        return
    for said in (
        problem.answer,
        f"<think>.</think>\n<answer>{problem.answer}</answer>",
        problem.full,
    ):
        if said is not None and not problem.score(said).correct:
            yield Warned(
                "gold", f"{said[:80]!r} should be right, but answers no {problem.expected!r}"
            )


def _turn_doubts(messages: Sequence[Message], side: str) -> Iterator[Warned]:
    yield from _order_doubts(messages, side)
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            tags = TAG_PATTERN.findall(message["content"])
            if tags not in _MAY_BE_TAGS:
                yield Warned(
                    "tags", f"{side}turn {number} has the tags {' '.join(tags)}; some lack a pair"
                )


def _order_doubts(messages: Sequence[Message], side: str) -> Iterator[Warned]:
    before = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _MAY_FOLLOW[before]:
            allowed = " or ".join(_MAY_FOLLOW[before])
            where = f"after {before}" if before else "first"
            yield Warned("order", f"{side}turn {number} is {role}; {where} comes {allowed}")
            return
        before = role
    if before != "assistant":
        yield Warned("order", f"{side}the last turn is {before}; it is not trained on")
