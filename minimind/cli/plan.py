"""`minimind plan`: what `dvc repro` would do, before anything runs."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minimind.cli.presets import apply_preset, merge, read_preset
from minimind.errors import UserError
from minimind.lineage.dvc_files import kept_from_dvc, stages_as_written
from minimind.lineage.paths import refuse_lost
from minimind.lineage.repository import said_by_dvc
from minimind.params import read_params
from minimind.report.tables import table

if TYPE_CHECKING:
    import networkx as nx

    from minimind.orchestrate.costs import Cost
    from minimind.orchestrate.plan import Planned

PARAMS = Path("params.yaml")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def plan(
    targets: Annotated[
        list[str] | None, typer.Argument(help="stages; what they need is planned, too")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set-param", "-S", help="as of `dvc exp run`")
    ] = None,
    preset: Annotated[str, typer.Option(help="with a preset's values")] = "",
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, help="stages at a time")] = 1,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, t4, l4, rtx3090, rtx4090, a100, h100")
    ] = "cpu",
    memory: Annotated[str, typer.Option(help="of the device, as in 24G: whether all fits")] = "",
    flops: Annotated[
        float | None, typer.Option(min=1, help="FLOP/s that training reaches, as in 4e11")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say which stages would run and why, and what they take; nothing is run or changed.

    A stage that runs may write what it wrote before: those below it run if it does not.
    """
    # Imported here: other commands need neither DVC nor PyTorch.
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    from minimind.orchestrate.costs import DEVICES, costs, recorded_params
    from minimind.orchestrate.graph import load_graph
    from minimind.orchestrate.plan import EditedFiles, some
    from minimind.orchestrate.plan import plan as plan_stages
    from minimind.orchestrate.values import refuse_values

    if device not in {"cpu", *DEVICES}:
        raise UserError(f"--device is {device!r}; allowed are cpu, {', '.join(DEVICES)}.")
    limit = _bytes(memory) if memory else None
    sys.path.insert(0, os.getcwd())  # the code of this project, not of another installed one
    try:
        with edited_params(preset, overrides or []) as edited:
            texts = {path: copy.read_text(encoding="utf-8") for path, copy in edited.items()}
            params = read_params(edited[PARAMS])
            repo = Repo(".", fs=EditedFiles(texts))
            with kept_from_dvc(Path(repo.root_dir)):
                graph = load_graph(repo, targets or [])
            recorded = merge(params, recorded_params(graph))
            planned = {p.stage: p for p in plan_stages(repo, graph)}
            active = [name for name, p in planned.items() if p.verdict.startswith("runs")]
            stages = [graph.nodes[name]["stage"] for name in active]
            refuse_values(Path(), stages, edited[PARAMS])
            if "check" in active:
                refuse_lost(params, stages_as_written(Path("dvc.yaml")), PARAMS)
    except DvcException as error:
        raise said_by_dvc(error) from None
    taken = costs(graph, active, Path(repo.root_dir), params, recorded, device, flops)
    summary = _summary(graph, planned, taken, jobs, limit)
    if as_json:
        stages = [vars(p) | _as_json(taken.get(name)) for name, p in planned.items()]
        typer.echo(json.dumps({"stages": stages, **summary}, indent=1))
        return
    if preset or device != "cpu" or memory or flops:
        _show_estimates(planned, taken)
    elif rows := [
        [name, p.verdict, some(p.reasons), _time(taken.get(name)), _size(taken.get(name))]
        for name, p in planned.items()
        if p.verdict != "unchanged"
    ]:
        _show(["stage", "verdict", "why", "time", "memory"], rows, 3)
    _show_summary(summary, jobs, memory)


def _summary(
    graph: "nx.DiGraph",
    planned: Mapping[str, "Planned"],
    taken: Mapping[str, "Cost"],
    jobs: int,
    limit: float | None,
) -> dict[str, Any]:
    """What all take together that run, and at the most: with those that run if inputs change."""
    from minimind.orchestrate.costs import critical_path, makespan

    possible = dict.fromkeys(graph, 0.0) | {n: cost.seconds or 0.0 for n, cost in taken.items()}
    certain = {
        n: s if n in planned and planned[n].verdict == "runs" else 0.0 for n, s in possible.items()
    }
    memory = sorted(((cost.memory or 0.0, name) for name, cost in taken.items()), reverse=True)
    return {
        "verdicts": Counter(p.verdict for p in planned.values()),
        "seconds": [sum(certain.values()), sum(possible.values())],
        "seconds_side_by_side": [makespan(graph, s, jobs) for s in (certain, possible)],
        "seconds_unknown": [name for name, cost in taken.items() if cost.seconds is None],
        "critical_path": critical_path(graph, possible),
        "peak_memory": sum(size for size, _ in memory[:jobs]),
        "largest": memory[0][1] if memory else None,
        "disk": sum(cost.disk for cost in taken.values()),
        "too_large": [n for n, cost in taken.items() if limit and (cost.memory or 0) > limit],
    }


def _show_summary(summary: Mapping[str, Any], jobs: int, memory: str) -> None:
    from minimind.orchestrate.plan import some

    counts = [f"{verdict}: {count}" for verdict, count in summary["verdicts"].items()]
    typer.echo("; ".join(counts))
    if not summary["largest"]:
        return
    rows = [("seconds", "one after another"), ("seconds_side_by_side", f"-j {jobs}")]
    for key, title in rows[: 1 if jobs == 1 else 2]:
        least, most = map(_clock, summary[key])
        typer.echo(f"time, {title}: {least}" + (f", at the most {most}" if most != least else ""))
    if unknown := summary["seconds_unknown"]:
        typer.echo(f"time not known, as they have not run here: {some(unknown)}")
    typer.echo(f"longest path: {' → '.join(summary['critical_path'])}")
    typer.echo(
        f"peak memory: {_gib(summary['peak_memory'])}, the largest is {summary['largest']}; "
        f"disk: {_gib(summary['disk'])}"
    )
    if memory:
        too_large = summary["too_large"]
        typer.echo(
            f"{memory}: " + (f"too small for {', '.join(too_large)}" if too_large else "fits")
        )


def _show_estimates(planned: Mapping[str, "Planned"], taken: Mapping[str, "Cost"]) -> None:
    """Of stages that train: where memory and time go."""
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    rows = [
        [
            name,
            planned[name].verdict,
            f"{e.parameters / 1e6:.1f}M",
            f"{e.tokens / 1e6:.1f}M",
            f"{e.flops:.1e}",
            *(f"{e.memory[part] / 2**20:,.0f}" for part in parts),
            f"{e.peak / 2**20:,.0f}",
            _time(cost),
        ]
        for name, cost in taken.items()
        if (e := cost.estimate)
    ]
    if rows:
        header = ["MiB of", "verdict", "parameters", "tokens", "FLOPs", *parts, "peak", "time"]
        _show(header, rows, 2)


def _show(header: list[str], rows: list[list[str]], num_left: int) -> None:
    """A table; on a terminal as wide as that."""
    console = Console()
    if not console.is_terminal:
        typer.echo(table(header, rows, num_left))
        return
    shown = Table()
    for number, title in enumerate(header):
        justify: Literal["left", "right"] = "left" if number < num_left else "right"
        shown.add_column(title, justify=justify, no_wrap=title != "why")
    for row in rows:
        shown.add_row(*map(escape, row))
    console.print(shown)


def _as_json(cost: "Cost | None") -> dict[str, Any]:
    if cost is None:
        return {}
    estimate = cost.estimate and {
        "parameters": cost.estimate.parameters,
        "tokens": cost.estimate.tokens,
        "flops": cost.estimate.flops,
        "memory": cost.estimate.memory,
        "peak": cost.estimate.peak,
    }
    return {**vars(cost), "estimate": estimate}


def _bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text)
    if not found:
        raise UserError(f"--memory is {text!r}; write a number and K, M, G or T, as in 24G.")
    return float(found[1]) * UNITS[found[2]]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _time(cost: "Cost | None") -> str:
    return "" if cost is None or cost.seconds is None else _clock(cost.seconds)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _size(cost: "Cost | None") -> str:
    return "" if cost is None or cost.memory is None else _gib(cost.memory)


@contextmanager
def edited_params(preset: str, overrides: Sequence[str]) -> Iterator[dict[Path, Path]]:
    """Copies of params files with other values, by the file that each stands for.

    preset: a name, or nothing.
    overrides: as of `dvc exp run -S`: `reason.lr=1e-3`, `other.yaml:key=1`.
    """
    from dvc.exceptions import DvcException
    from dvc.utils.cli_parse import to_path_overrides
    from dvc.utils.hydra import apply_overrides

    read_params(PARAMS)
    by_file = to_path_overrides(overrides)
    with TemporaryDirectory() as folder:
        edited = {}
        for number, name in enumerate({str(PARAMS), *by_file}):
            edited[Path(name)] = copy = Path(folder, f"{number}-{Path(name).name}")
            copyfile(name, copy)
            if preset and name == str(PARAMS):
                apply_preset(copy, read_preset(Path("presets"), preset))
            try:
                apply_overrides(copy, by_file.get(name, []))
            except DvcException as error:
                given, said = " ".join(by_file[name]), f"{error.__cause__ or error}"
                if unknown := re.match("Could not override '(.+?)'", said):
                    raise UserError(
                        f"-S {given}: {name} has no {unknown[1]}; correct the name, or set one "
                        f"that has a default with -S '++{unknown[1]}=...'."
                    ) from None
                raise UserError(f"-S {given}: {said}") from None
        yield edited
