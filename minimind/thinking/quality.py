"""How good thoughts are, on prompts whose answers nobody needs to know."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from statistics import fmean

from minimind.chat.answers import find_answer, first_thought, tagged_answer, thought_of
from minimind.metrics import Number
from minimind.params import UserPath
from minimind.tasks.problem import Problem
from minimind.thinking.completions import Completion, CompletionConfig

# 3+4=7 and 2*3+1=7, also 3+4=7-2=5 (two steps, the first of them wrong). Whatever has brackets
# or letters in it is not understood and so is no step.
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}+|[0-9]{1,30}+)(?![0-9])(?:\.[0-9]{1,30}+)?"
_TERM = rf"-?{_NUMBER}"
_SIDE = rf"{_TERM}(?:[-+*/]{_TERM})*+"
_EQUATION = re.compile(rf"(?<![0-9A-Za-z_.()=*/+-]){_SIDE}(?:={_SIDE})++(?![0-9A-Za-z_()*/+=])")
_SIGNS = str.maketrans("×✕∙·÷−–＋＝", "****/--+=")
_SPACED_SIGN = re.compile(r"(?<=[0-9)])[ \t]*([-+*/=])[ \t]*")


class ThinkingConfig(CompletionConfig):
    """The `thinking` section."""

    init: UserPath  # the path of the checkpoint that thinks


@dataclass(frozen=True)
class Equation:
    """An equation of a thought."""

    text: str
    result: Fraction | None  # what it says to come out; None if that divides by zero
    right: bool


@dataclass(frozen=True)
class Thinking:
    """One prompt, what was said to it, and what is in that."""

    prompt: str
    output: str
    thinking: str  # the first thought; empty if there is none
    answer: str  # empty if there is none, or several
    has_thinking: bool
    has_answer: bool
    finished: bool
    complete: bool  # one <think>..</think> and, after it, one <answer>..</answer>, finished
    thinking_tokens: int
    steps: int  # equations in the thought
    right_steps: int
    consistent: bool  # whether the answer is what comes out of the last step


def find_equations(thought: str) -> list[Equation]:
    """The equations of a thought, each checked exactly."""
    text = _SPACED_SIGN.sub(r"\1", thought.translate(_SIGNS))
    steps = []
    for match in _EQUATION.finditer(text):
        for left, right in pairwise(match.group().split("=")):
            if re.search(r"(?<=[0-9])[-+*/]", left):  # 7=7 computes nothing
                result = _value(right)
                is_right = result is not None and _value(left) == result
                steps.append(Equation(f"{left}={right}", result, is_right))
    return steps


def _value(side: str) -> Fraction | None:
    """What an expression without brackets comes to; None where it divides by zero."""
    total = Fraction(0)
    for sign, product in re.findall(rf"(^|[-+])({_TERM}(?:[*/]{_TERM})*)", side):
        value = Fraction(1)
        for operator, term in re.findall(rf"(^|[*/])({_TERM})", product):
            number = Fraction(term.replace(",", ""))
            if operator == "/" and number == 0:
                return None
            value = value / number if operator == "/" else value * number
        total += -value if sign == "-" else value
    return total


def assess(prompt: Problem, completion: Completion, count_tokens: Callable[[str], int]) -> Thinking:
    """Take one completion apart."""
    text, finished = completion
    thinking, answer = first_thought(text), tagged_answer(text)
    thought = thinking or ""
    steps = find_equations(thought)
    found = find_answer(text) if answer is not None else None
    return Thinking(
        prompt=prompt.prompt,
        output=text,
        thinking=thought.strip(),
        answer=(answer or "").strip(),
        has_thinking=thinking is not None,
        has_answer=answer is not None,
        finished=finished,
        complete=finished and thought_of(text) is not None,
        thinking_tokens=count_tokens(thought),
        steps=len(steps),
        right_steps=sum(step.right for step in steps),
        consistent=bool(steps) and found is not None and _same(found.value, steps[-1].result),
    )


def _same(answer: str, result: Fraction | None) -> bool:
    try:
        return Fraction(answer) == result
    except ValueError:
        return False


def metrics(assessed: Sequence[Thinking]) -> dict[str, Number]:
    """Shares from 0 to 1 of all prompts, where nothing else is said.

    thinking_tokens: mean length of the thoughts, 0 if there are none
    steps_right: of all steps of all thoughts, 0 if there are none
    """
    lengths = [a.thinking_tokens for a in assessed if a.has_thinking]
    num_steps = sum(a.steps for a in assessed)
    return {
        "prompts": len(assessed),
        "has_thinking": fmean(a.has_thinking for a in assessed),
        "has_answer": fmean(a.has_answer for a in assessed),
        "complete": fmean(a.complete for a in assessed),
        "thinking_tokens": fmean(lengths or [0]),
        "steps": num_steps / len(assessed),
        "steps_right": sum(a.right_steps for a in assessed) / num_steps if num_steps else 0.0,
        "consistent": fmean(a.consistent for a in assessed),
    }
