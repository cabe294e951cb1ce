"""Calls of tools in what an assistant says."""

import json
import re
from typing import Any, NamedTuple

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class Call(NamedTuple):
    """Of a tool by its name, "" for a call that cannot be read."""

    name: str
    arguments: dict[str, Any]


def calls_in(output: str) -> list[Call]:
    """The calls of a turn, in order."""
    return [_call_of(text) for text in _CALL.findall(output)]


def _call_of(text: str) -> Call:
    try:
        said = json.loads(text)
        arguments = said.get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if isinstance(said["name"], str) and isinstance(arguments, dict):
            return Call(said["name"], arguments)
    except (ValueError, KeyError, AttributeError, RecursionError):
        pass
    return Call("", {})
