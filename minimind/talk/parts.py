"""What a model's output consists of: thoughts, answers, calls of tools and their results."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

Kind = Literal["thought", "answer", "call", "result"]
_TAG = re.compile("(</?(?:think|answer|tool_call)>)")
_OPENED: dict[str, Kind] = {"<think>": "thought", "<tool_call>": "call"}


class Part(NamedTuple):
    """A part of an output, without tags."""

    kind: Kind
    text: str


def parts_of(output: str) -> list[Part]:
    """The parts of an assistant's output, whole or cut off; none is empty."""
    parts: list[Part] = []
    kind: Kind = "answer"
    for number, piece in enumerate(_TAG.split(output)):
        if number % 2:
            kind = _OPENED.get(piece, "answer")
            if piece == "</think>":  # some prompts open the thought themselves
                parts = [Part("thought", part.text) for part in parts]
        elif text := piece.strip():
            parts.append(Part(kind, text))
    return parts


def text_of(parts: list[Part], kind: Kind) -> str:
    """All parts of a kind, a line or more each."""
    return "\n".join(part.text for part in parts if part.kind == kind)


def answer_call(call: str, tools: Mapping[str, Callable[..., Any]]) -> str:
    """What a tool says to a call, ``{"name": ..., "arguments": {...}}``; or what is wrong with it.

    It is told to the model, which may then call otherwise: nothing is raised.
    """
    try:
        said = json.loads(call)
        name, arguments = said["name"], said.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        tool = tools.get(name)
        result = tool(**arguments) if tool else {"error": f"no tool {name!r}: {', '.join(tools)}"}
    except Exception as error:  # of the call or the tool
        result = {"error": f"{type(error).__name__}: {error}"}
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
