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
_LAST_TAG = re.compile(r".*</tool_(?:call|response)>", re.DOTALL)
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
        both = [_calls_of(text) for text in (expected, output)]
        names = [
            [call.name if isinstance(call, Call) else None for call in calls] for calls in both
        ]
        meant = [[_meaning(call) for call in calls] for calls in both]
        return {"tool_choice": names[0] == names[1], "calls": meant[0] == meant[1]}

    def respond(self, output: str) -> Sequence[str]:
        """What the tools say to calls that an output ends with."""
        if _answer_of(output):
            return []
        return [
            run_tool(*call) if isinstance(call, Call) else "error: no JSON of name and arguments"
            for call in _calls_of(output)
        ]

    def fault(self, expected: str) -> str | None:
        are_read = all(isinstance(call, Call) for call in _calls_of(expected))
        return None if are_read and _answer_of(expected) else "it must be calls, then an answer"


def _calls_of(output: str) -> list[Call | str]:
    return calls_in(_ASIDE.sub("", output))


def _answer_of(output: str) -> str:
    """What is said behind all calls and what tools said to them."""
    return _LAST_TAG.sub("", _ASIDE.sub("", output)).strip()


def _meaning(call: Call | str) -> str:
    """Equal for calls that mean the same: 2+3 and 3 + 2, 2 and 2.0."""
    if isinstance(call, str):
        return call
    said = {key: normalise(str(value)) for key, value in sorted(call.arguments.items())}
    if call.name == "calculator":
        sum_ = said.get("expression", "").replace(" ", "")
        said["expression"] = f"{run_tool(*call)} of {''.join(sorted(sum_))}"
    return f"{call.name} {json.dumps(said)}"


TASK = ToolUse()
