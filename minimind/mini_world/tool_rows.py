"""Chats in which the built-in tools are called, and problems that call for them, from a seed.

A problem is a tool and the arguments that it should be called with, in no language. A share of
them, by a hash, is held out: asked in evaluation, and in no training chat in either language.
In some chats the tool that is called for is not there, and the answer says so.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, PositiveInt

from minimind.files import replacing
from minimind.mini_world.problems import hash_bucket
from minimind.mini_world.tools import CITIES, DAYS, SPECS, UNITS, run_tool
from minimind.params import Section, Seed

LARGEST = {"+": 999, "-": 999, "*": 99}
LARGEST_AMOUNT = 99  # of the larger unit
NO_TOOL = ("I have no tool for that.", "没有能用的工具。")
UNIT_NAMES = {
    **{"cm": ("centimetres", "厘米"), "m": ("metres", "米"), "km": ("kilometres", "千米")},
    **{"g": ("grams", "克"), "kg": ("kilograms", "千克")},
    **{"s": ("seconds", "秒"), "min": ("minutes", "分钟"), "h": ("hours", "小时")},
    **{"ml": ("millilitres", "毫升"), "l": ("litres", "升")},
}
OPERATIONS = {"+": ("plus", "加"), "-": ("minus", "减"), "*": ("times", "乘以")}
# By tool, in English and in Chinese; weather is asked about its sky or its warmth.
QUESTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "calculator": (
        ("What is {a} {word} {b}?", "Work out {a} {word} {b}.", "How much is {a}{op}{b}?"),
        ("{a}{word}{b}等于多少？", "请算一下{a}{word}{b}。", "{a}{op}{b}是多少？"),
    ),
    "clock": (
        (
            "It is {time} in {here}. What time is it in {there}?",
            "What time is it in {there} when it is {time} in {here}?",
        ),
        ("{here}现在是{time}，{there}是几点？", "{here}{time}的时候，{there}几点？"),
    ),
    "convert": (
        ("How many {to} are {value} {unit}?", "Convert {value} {unit} to {to}."),
        ("{value}{unit}是多少{to}？", "把{value}{unit}换算成{to}。"),
    ),
    "sky": (
        ("What will the weather be in {city} on {day}?", "Will it be sunny in {city} on {day}?"),
        ("{city}{day}天气怎么样？", "{day}{city}是什么天气？"),
    ),
    "celsius": (
        ("How warm will it be in {city} on {day}?", "How many degrees in {city} on {day}?"),
        ("{city}{day}多少度？", "{day}{city}的气温是多少？"),
    ),
}
ANSWERS = {
    "calculator": ("It is {said}.", "结果是{said}。"),
    "clock": ("It is {said} in {there}.", "{there}是{said}。"),
    "convert": ("That is {said} {to}.", "是{said}{to}。"),
    "sky": ("It will be {said}.", "天气{said}。"),
    "celsius": ("It will be {said} degrees.", "气温是{said}度。"),
}
# Twenty problems in other words than the chats, a line each: question, tool, arguments, and what
# the answer must say. All tools are there.
BY_HAND = Path(__file__).with_name("by_hand.json")


class ToolWorldConfig(Section):
    """The `tool_world` section."""

    seed: Seed  # of the training chats
    held_out_seed: Seed = 1
    held_out_percent: int = Field(10, ge=1, le=50)
    num_sft: PositiveInt = 6000
    num_eval: PositiveInt = 400
    missing_share: float = Field(0.1, ge=0, le=1)  # of chats without the tool that is called for
    max_tools: int = Field(len(SPECS), ge=1, le=len(SPECS))  # in a chat


class Asked(NamedTuple):
    """A problem in one language, and how it is to be solved."""

    key: str  # of the problem
    question: str
    tool: str
    arguments: dict[str, Any]
    said: str  # by the tool, and asked for
    answer: str  # a sentence

    @property
    def call(self) -> dict[str, Any]:
        return {"name": self.tool, "arguments": self.arguments}


def write_tool_world(directory: Path, config: ToolWorldConfig) -> dict[str, int]:
    """Write ``sft.jsonl`` and ``eval.jsonl``; returns the number of rows of each."""
    rows = {
        "sft": [*_chats(random.Random(f"{config.seed}/tools"), config)],
        "eval": [*_problems(random.Random(f"{config.held_out_seed}/tools/eval"), config)],
    }
    with replacing(directory) as partial:
        partial.mkdir()
        for name, written in rows.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in written]
            (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    return {name: len(written) for name, written in rows.items()}


def _chats(rng: random.Random, config: ToolWorldConfig) -> Iterator[dict[str, Any]]:
    """As MiniMind 3 has them: lists are JSON text."""
    for index in range(config.num_sft):
        asked = draw(rng, index % 2, config.held_out_percent, held_out=False)
        tools, is_there = _offered(rng, asked.tool, config)
        system = {"role": "system", "content": "", "tools": _json(tools)}
        turns = [system, {"role": "user", "content": asked.question}]
        if is_there:
            calls = _json([asked.call])
            turns.append({"role": "assistant", "content": "", "tool_calls": calls})
            turns.append({"role": "tool", "content": run_tool(asked.tool, asked.arguments)})
        answer = asked.answer if is_there else NO_TOOL[index % 2]
        yield {"conversations": [*turns, {"role": "assistant", "content": answer}]}


def _problems(rng: random.Random, config: ToolWorldConfig) -> Iterator[dict[str, Any]]:
    """Held-out problems, and those written by hand."""
    for index in range(config.num_eval):
        asked = draw(rng, index % 2, config.held_out_percent, held_out=True)
        tools, is_there = _offered(rng, asked.tool, config)
        gold = _gold(asked.call, asked.said) if is_there else NO_TOOL[index % 2]
        row = {"id": f"held-out-{index:04}", "problem": asked.key, "task": "held_out"}
        yield row | _problem(asked.question, tools, gold)
    by_hand = json.loads(BY_HAND.read_text(encoding="utf-8"))
    for index, (question, tool, arguments, said) in enumerate(by_hand):
        gold = _gold({"name": tool, "arguments": arguments}, said)
        row = {"id": f"by-hand-{index:02}", "task": "by_hand"}
        yield row | _problem(question, [*SPECS.values()], gold)


def _problem(question: str, tools: list[Any], gold: str) -> dict[str, Any]:
    """As MiniMind 3 has prompts of agents: the last turn is empty."""
    turns = [
        {"role": "system", "content": "", "tools": _json(tools)},
        {"role": "user", "content": question},
        {"role": "assistant", "content": ""},
    ]
    return {"conversations": turns, "answer": gold, "scoring": "tool_use"}


def draw(rng: random.Random, language: int, held_out_percent: int, held_out: bool) -> Asked:
    """A problem that is held out or one that is not, told in English (0) or Chinese (1)."""
    ask = _DRAWN[rng.choice([*_DRAWN])]
    while True:
        asked = ask(rng, language)
        if (hash_bucket(asked.key) < held_out_percent) == held_out:
            return asked


def _calculator(rng: random.Random, language: int) -> Asked:
    op = rng.choice([*LARGEST])
    a, b = (rng.randint(2, LARGEST[op]) for _ in range(2))
    a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
    key = f"{min(a, b)}{op}{max(a, b)}"
    words = {"a": a, "b": b, "op": op, "word": OPERATIONS[op][language]}
    return _tell(rng, language, key, "calculator", {"expression": f"{a}{op}{b}"}, words)


def _clock(rng: random.Random, language: int) -> Asked:
    here, there = rng.sample(CITIES, 2)
    time = f"{rng.randrange(24):02}:{rng.randrange(0, 60, 5):02}"
    arguments = {"time": time, "from": here.names[language], "to": there.names[language]}
    words = {"time": time, "here": here.names[language], "there": there.names[language]}
    key = f"{time} {here.names[0]} {there.names[0]}"
    return _tell(rng, language, key, "clock", arguments, words)


def _convert(rng: random.Random, language: int) -> Asked:
    kind = rng.choice(UNITS)
    small, large = sorted(rng.sample([*kind], 2), key=lambda unit: kind[unit])
    amount = rng.randint(2, LARGEST_AMOUNT)
    in_small = amount * kind[large] // kind[small]
    value, unit, to = rng.choice([(amount, large, small), (in_small, small, large)])
    names = {"unit": UNIT_NAMES[unit][language], "to": UNIT_NAMES[to][language]}
    arguments = {"value": value, "from": unit, "to": to}
    return _tell(
        rng, language, f"{value} {unit} {to}", "convert", arguments, {"value": value, **names}
    )


def _weather(rng: random.Random, language: int) -> Asked:
    city, day = rng.choice(CITIES).names, rng.choice(DAYS)
    about = rng.choice(["sky", "celsius"])
    words = {"city": city[language], "day": day[language]}
    return _tell(rng, language, f"{city[0]} {day[0]}", "weather", words, words, about)


_DRAWN = {"calculator": _calculator, "clock": _clock, "convert": _convert, "weather": _weather}


def _tell(
    rng: random.Random,
    language: int,
    key: str,
    tool: str,
    arguments: dict[str, Any],
    words: dict[str, Any],
    about: str = "",
) -> Asked:
    """about: what is asked of several things that the tool says."""
    said = run_tool(tool, arguments)
    said = str(json.loads(said)[about]) if about else said
    question = rng.choice(QUESTIONS[about or tool][language]).format(**words)
    answer = ANSWERS[about or tool][language].format(said=said, **words)
    return Asked(f"{tool} {key}", question, tool, arguments, said, answer)


def _offered(
    rng: random.Random, tool: str, config: ToolWorldConfig
) -> tuple[list[dict[str, Any]], bool]:
    """Tools in any order, and whether the one that is called for is among them."""
    others = rng.sample([name for name in SPECS if name != tool], len(SPECS) - 1)
    is_there = rng.random() >= config.missing_share
    names = [tool, *others] if is_there else others
    names = names[: rng.randint(1, config.max_tools)]
    rng.shuffle(names)
    return [SPECS[name] for name in names], is_there


def _gold(call: dict[str, Any], said: str) -> str:
    """What `tool_use` expects of a right output: its calls, and what its answer says."""
    return f"<tool_call>\n{_json(call)}\n</tool_call>\n{said}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
