"""What rows say, in the formats that people write them in: each row is told by its own keys.

Chats become messages as :mod:`minimind.chat.template` has them, with one key more: ``loss``, False
for an assistant's turn that is not trained on. Keys that a format does not name are not read, and
listed in each row.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from minimind.chat.template import Message, turns
from minimind.chat.tokenizer import TAGS
from minimind.datasets.sources import (
    MIX,
    Fault,
    FaultError,
    Place,
    Record,
    parse_json,
    read_raw_rows,
    shown,
)
from minimind.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
# What ShareGPT and OpenAI call them. A function_call is an assistant's turn that is nothing else.
_ROLE_OF = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "developer": "system",
}
_SHAREGPT_ROLES = ("system", "human", "gpt", "function_call", "observation")
PLACEHOLDER = "空"  # where MiniMind's prompts for reinforcement have a last turn
_TURN_KEYS = {
    *("role", "content", "from", "value", "reasoning_content", "tools", "tool_calls"),
    *("loss", "weight", "train"),
}
# Keys that may have lists of turns.
_LISTS = ("conversations", "messages", "prompt", "completion", "chosen", "rejected")

T = TypeVar("T")

TAG_PATTERN = re.compile("|".join(TAGS))
_REASONING_PATTERN = re.compile(
    r"\s*<think>(?P<thought>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL
)


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
    """What was made of one row of a source."""

    place: Place
    value: T
    num_bytes: int
    format: str = ""  # the name of its format
    unread: Sequence[str] = ()  # keys that the format does not read


@dataclass(frozen=True)
class Format(Generic[T]):
    """One way to write a row."""

    name: str
    keys: Set[str]  # a row that has all of them is written so
    parse: Callable[[Record], T]  # raises FaultError
    others: Sequence[str] = ()  # other keys that it reads
    tells: Callable[[Record], bool] = lambda record: True  # what else tells it
    is_read: bool = True  # False: `parse` says why not

    def unread(self, record: Record) -> list[str]:
        """Keys that are not read, each once; ``chosen.weight`` for one of a turn."""
        read = {*self.keys, *self.others} - {"prompt" if _has_its_prompt(record) else ""}
        names = [key for key in record if key not in read]
        for key in read.intersection(_LISTS):
            for turn in record[key] if isinstance(record.get(key), list) else ():
                keys = turn.keys() - _TURN_KEYS if isinstance(turn, dict) else ()
                names += [f"{key}.{name}" for name in keys]
        return sorted(set(names))


@dataclass(frozen=True)
class Formats(Generic[T]):
    """The formats that rows of one kind may have; the first that tells a row is its own."""

    formats: Sequence[Format[T]]

    def find(self, record: Record) -> Format[T] | None:
        for one in self.formats:
            if record.keys() >= one.keys and one.tells(record):
                return one
        return None

    def of(self, record: Record, name: str | None = None) -> Format[T]:
        """A row's format, or that of this name; raises FaultError if there is none."""
        if name is None and (found := self.find(record)):
            return found
        read = {one.name: one for one in self.formats if one.is_read}
        if name in read:
            return read[name]
        if name is not None:
            raise FaultError(f"{MIX} says the format {name!r}; allowed are {', '.join(read)}")
        needed = " or ".join(
            dict.fromkeys(" with ".join(sorted(one.keys)) for one in read.values())
        )
        found_keys = f"the keys found are {shown_keys(record)}"
        raise FaultError(f"{needed} is missing; {found_keys}: add it or rename one")

    def __call__(self, record: Record) -> T:
        """What a row says; raises FaultError."""
        return self.of(record).parse(record)


def read_rows(source: Path, parse: Callable[[Record], T]) -> Iterator[Row[T]]:
    """Every row of a source, as ``parse`` (one of the ``Formats`` below) makes it.

    Raises:
        UserError: the source is missing, a folder without files that are read, or a file without
            rows.
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
    for place, content, num_bytes, name in read_raw_rows(source):
        try:
            record = parse_json(content) if isinstance(content, bytes) else content
            if isinstance(record, FaultError):
                raise record
            if not isinstance(record, dict):
                raise FaultError(f"the row is {_kind(record)}; it must be a JSON object")
            if not isinstance(parse, Formats):
                yield Row(place, parse(record), num_bytes)
                continue
            its = parse.of(record, name)
            yield Row(place, its.parse(record), num_bytes, its.name, its.unread(record))
        except UserError as error:
            yield BadRowError(place, str(error), getattr(error, "fault", "schema"))


def read_texts(source: Path) -> Iterator[str]:
    """Texts of ``{"text"}`` rows, and each turn of chats; raises as :func:`read_rows` does."""
    for row in read_rows(source, Formats[Any]([*parse_text.formats, *parse_chat.formats])):
        yield from [row.value] if isinstance(row.value, str) else (t.text for t in turns(row.value))


def text_of(record: Record, key: str, where: str = "") -> str:
    """The text of a key; raises FaultError if there is none."""
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


def _text_if_any(record: Record, key: str, where: str = "") -> str:
    """A text, or "" where there is none, or a blank one."""
    value = record.get(key)
    is_blank = value is None or (isinstance(value, str) and not value.strip())
    return "" if is_blank else text_of(record, key, where)


def _get(record: Record, key: str, where: str = "") -> Any:
    if key not in record:
        found = f"the keys found are {shown_keys(record)}"
        raise FaultError(f"{where}{key} is missing; {found}: add it or rename one")
    return record[key]


def _parsed(record: Record, key: str, where: str = "") -> Any:
    """An object or a list, or what its JSON text says; None where there is none."""
    if not (value := record.get(key)):
        return None
    try:
        value = parse_json(value.encode()) if isinstance(value, str) and value.strip() else value
        json.dumps(value, ensure_ascii=False).encode()
    except FaultError as error:
        raise FaultError(f"{where}{key}: {error}", "json") from None
    except (TypeError, ValueError, RecursionError) as error:  # half a character, a date of Arrow's
        raise FaultError(f"{where}{key} is no JSON in UTF-8: {error}", "json") from None
    return value or None


def _objects(record: Record, key: str, where: str = "") -> list[Record]:
    value = _parsed(record, key, where) or []
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        what = "it must be a list of objects, or that as JSON text"
        raise FaultError(f"{where}{key} is {_kind(record[key])}; {what}")
    return value


def _calls(message: Record, key: str, where: str) -> list[Record]:
    """``{"name", "arguments": object}`` of each call; OpenAI's ids are not needed."""
    calls = []
    for call in _objects(message, key, where):
        function = call.get("function", call)
        function = function if isinstance(function, dict) else {}
        name = text_of(function, "name", f"{where}{key}: ")
        arguments = _parsed(function, "arguments", f"{where}{key}: ") or {}
        if not isinstance(arguments, dict):
            raise FaultError(f"{where}{key}: arguments is {_kind(arguments)}; it must be an object")
        calls.append({"name": name, "arguments": arguments})
    return calls


def _message(turn: Any, where: str, may_be_empty: bool = False) -> Message:
    if not isinstance(turn, dict):
        raise FaultError(f'{where} is {_kind(turn)}; it must be {{"role", "content"}}')
    where += ": "
    role_key, key = ("from", "value") if "from" in turn else ("role", "content")
    said = _get(turn, role_key, where)
    role = _ROLE_OF.get(said, said) if isinstance(said, str) else said
    if role not in ROLES:
        allowed = ", ".join(ROLES if role_key == "role" else _SHAREGPT_ROLES)
        raise FaultError(f"{where}{role_key} is {shown(said)}; allowed are {allowed}", "role")
    message: Record = {"role": role, "content": ""}
    if len(turn) > 2:
        message |= _beside_content(turn, role, where)
    if said == "function_call":
        return message | {"tool_calls": _calls(turn, key, where)}
    if isinstance(turn.get(key), list):  # OpenAI's parts
        parts = [text_of(part, "text", where) for part in _objects(turn, key, where)]
        turn = turn | {key: "".join(parts)}
    may_be_empty |= role == "tool" or "tool_calls" in message or "tools" in message
    message["content"] = (_text_if_any if may_be_empty else text_of)(turn, key, where)
    return message


def _beside_content(turn: Record, role: str, where: str) -> Record:
    """What a message may have beside its content, if it does."""
    found: Record = {
        "tools": _objects(turn, "tools", where),
        "tool_calls": _calls(turn, "tool_calls", where),
        "reasoning_content": _text_if_any(turn, "reasoning_content", where),
    }
    found = {name: value for name, value in found.items() if value}
    for name in found:
        if role != (only := "system" if name == "tools" else "assistant"):
            raise FaultError(f"{where}{name} is there, but role is {role!r}; it must be {only!r}")
    for name in ("loss", "weight", "train"):
        switch = turn.get(name)
        if switch not in (None, 0, 1):
            raise FaultError(f"{where}{name} is {_kind(switch)}; it must be 0 or 1, false or true")
        if switch in (0,) and role == "assistant":
            found["loss"] = False
    return found


def parse_messages(record: Record, key: str, may_end_empty: bool = False) -> list[Message]:
    """The messages in a row's list of turns, whatever their order; raises FaultError."""
    found = _get(record, key)
    if isinstance(found, str) and found.lstrip().startswith("["):
        found = _objects(record, key)
    if not isinstance(found, list):
        raise FaultError(f"{key} is {_kind(found)}; it must be a list of messages")
    last = len(found) if may_end_empty else 0
    return [_message(turn, f"{key}, turn {n}", n == last) for n, turn in enumerate(found, 1)]


def _with_head(record: Record, messages: list[Message]) -> list[Message]:
    """With the row's own system text and tools, as first message."""
    head = {"content": _text_if_any(record, "system"), "tools": _objects(record, "tools")}
    head = {key: value for key, value in head.items() if value}
    if not head:
        return messages
    first = dict(messages[0]) if messages and messages[0]["role"] == "system" else {}
    if twice := [key for key in head if first.get(key)]:
        raise FaultError(f"{' and '.join(twice)} of system stands twice, in a turn and beside it")
    rest = messages[1:] if first else messages
    return [{"role": "system", "content": ""} | first | head, *rest]


def _text_or_messages(record: Record, key: str, role: str) -> list[Message]:
    if isinstance(record.get(key), list):
        return parse_messages(record, key)
    return [{"role": role, "content": text_of(record, key)}]


def _require_chat(messages: list[Message], key: str) -> list[Message]:
    """The messages themselves, in an order that there can be, with something to learn from."""
    for number, message in enumerate(messages, 1):
        turn, role = f"{key}, turn {number}", message["role"]
        if role == "system" and number > 1:
            raise FaultError(f"{turn}: role is 'system'; only the first turn may be", "order")
        if role == "tool" and number == 1:
            raise FaultError(f"{turn}: role is 'tool'; a chat begins with system or user", "order")
    spoken = [message for message in messages if message["role"] == "assistant"]
    if not spoken:
        raise FaultError(f"{key} has no assistant turn; there must be one to learn from", "order")
    if not any(message.get("loss", True) for message in spoken):
        raise FaultError(
            f"{key} has no assistant turn whose loss is on; leave the row out", "order"
        )
    return messages


def _chat(key: str, record: Record) -> list[Message]:
    return _require_chat(_with_head(record, parse_messages(record, key)), key)


def parse_asked(record: Record) -> tuple[list[Message], str]:
    """The turns of a chat before its last, which answers them, and that; "" for a placeholder.

    A list of messages as the prompt, as TRL has it, is without an answer. Raises FaultError.
    """
    key = next(key for key in ("conversations", "messages", "prompt") if key in record)
    messages = _with_head(record, parse_messages(record, key, may_end_empty=key != "prompt"))
    if key == "prompt":
        last: Message = {"role": "assistant", "content": ""}
    else:
        last = messages.pop() if messages else {"role": "nobody"}
    if last["role"] != "assistant" or not messages:
        found = f"the last of {len(messages) + 1} turns is {last['role']}'s"
        raise FaultError(f"{found}; it must be an assistant turn that answers the one before")
    return messages, "" if last["content"] == PLACEHOLDER else last["content"]


def has_turns_as_prompt(record: Record) -> bool:
    return isinstance(record.get("prompt"), list)


def _alpaca(record: Record) -> list[Message]:
    messages: list[Message] = []
    history = record.get("history") or []
    for number, pair in enumerate(history if isinstance(history, list) else [history], 1):
        name = f"history, pair {number}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise FaultError(f"{name} is {_kind(pair)}; it must be [question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": text_of({name: text}, name)})
    asked = [text_of(record, "instruction"), _text_if_any(record, "input")]
    messages.append({"role": "user", "content": "\n".join(filter(None, asked))})
    messages.append({"role": "assistant", "content": text_of(record, "output")})
    return _with_head(record, messages)


def _prompt_completion(record: Record) -> list[Message]:
    messages = _text_or_messages(record, "prompt", "user")
    messages += _text_or_messages(record, "completion", "assistant")
    return _require_chat(_with_head(record, messages), "prompt with completion")


def _require_thoughts(parse: Callable[[Record], list[Message]], record: Record) -> list[Message]:
    messages = parse(record)
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant" or "reasoning_content" in message:
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


def _has_its_prompt(record: Record) -> bool:
    """Whether the sides of a pair are lists of turns that begin with the prompt."""
    match record.get("chosen"):
        case [{"role": "assistant"} | {"from": "assistant" | "gpt"}, *_]:
            return False
        case [*_]:
            return True
    return False


def _preference(record: Record) -> Preference:
    """The prompt of two lists is their shared beginning; they may differ before their last turn."""
    form = _get(record, "chosen")
    if isinstance(form, str):
        texts = [text_of(record, side) for side in _SIDES]
        if "prompt" in record:
            prompt = _text_or_messages(record, "prompt", "user")
        else:  # as in TRL, the texts begin with it; whole words of it
            same = takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
            shared = "".join(character for character, _ in same)
            length = max((n for n, c in enumerate(shared, 1) if c.isspace()), default=0)
            prompt = [{"role": "user", "content": texts[0][:length].strip()}] if length else []
            texts = [text[length:] for text in texts]
        answers: list[list[Message]] = [[{"role": "assistant", "content": t}] for t in texts]
    elif isinstance(form, list):
        prompt = []
        if "prompt" in record and not _has_its_prompt(record):
            prompt = _text_or_messages(record, "prompt", "user")
        answers = [parse_messages(record, side) for side in _SIDES]
    else:
        raise FaultError(f"chosen is {_kind(form)}; it must be a string or list of messages")
    chosen, rejected = (_with_head(record, [*prompt, *answer]) for answer in answers)
    if chosen == rejected:
        raise FaultError("chosen and rejected are identical; a pair must differ", "identical")
    pairs = zip(chosen, rejected, strict=False)
    num_shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if num_shared == 0:
        raise FaultError("chosen and rejected share no beginning; both must begin with the prompt")
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        _require_chat(messages, side)
        if not any(message["role"] == "assistant" for message in messages[num_shared:]):
            raise FaultError(
                f"{side} has no assistant turn after the {num_shared} turns that both sides share; "
                "there must be one to compare",
                "order",
            )
    return Preference(chosen[:num_shared], chosen[num_shared:], rejected[num_shared:])


def _sharegpt_preference(record: Record) -> Preference:
    """The sides are one turn each, as in LLaMA-Factory."""
    sides = {side: [record[side]] for side in _SIDES}
    return _preference(record | {"prompt": record["conversations"]} | sides)


def _refused(name: str, keys: Set[str], reason: str, **options: Any) -> Format[Any]:
    def refuse(record: Record) -> Any:
        raise FaultError(f"the row is {reason}")

    return Format(name, keys, refuse, is_read=False, **options)


def _is_from(record: Record) -> bool:
    turns = record["conversations"]
    return isinstance(turns, list) and any(isinstance(t, dict) and "from" in t for t in turns)


def _ends_open(record: Record) -> bool:
    match record["conversations"]:
        case [*_, {"content": content}]:
            return bool(content == PLACEHOLDER)
    return False


_HEAD, _SIDES = ("system", "tools"), ("chosen", "rejected")
_KTO = _refused(
    "kto",
    {"label"},
    "KTO's, half a pair with a label; no stage learns from these: write pairs, chosen and rejected",
    tells=lambda record: isinstance(record["label"], bool),
)
_FOR_PROMPTS = "of MiniMind's for reinforcement, without an answer; it is for data.prompts"

parse_text = Formats([Format("text", {"text"}, partial(text_of, key="text"))])
parse_chat = Formats(
    [
        _KTO,
        _refused("agent", {"conversations", "gt"}, _FOR_PROMPTS),
        _refused("rlaif", {"conversations"}, _FOR_PROMPTS, tells=_ends_open),
        Format("sharegpt", {"conversations"}, partial(_chat, "conversations"), _HEAD, _is_from),
        Format("minimind", {"conversations"}, partial(_chat, "conversations"), _HEAD),
        Format("openai", {"messages"}, partial(_chat, "messages"), _HEAD),
        Format("alpaca", {"instruction", "output"}, _alpaca, ("input", "history", *_HEAD)),
        Format("prompt-completion", {"prompt", "completion"}, _prompt_completion, _HEAD),
    ]
)
# An assistant's turn has its thought as `reasoning_content`, or is <think>T</think>
# <answer>A</answer>.
parse_reasoning = Formats(
    [replace(f, parse=partial(_require_thoughts, f.parse)) for f in parse_chat.formats]
)
parse_preference = Formats(
    [
        Format(
            "sharegpt-preference",
            {*_SIDES},
            _sharegpt_preference,
            ("conversations", *_HEAD),
            lambda r: isinstance(r["chosen"], dict) and "conversations" in r,
        ),
        Format("preference", {*_SIDES}, _preference, ("prompt", *_HEAD), lambda r: "prompt" in r),
        Format("implicit-preference", {*_SIDES}, _preference, _HEAD),
        _KTO,
    ]
)


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


def shown_keys(record: Record) -> str:
    """The first of an object's keys."""
    return ", ".join(map(shown, list(record)[:8])) or "none"
