"""What an assistant has said so far, in the parts that OpenAI's API has: the template backwards."""

import json
from collections.abc import Sequence
from typing import NamedTuple

CALL, END_CALL = "<tool_call>", "</tool_call>"
THINK, END_THINK = "<think>", "</think>"


class Call(NamedTuple):
    """A tool that is called: its name, and its arguments as JSON."""

    name: str
    arguments: str


class Said(NamedTuple):
    """Parts of a turn; each begins with what it was before, while the turn grows."""

    reasoning: str
    content: str
    calls: list[Call]


def parts_of(text: str, is_whole: bool = True, stops: Sequence[str] = ()) -> Said:
    """Thought, answer and calls in a turn. A call that is no JSON is a part of the answer.

    Until it is whole, what may be the beginning of a tag or a stop string is left out at its end.
    """
    if not is_whole:
        text = text[: len(text) - _num_open(text, (CALL, END_CALL, THINK, END_THINK, *stops))]
    reasoning = ""
    if text.lstrip().startswith(THINK):
        reasoning, _, text = text.lstrip().removeprefix(THINK).partition(END_THINK)
    first, *others = text.split(CALL)
    content, calls = first, list[Call]()
    for other in others:
        said, tag, after = other.partition(END_CALL)
        if tag and (call := _call(said)):
            calls.append(call)
            content += after
        elif tag or is_whole:
            content += CALL + other
    return Said(reasoning.strip(), content.strip(), calls)


def _num_open(text: str, words: Sequence[str]) -> int:
    """Characters at the end of a text that one of some words may begin with."""
    most = max(map(len, words)) - 1
    ends = (n for n in range(min(most, len(text)), 0, -1))
    return next((n for n in ends if any(word.startswith(text[-n:]) for word in words)), 0)


def _call(text: str) -> Call | None:
    try:
        said = json.loads(text)
        name, arguments = said["name"], said.get("arguments") or {}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(name, arguments)
