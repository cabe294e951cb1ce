"""What is known of a checkpoint that is talked to: how it scored, and what it comes of."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from minimind.comparison.runs import PREFIX, Project, Run
from minimind.errors import UserError
from minimind.lineage.verify import CHECKPOINT_FOLDERS
from minimind.report.results import flat
from minimind.report.tables import table
from minimind.talk.speaker import split_name

SETTINGS = ("init", "data", "lr", "epochs", "num_steps", "loss", "seed")  # shown of a stage


def about(said: str, is_chinese: bool = False) -> str:
    """Markdown of a checkpoint named as for `open_speaker`; "" if no stage made it."""
    revision, name = split_name(said)
    with suppress(UserError), Project() as project:
        run = project.run(revision) if revision else project.workspace
        made = {out["path"] for stage in run.stages.values() for out in stage.get("outs", [])}
        places = [name, *(f"{folder}/{name}" for folder in CHECKPOINT_FOLDERS)]
        if path := next((place for place in places if place in made), None):
            rows = [row for row in _ancestors(run, path) if row[1]]
            head = ["来自", "参数"] if is_chinese else ["made by", "with"]
            return f"{_scores(run, path, is_chinese)}\n\n{table(head, rows, 2)}"
    return ""


def _scores(run: Run, path: str, is_chinese: bool) -> str:
    """Shares in %, as the evaluation of a checkpoint at a path has them."""
    for name, stage in run.stages.items():
        if name.startswith(PREFIX) and path in [dep["path"] for dep in stage.get("deps", [])]:
            file = next(out["path"] for out in stage["outs"] if out["path"].endswith(".json"))
            with suppress(OSError, ValueError):
                values = flat(json.loads(run.files.read_text(file)))
                shares = {key.rpartition(".")[2]: value for key, value in values.items()}
                right = [key for key in shares if key.startswith(("exact", "choice"))]
                rows = [[key, f"{100 * shares[key]:.1f}"] for key in right]
                head = "留出题正确率" if is_chinese else "right answers to held-out problems"
                return table([head, "%"], rows)
    return "未评测。" if is_chinese else "Not evaluated."


def _ancestors(run: Run, path: str) -> Iterator[list[str]]:
    """The stages that a path comes of, the last first, with what they ran with."""
    makers = {out["path"]: name for name, stage in run.stages.items() for out in stage["outs"]}
    todo, told = [makers[path]], set()
    while todo:
        if (name := todo.pop(0)) in told or name == "code":
            continue
        told.add(name)
        stage = run.stages[name]
        yield [name, ", ".join(_settings(name, stage))]
        todo += [makers[dep["path"]] for dep in stage.get("deps", []) if dep["path"] in makers]


def _settings(name: str, stage: Mapping[str, Any]) -> Iterator[str]:
    for params in stage.get("params", {}).values():
        for key, value in flat(params).items():
            section, _, last = key.rpartition(".")
            if last in SETTINGS and section in ("", name) and value is not None:
                yield f"{last} {value}"
