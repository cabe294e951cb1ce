"""Tools that a model can learn to call: a calculator, a clock, a unit converter, a weather table.

What each says depends on its arguments alone: so it can be checked, and is the same on any day.
Names of cities, days and units may be English or Chinese.
"""

import ast
import json
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from minimind.chat.numbers import written
from minimind.mini_world.problems import hash_bucket

LONGEST_EXPRESSION = 100  # characters


class City(NamedTuple):
    """A place, and its standard time in minutes from that of London."""

    names: tuple[str, str]  # English, Chinese
    offset: int


CITIES = tuple(
    City((english, chinese), round(60 * hours))
    for english, chinese, hours in (
        *(("London", "伦敦", 0), ("Paris", "巴黎", 1), ("Berlin", "柏林", 1), ("Rome", "罗马", 1)),
        *(("Oslo", "奥斯陆", 1), ("Athens", "雅典", 2), ("Cairo", "开罗", 2), ("Kyiv", "基辅", 2)),
        *(("Moscow", "莫斯科", 3), ("Nairobi", "内罗毕", 3), ("Dubai", "迪拜", 4)),
        *(("Karachi", "卡拉奇", 5), ("Delhi", "德里", 5.5), ("Dhaka", "达卡", 6)),
        *(("Bangkok", "曼谷", 7), ("Hanoi", "河内", 7), ("Beijing", "北京", 8)),
        *(("Shanghai", "上海", 8), ("Tokyo", "东京", 9), ("Seoul", "首尔", 9)),
        *(("Sydney", "悉尼", 10), ("Lima", "利马", -5), ("Chicago", "芝加哥", -6)),
        *(("Denver", "丹佛", -7),),
    )
)
DAYS = (
    *(("Monday", "星期一"), ("Tuesday", "星期二"), ("Wednesday", "星期三"), ("Thursday", "星期四")),
    *(("Friday", "星期五"), ("Saturday", "星期六"), ("Sunday", "星期日")),
)
SKIES = (
    ("sunny", "晴"),
    ("cloudy", "多云"),
    ("rainy", "有雨"),
    ("snowy", "有雪"),
    ("foggy", "有雾"),
)
# Of each kind the smallest unit first; how many of the smallest one is.
UNITS = (
    {"cm": 1, "m": 100, "km": 100_000},
    {"g": 1, "kg": 1000},
    {"s": 1, "min": 60, "h": 3600},
    {"ml": 1, "l": 1000},
)
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculator(expression: str) -> str:
    """What a sum comes to, exactly: + - * / and brackets."""
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"more than {LONGEST_EXPRESSION} characters")
    return written(_value(ast.parse(expression.strip(), mode="eval").body))


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError("only numbers, + - * / and brackets")


def clock(time: str, **places: str) -> str:
    """What time it is in the city `to` when it is `time`, as 09:15, in the city `from`."""
    hours, minutes = map(int, time.split(":"))
    offsets = [_city(places[name]).offset for name in ("from", "to")]
    there = (60 * hours + minutes - offsets[0] + offsets[1]) % (24 * 60)
    return f"{there // 60:02}:{there % 60:02}"


def convert(value: float | str, **units: str) -> str:
    """How many of the unit `to` a value of the unit `from` is."""
    kind = next(kind for kind in UNITS if {units["from"], units["to"]} <= kind.keys())
    return written(Fraction(str(value)) * kind[units["from"]] / kind[units["to"]])


def weather(city: str, day: str) -> str:
    """The weather of a city on a day of the week, in the language of the city's name."""
    place = _city(city).names
    (date,) = (names for names in DAYS if day in names)
    drawn = hash_bucket(f"{place[0]} {date[0]}") + hash_bucket(f"{date[0]} {place[0]}") * 100
    sky = SKIES[drawn % len(SKIES)][place.index(city)]
    return json.dumps({"sky": sky, "celsius": 1 + drawn // 5 % 35}, ensure_ascii=False)


def _city(name: str) -> City:
    return next(city for city in CITIES if name in city.names)


TOOLS: Mapping[str, Callable[..., str]] = {
    tool.__name__: tool for tool in (calculator, clock, convert, weather)
}


def _spec(name: str, **types: str) -> dict[str, Any]:
    """Without a description: a small model learns what a tool is for, and reads no English."""
    properties = {key: {"type": kind} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


SPECS: Mapping[str, dict[str, Any]] = {
    "calculator": _spec("calculator", expression="string"),
    "clock": _spec("clock", **{"time": "string", "from": "string", "to": "string"}),
    "convert": _spec("convert", **{"value": "number", "from": "string", "to": "string"}),
    "weather": _spec("weather", city="string", day="string"),
}
"""What a chat's `tools` say of each, as OpenAI's API has it."""


def run_tool(name: str, arguments: Mapping[str, Any]) -> str:
    """What a tool says to a call; to one that it cannot answer, that there is an error."""
    if name not in TOOLS:
        return f"error: no tool {name!r}; there are {', '.join(TOOLS)}"
    try:
        return TOOLS[name](**arguments)
    except Exception:  # whatever a model may call it with
        return f"error: {name} cannot take {json.dumps(arguments, ensure_ascii=False)[:200]}"
