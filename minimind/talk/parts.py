"""What a model's output consists of: thoughts, answers, calls of tools and their results."""

import re
from typing import Literal, NamedTuple

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
