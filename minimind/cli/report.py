"""`minimind report`: the report's page, with what this workspace knows beside the results."""

import os
import platform
import sys
import time
import webbrowser
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind.errors import UserError
from minimind.files import replacing
from minimind.terminal.command import require_file


def report(
    output: Annotated[Path, typer.Option(help="the page")] = Path("reports/workspace.html"),
    in_browser: Annotated[bool, typer.Option("--open", help="open it in the browser")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="write it anew while stages train, until Ctrl-C")
    ] = False,
    seconds: Annotated[int, typer.Option(min=1, help="between two pages with --watch")] = 10,
) -> None:
    """Write a page of what there is: stages, results, training, answers, data, experiments.

    Nothing is run or locked, so it works while stages train. `reports/index.html` is the part of it
    that depends on results alone.
    """
    if output.resolve() == Path("reports/index.html").resolve():
        raise UserError(f"{output} is what stage report writes; name another file.")
    require_file(output)
    write(output, seconds if watch else None)
    typer.echo(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")
    if in_browser:
        webbrowser.open(output.resolve().as_uri())
    while watch:
        time.sleep(seconds)
        with suppress(UserError, OSError):  # what DVC has just removed is there the next time
            write(output, seconds)


def write(output: Path, watch: int | None = None) -> None:
    """watch: seconds after which a browser is to load it again."""
    # Imported here: DVC and NumPy take as long to load as all else together.
    from minimind.report.page import render
    from minimind.report.workspace import live_histories, read_workspace

    root = Path()
    live = live_histories(root)
    page = render(
        read_workspace(root, live),
        "workspace.html",
        live=live,
        watch=watch,
        about=f"{_commit(root)} · {platform.node()} · {time.strftime('%Y-%m-%d %H:%M')}",
        **_settled(_marks(root), tuple(live)),
    )
    with replacing(output) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")


def _commit(root: Path) -> str:
    from minimind.report.ancestry import git

    found = git(root, "log", "-1", "--format=%h %s").decode(errors="replace").strip()
    is_changed = bool(git(root, "status", "--porcelain", "--untracked-files=no").strip())
    return f"{found}{' + changes' * is_changed}" if found else "no git"


def _marks(root: Path) -> tuple[Any, ...]:
    """What changes when a stage has run, or a file of the project was edited."""
    files = [root / "dvc.lock", root / "dvc.yaml", root / "params.yaml"]
    return tuple((f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.exists())


@lru_cache(maxsize=1)
def _settled(marks: tuple[Any, ...], live: tuple[str, ...]) -> dict[str, Any]:
    """What takes longer, and stays until a stage has run."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    from minimind.orchestrate.costs import recorded_params, shares_of_limit
    from minimind.orchestrate.graph import load_graph
    from minimind.orchestrate.plan import plan, some
    from minimind.report.ancestry import ancestries
    from minimind.report.workspace import data_cards, drawn_graph, experiments, stages_with_runs

    root = Path()
    sys.path.insert(0, os.getcwd())  # the code of this project, not of another installed one
    try:
        with Repo(".") as repo:
            graph = load_graph(repo)
            params = recorded_params(graph)
            verdicts = {p.stage: (p.verdict, some(p.reasons)) for p in plan(repo, graph)}
    except DvcException as error:
        raise UserError(f"{error}; correct it.") from None
    stages = stages_with_runs(root, verdicts, live)
    return {
        "stages": stages,
        "limits": {} if live else shares_of_limit(graph, root, params),
        "graph": drawn_graph(stages, graph.edges),
        "cards": data_cards(root),
        "ancestries": ancestries(root),
        "experiments": list(experiments(root)),
    }
