"""The report as one HTML page without a network: what checkpoints can do, say, how they learned.

The same results give the same bytes. What a workspace knows beside, workspace.py adds.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from minimind.chat.answers import first_thought
from minimind.metrics import Number
from minimind.report.drawings import Line, line_chart
from minimind.report.report import (
    BITS,
    OF_OUTPUTS,
    alike,
    measured,
    measures,
    record_rows,
    shown,
)
from minimind.report.results import Evaluation, History, Record, Results

TEMPLATE, STYLE, SCRIPT = "page.html", "page.css", "page.js"
TITLES = {  # of measures in Chinese
    "exact": "答对率",
    "equation": "算式",
    "extraction": "信息抽取",
    "choice": "选择题",
    "bits/byte": "比特/字节",
    "form": "只有答案",
    "sentence": "完整句子",
    "think": "思考完整",
    "truncated": "被截断",
}
NUM_PROMPTS = 24
NUM_COLORS = 9  # of the style
MAX_SHOWN = 500  # characters of a thought or answer
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")


class Cell(NamedTuple):
    """What a checkpoint has of a measure."""

    text: str
    interval: tuple[float, float] | None  # in %
    change: float | None  # points more than the checkpoint had that it was trained from
    is_clear: bool  # the intervals of both are apart


class Answer(NamedTuple):
    """What a checkpoint said to a prompt."""

    name: str
    is_right: bool
    thought: str | None
    said: str


class Said(NamedTuple):
    """What a policy said to a prompt at steps of its training, and what that would earn."""

    first: int  # step
    last: int
    reward: float
    thought: str | None
    said: str


class Prompt(NamedTuple):
    """A held-out prompt, and what every checkpoint said."""

    row: Record
    kind: str
    language: str  # en or zh
    answers: list[Answer]


def render(
    results: Results, template: str = TEMPLATE, live: Collection[str] = (), **more: Any
) -> str:
    """The page. live: stages that are training; a template that extends it needs more."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"t": _both, "title": _title}
    text = {name: (folder / name).read_text(encoding="utf-8") for name in (STYLE, SCRIPT)}
    prompts = _prompts(results.evaluations)
    return environment.get_template(template).render(
        style=Markup(text[STYLE]),
        script=Markup(text[SCRIPT]),
        results=results,
        live=live,
        table=_table(results),
        charts=_charts(results.histories),
        watched=_watched(results.watched),
        prompts=prompts,
        kinds=list(dict.fromkeys(prompt.kind for prompt in prompts)),
        seeds=record_rows(results.runs, [e.name for e in results.evaluations])
        if results.runs
        else [],
        of_seeds=alike(results.runs)[0] if results.runs else None,
        **more,
    )


def _both(en: str, zh: str) -> Markup:
    """A text in both languages, of which the page shows one."""
    texts = '<span class="en">{}</span><span class="zh" lang="zh-CN">{}</span>'
    return Markup(texts).format(en, zh)


def _title(name: str) -> Markup:
    """Of a measure, or a kind of problems."""
    level = name.removeprefix("level ")
    return _both(name, TITLES.get(name, name) if level == name else f"{level} 步")


def language(text: str) -> str:
    """Zh for a text with Chinese characters, else en."""
    return "zh" if _CHINESE.search(text) else "en"


def _table(results: Results) -> dict[str, dict[str, Cell]]:
    """Of each measure that anybody has: its cells by checkpoint."""
    table = {}
    for title, metric in measures([e.metrics for e in results.evaluations]):
        values = {e.name: measured(e, results.training, metric) for e in results.evaluations}
        cells = {
            name: _cell(value, values.get(results.starts.get(name, "")), metric)
            for name, value in values.items()
            if value
        }
        if cells:
            table[title] = cells
    return table


def _cell(
    value: tuple[Number, Number, Number], start: tuple[Number, Number, Number] | None, metric: str
) -> Cell:
    share, low, high = value
    has_interval = metric != BITS and metric not in OF_OUTPUTS.values()
    change = None if metric == BITS or start is None else 100 * (share - start[0])
    is_clear = start is not None and (low > start[2] or high < start[1])
    text = shown(value, metric).partition(" ")[0]
    return Cell(text, (100 * low, 100 * high) if has_interval else None, change, is_clear)


def _charts(histories: Mapping[str, History]) -> dict[str, Any]:
    """Each stage's own chart, and those that show stages over one another."""
    own: dict[str, tuple[Markup, int]] = {}
    lasting: list[Line] = []
    rewards: list[Line] = []
    for name, rows in histories.items():
        columns = ("reward",) if any("reward" in row for row in rows) else ("loss", "val_loss")
        lines = [
            Line(column, _points(rows, column), color, is_dashed=color > 0)
            for color, column in enumerate(columns)
        ]
        if chart := line_chart([line for line in lines if line.points]):
            own[name] = (chart, len(lines))
        if columns == ("reward",):
            rewards.append(Line(name, _shares(lines[0].points), len(rewards) % NUM_COLORS))
        elif lines[1].points:
            lasting.append(Line(name, _shares(lines[1].points), len(lasting) % NUM_COLORS))
    over = {"val_loss": (lasting, True), "reward": (rewards, False)}
    return {
        "own": own,
        "over": {
            title: (line_chart(lines, is_log, "%"), lines)
            for title, (lines, is_log) in over.items()
            if lines
        },
    }


def _watched(stages: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, list[Said]]]:
    """By stage and prompt, step after step; while neither answer nor reward change, once."""
    found: dict[str, dict[str, list[Said]]] = {}
    for stage, rows in stages.items():
        for row in rows:
            said = Said(row["step"], row["step"], row["reward"], *_parted(row["completion"]))
            before = found.setdefault(stage, {}).setdefault(row["prompt"], [])
            if before and before[-1][2:] == said[2:]:
                said = said._replace(first=before.pop().first)
            before.append(said)
    return found


def _points(rows: History, column: str) -> list[tuple[float, float]]:
    return [(row["step"], row[column]) for row in rows if column in row]


def _shares(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """With the share of the steps in % in place of their number."""
    last = points[-1][0] if points else 0
    return [(round(100 * step / last, 2) if last else 0.0, value) for step, value in points]


def _prompts(evaluations: Sequence[Evaluation]) -> list[Prompt]:
    """As many of each level, task and language as there is room for, evenly from all of them.

    Asked as the last checkpoint was; no result decides which are shown.
    """
    groups: dict[tuple[str, int, str], list[Record]] = {}
    for row in evaluations[-1].predictions if evaluations else ():
        key = (row["task"] or "", -1 if row["level"] is None else row["level"])
        groups.setdefault((*key, language(row["prompt"])), []).append(row)
    chosen: dict[str, Prompt] = {}
    each, rest = divmod(NUM_PROMPTS, len(groups) or 1)
    for number, ((task, level, of), rows) in enumerate(sorted(groups.items())):
        wanted = min(each + (number < rest), len(rows))
        kind = task or ("exact" if level < 0 else f"level {level}")
        for i in range(wanted):
            row = rows[(2 * i + 1) * len(rows) // (2 * wanted)]
            chosen[row["id"]] = Prompt(row, kind, of, [])
    for evaluation in evaluations:
        for row in evaluation.predictions:
            if row["id"] in chosen:
                chosen[row["id"]].answers.append(_answer(evaluation.name, row))
    return list(chosen.values())


def _answer(name: str, row: Record) -> Answer:
    return Answer(name, row["correct"], *_parted(row["output"]))


def _parted(output: str) -> tuple[str | None, str]:
    """Thought and answer, without their tags."""
    thought = first_thought(output)
    said = output if thought is None else output.partition("</think>")[2]
    if said.count("<answer>") == said.count("</answer>") == 1:
        said = said.replace("<answer>", "").replace("</answer>", "")
    return None if thought is None else _cut(thought), _cut(said)


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
