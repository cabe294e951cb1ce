"""Calls of the built-in tools, and the answer that follows.

What is expected is what a right output is without what tools say: its calls in their tags, then
what the answer must say, a number, a time or some words. Without calls, none may be made.
"""

import json
import re
from collections.abc import Mapping, Sequence

from minimind.chat.answers import is_number, normalise
from minimind.chat.calls import Call, calls_in
from minimind.mini_world.tools import SKIES, run_tool
from minimind.tasks.exact import TASK as EXACT
from minimind.tasks.task import Score, Task

_ASIDE = re.compile(r"<think>.*?</think>|</?answer>", re.DOTALL)
_TAG = re.compile("</tool_(?:call|response)>")
# Of what is no number, guesses: "sunny or rainy".
_RIVALS = re.compile("|".join([r"\d+:\d+", *(name for names in SKIES for name in names)]))


class ToolUse(Task):
    """Right is an answer that says what is expected, and nothing else of its kind."""

    def score(self, expected: str, output: str) -> Score:
        wanted, said = _answer_of(expected), _answer_of(output)
        if is_number(wanted):
            return EXACT.score(normalise(wanted), said)
        texts = [normalise(text).casefold() for text in (wanted, said)]
        guesses = [{*_RIVALS.findall(text)} for text in texts]
        return Score(normalise(said) or None, texts[0] in texts[1] and guesses[0] == guesses[1])

    def parts(self, expected: str, output: str) -> Mapping[str, bool]:
        """Whether the right tools were called, and with the right arguments."""
        wanted, made = _calls_of(expected), _calls_of(output)
        return {
            "tool_choice": [call.name for call in wanted] == [call.name for call in made],
            "calls": [*map(_meaning, wanted)] == [*map(_meaning, made)],
        }

    def respond(self, output: str) -> Sequence[str]:
        """What the tools say to calls that an output ends with."""
        return [] if _answer_of(output) else [run_tool(*call) for call in _calls_of(output)]

    def fault(self, expected: str) -> str | None:
        are_read = all(call.name for call in _calls_of(expected))
        return None if are_read and _answer_of(expected) else "it must be calls, then an answer"


def _calls_of(output: str) -> list[Call]:
    return calls_in(_ASIDE.sub("", output))


def _answer_of(output: str) -> str:
    """What is said behind all calls and what tools said to them."""
    return _TAG.split(_ASIDE.sub("", output))[-1].strip()


def _meaning(call: Call) -> str:
    """Equal for calls that mean the same: 2+3 and 3 + 2, 2 and 2.0."""
    said = {key: normalise(str(value)) for key, value in sorted(call.arguments.items())}
    if call.name == "calculator":
        sum_ = said.get("expression", "").replace(" ", "")
        said["expression"] = f"{run_tool(*call)} of {''.join(sorted(sum_))}"
    return f"{call.name} {json.dumps(said)}"


TASK = ToolUse()
