"""Rows of the JSONL formats, read one at a time and checked.

A source is a file or a folder of ``*.jsonl`` shards, in it or in folders inside it, taken in the
order of their names. Files are UTF-8, one JSON object a line. Byte order marks, Windows line ends
and blank lines are accepted; keys that a format does not name are not read, and listed in each row.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from minimind.chat.template import Message
from minimind.chat.tokenizer import TAGS
from minimind.errors import UserError
from minimind.lineage.paths import unreadable

ROLES = ("system", "user", "assistant", "tool")

# A file without line ends must not be read into memory whole.
MAX_LINE_BYTES = 64 * 2**20

T = TypeVar("T")
Record = dict[str, Any]

Fault = Literal[
    "json", "encoding", "schema", "role", "order", "empty", "tags", "identical", "length"
]
"""Why a row cannot be used, in a word; docs/data.md has their meaning."""

TAG_PATTERN = re.compile("|".join(TAGS))
_REASONING_PATTERN = re.compile(
    r"\s*<think>(?P<thought>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL
)


class Place(NamedTuple):
    """Where a row stands; lines count from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{shown_path(self.file)}:{self.line}"


class FaultError(UserError):
    """What is wrong with a row, wherever it stands."""

    def __init__(self, reason: str, fault: Fault = "schema") -> None:
        super().__init__(reason)
        self.fault = fault


class BadRowError(UserError):
    """A row that cannot be used."""

    def __init__(self, place: Place, reason: str, fault: Fault = "schema") -> None:
        super().__init__(f"{place}: {reason}")
        self.place, self.reason, self.fault = place, reason, fault


class Preference(NamedTuple):
    """A pair of continuations of one prompt; what is compared are their assistant turns."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


class Row(NamedTuple, Generic[T]):
    """What a ``parse`` function below made of one line of a file."""

    place: Place
    value: T
    num_bytes: int
    unread: Sequence[str] = ()  # keys that `parse` does not read


def read_rows(source: Path, parse: Callable[[Record], T]) -> Iterator[Row[T]]:
    """Every row of a source, as ``parse`` (one of the functions below) makes it.

    Raises:
        UserError: the source is missing, a folder without shards, or a file without rows.
        BadRowError: at the first row that cannot be used.
    """
    for row in read_rows_and_bad_rows(source, parse):
        if isinstance(row, BadRowError):
            raise row
        yield row


def read_rows_and_bad_rows(
    source: Path, parse: Callable[[Record], T]
) -> Iterator[Row[T] | BadRowError]:
    """:func:`read_rows` for those who go on after a bad row: it is yielded, not raised."""
    for place, line in _read_lines(source):
        try:
            record = _parse_json(line)
            yield Row(place, parse(record), len(line), unread_keys(record, READ_KEYS.get(parse)))
        except UserError as error:
            yield BadRowError(place, str(error), getattr(error, "fault", "schema"))


def read_texts(source: Path) -> Iterator[str]:
    """Texts of ``{"text"}`` rows, and each content of chats; raises as :func:`read_rows` does."""

    def parse(record: Record) -> list[str]:
        if "text" in record:
            return [parse_text(record)]
        if "conversations" in record:
            return [message["content"] for message in parse_chat(record)]
        found = f"the keys found are {shown_keys(record)}"
        raise FaultError(f"it has neither text nor conversations, one of which it must; {found}")

    for row in read_rows(source, parse):
        yield from row.value


def _source_files(source: Path) -> list[Path]:
    """The file itself, or a folder's shards by name."""
    if source.is_dir():
        if shards := [file for file, why in _files_of(source) if not why]:
            return shards
        raise UserError(
            f"{shown_path(source)} is a folder without *.jsonl files; put the shards into it."
        )
    if why := unreadable(source):
        advice = "correct the path, or run the stage that writes it"
        raise UserError(f"{shown_path(source)} is {why}; {advice}.")
    return [source]


def unread_files(source: Path) -> list[str]:
    """What a folder has and nobody reads, with the reasons; hidden files are not meant to be."""
    files = _files_of(source) if source.is_dir() else []
    return [f"{shown_path(file)} ({why})" for file, why in files if why]


def _files_of(folder: Path) -> list[tuple[Path, str]]:
    """Its visible files with the reason why they are no shards: linked folders, which DVC does not
    look into either, and what stands for no file, too.
    """
    files = []
    for file in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        if not file.is_dir():
            why = "" if file.suffix.lower() == ".jsonl" else "no .jsonl file"
            files.append((file, unreadable(file) or why))
        elif file.is_symlink():
            files.append((file, "a linked folder; link its files, or copy it"))
    return files


def parse_text(record: Record, key: str = "text") -> str:
    """``{"text": ...}``"""
    return _text(record, key)


def parse_chat(record: Record) -> list[Message]:
    """``{"conversations": [{"role", "content"}, ...]}`` with at least one assistant turn."""
    return _messages(record, "conversations")


def parse_reasoning(record: Record) -> list[Message]:
    """A chat whose every assistant turn is ``<think>T</think> <answer>A</answer>``."""
    messages = parse_chat(record)
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        tags = TAG_PATTERN.findall(message["content"])
        if tags != list(TAGS):
            found, needed = " ".join(tags) or "none", " ".join(TAGS)
            reason = f"turn {number} has the tags {found}; it must have {needed}, each once"
            raise FaultError(reason, "tags")
        match = _REASONING_PATTERN.fullmatch(message["content"])
        if not match:
            form = "<think>...</think> <answer>...</answer>"
            reason = f"turn {number} has text outside its tags; it must be {form}"
            raise FaultError(reason, "tags")
        for name, text in match.groupdict().items():
            if not text.strip():
                reason = f"turn {number} has an empty {name}; write one between its tags"
                raise FaultError(reason, "empty")
    return messages


def parse_preference(record: Record) -> Preference:
    """``{"prompt", "chosen", "rejected"}`` of strings, or two lists of messages.

    The prompt of two lists is their shared beginning; they may differ before their last turn.
    """
    form = _get(record, "chosen")
    if isinstance(form, str):
        prompt: Message = {"role": "user", "content": _text(record, "prompt")}
        chosen, rejected = (
            [prompt, {"role": "assistant", "content": _text(record, side)}]
            for side in ("chosen", "rejected")
        )
    elif not isinstance(form, list):
        raise FaultError(f"chosen is {_kind(form)}; it must be a string or list of messages")
    elif isinstance(record.get("prompt"), list):
        advice = "put its messages at the beginning of both chosen and rejected"
        raise FaultError(f"prompt is a list; {advice}")
    else:
        chosen, rejected = _messages(record, "chosen"), _messages(record, "rejected")
    if chosen == rejected:
        raise FaultError("chosen and rejected are identical; a pair must differ", "identical")
    pairs = zip(chosen, rejected, strict=False)
    num_shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if num_shared == 0:
        raise FaultError("chosen and rejected share no beginning; both must begin with the prompt")
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        if not any(message["role"] == "assistant" for message in messages[num_shared:]):
            raise FaultError(
                f"{side} has no assistant turn after the {num_shared} turns that both sides share; "
                "there must be one to compare",
                "order",
            )
    return Preference(chosen[:num_shared], chosen[num_shared:], rejected[num_shared:])


TURNS = ("conversations", "prompt", "chosen", "rejected")  # keys that may have lists of turns
# What is read of a row, by who reads it; of each turn in its lists, role and content.
READ_KEYS: dict[Callable[[Record], Any], Sequence[str]] = {
    parse_text: ["text"],
    parse_chat: ["conversations"],
    parse_reasoning: ["conversations"],
    parse_preference: ["prompt", "chosen", "rejected"],
}


def unread_keys(record: Record, read: Sequence[str] | None) -> list[str]:
    """Keys beside those that are read, each once; ``chosen.weight`` for one of a turn."""
    if read is None:
        return []
    in_turns = [key for key in read if key in TURNS and isinstance(record.get(key), list)]
    turns_of = {key: record[key] for key in in_turns}
    # Two lists begin with their prompt: a text beside them is not looked at.
    names = [key for key in record if key not in read or (key == "prompt" and "chosen" in turns_of)]
    for key, turns in turns_of.items():
        names += [f"{key}.{name}" for turn in turns for name in turn.keys() - {"role", "content"}]
    return sorted(set(names))


def _read_lines(source: Path) -> Iterator[tuple[Place, bytes]]:
    for path in _source_files(source):
        has_rows = False
        with path.open("rb") as file:
            lines = iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")
            for number, line in enumerate(lines, 1):
                place = Place(path, number)
                if len(line) > MAX_LINE_BYTES:
                    limit = f"{MAX_LINE_BYTES // 2**20} MiB"
                    raise UserError(f"{place}: longer than {limit}; write one row a line.")
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    has_rows = True
                    yield place, line
        if not has_rows:
            raise UserError(f"{shown_path(path)} has no rows; it must hold one JSON object a line.")


def _parse_json(line: bytes) -> Record:
    try:
        record = json.loads(line.decode("utf-8").rstrip("\r\n"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        byte = f"0x{line[error.start]:02x} at byte {error.start + 1}"
        raise FaultError(f"not UTF-8 ({byte}); save the file as UTF-8", "encoding") from None
    except json.JSONDecodeError as error:
        reason = f"broken JSON at column {error.colno}: {error.msg}; write one whole object a line"
        raise FaultError(reason, "json") from None
    except FaultError:
        raise
    except (ValueError, RecursionError) as error:
        what = "brackets too deep" if isinstance(error, RecursionError) else "a number too long"
        raise FaultError(f"JSON that cannot be read: {what}; shorten it", "json") from None
    if not isinstance(record, dict):
        raise FaultError(f"the row is {_kind(record)}; it must be a JSON object")
    return record


def _object(pairs: list[tuple[str, Any]]) -> Record:
    """A JSON object in which no key stands twice: Python would silently take the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise FaultError(f"the key {shown(twice)} stands there twice; leave one out", "json")
    return record


def _messages(record: Record, key: str) -> list[Message]:
    found = _get(record, key)
    if not isinstance(found, list):
        raise FaultError(f"{key} is {_kind(found)}; it must be a list of messages")
    messages: list[Message] = []
    for number, message in enumerate(found, 1):
        turn = f"{key}, turn {number}"
        if not isinstance(message, dict):
            raise FaultError(f'{turn} is {_kind(message)}; it must be {{"role", "content"}}')
        role = _get(message, "role", f"{turn}: ")
        if role not in ROLES:
            allowed = ", ".join(ROLES)
            raise FaultError(f"{turn}: role is {shown(role)}; allowed are {allowed}", "role")
        if role == "system" and number > 1:
            raise FaultError(f"{turn}: role is 'system'; only the first turn may be", "order")
        if role == "tool" and number == 1:
            raise FaultError(f"{turn}: role is 'tool'; a chat begins with system or user", "order")
        messages.append({"role": role, "content": _text(message, "content", f"{turn}: ")})
    if not any(message["role"] == "assistant" for message in messages):
        raise FaultError(f"{key} has no assistant turn; there must be one to learn from", "order")
    return messages


def _text(record: Record, key: str, where: str = "") -> str:
    value = _get(record, key, where)
    if not isinstance(value, str):
        raise FaultError(f"{where}{key} is {_kind(value)}; it must be a string")
    if not value or value.isspace():
        raise FaultError(f"{where}{key} is empty; it must hold text", "empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        reason = f"{where}{key} has half a character ({half}); write both halves"
        raise FaultError(reason, "encoding") from None
    return value


def _get(record: Record, key: str, where: str = "") -> Any:
    if key not in record:
        found = f"the keys found are {shown_keys(record)}"
        raise FaultError(f"{where}{key} is missing; {found}: add it or rename one")
    return record[key]


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() | float():
            return f"the number {shown(value)}"
        case str():
            return f"the string {shown(value)}"
        case list():
            return "a list"
        case _:
            return "an object"


def shown_path(path: Path) -> str:
    """A path on one line, escaped if it holds line ends or other bytes that no terminal shows."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def shown_keys(record: Record) -> str:
    """The first of an object's keys."""
    return ", ".join(map(shown, list(record)[:8])) or "none"


def shown(value: Any) -> str:
    """A value in at most 40 printable characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
