"""`minimind repro`: what is out of date, independent stages side by side."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.cli.table import REPORT, checkpoint_section_of
from minimind.errors import Stopped, UserError
from minimind.params import read_params
from minimind.report.tables import table


def repro(
    targets: Annotated[
        list[str] | None, typer.Argument(help="stages, as for `dvc repro`; all by default")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("-j", "--jobs", min=1, help="stages at a time; by default a GPU or core each"),
    ] = None,
    force: Annotated[bool, typer.Option("-f", "--force", help="run unchanged stages too")] = False,
    keep_going: Annotated[
        bool, typer.Option("-k", "--keep-going", help="after a failure, with what it leaves")
    ] = False,
    overrides: Annotated[list[str] | None, typer.Option("-S", "--set-param", hidden=True)] = None,
) -> None:
    """Run what is out of date, as `dvc repro` does, independent stages side by side.

    Data is checked and encoded first. Each stage has its log in runs/logs/. Ctrl-C has running
    stages save where they are; the same command goes on from there.
    """
    if overrides:
        raise UserError(
            f"a run with other values is an experiment: `dvc exp run -S {overrides[0]}`; or write "
            "them into params.yaml."
        )
    params = Path("params.yaml")
    if params.is_file():
        read_params(params)  # DVC says what is wrong in it in its parser's words
    # Imported here: DVC takes as long to load as all else together.
    from minimind.orchestrate.farewell import farewell
    from minimind.orchestrate.run import reproduce

    report = reproduce(targets or (), jobs, force, keep_going)
    is_whole = not (targets or report.failures or report.exit_code)
    if is_whole and REPORT.is_file():
        typer.echo(checkpoint_section_of(REPORT))
    elif report.outcomes:
        rows = [[name, how, f"{seconds:.1f}"] for name, how, seconds in report.outcomes]
        typer.echo(table(["stage", "", "seconds"], rows, 2))
    typer.echo(f"{report.num_unchanged} stages were up to date.")
    if report.exit_code:
        raise Stopped("stopped; the same command goes on from there", report.exit_code)
    if report.failures:
        more = f"; {len(report.failures) - 1} more failed" if report.failures[1:] else ""
        raise UserError(f"{report.failures[0]}{more}")
    names = [outcome.stage for outcome in report.outcomes]
    what = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    for line in farewell(report.tracked, what or "what is new"):
        typer.echo(line)
