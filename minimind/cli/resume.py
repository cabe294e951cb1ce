"""`minimind resume`: what stopped runs have left to go on from, and how to be rid of it."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.errors import UserError
from minimind.report.tables import table


def resume(
    root: Annotated[Path, typer.Argument(help="the project's root folder")] = Path("."),
    prune: Annotated[bool, typer.Option("--prune", help="remove them")] = False,
    older_than: Annotated[
        float, typer.Option(min=0, metavar="DAYS", help="only those not saved to for so long")
    ] = 0.0,
) -> None:
    """List checkpoints to resume from: a stopped run goes on from its own when it is run again.

    Each belongs to one stage with its parameters, data and code; with others a new one begins.
    """
    # Imported here: it loads PyTorch, which no other command needs.
    from minimind.lineage.resume import remove_run, stored_runs

    runs = [run for run in stored_runs(root / ".resume") if run.seconds >= older_than * 86400]
    if not runs:
        typer.echo(f"nothing to resume from in {root / '.resume'}")
        return
    rows, in_use = [], []
    for run in runs:
        done = "kept"
        if prune:
            try:
                remove_run(run)
                done = "removed"
            except (UserError, OSError) as error:
                done = "in use"
                in_use.append(str(error))
        stage, fingerprint = run.directory.parts[-2:]
        step = "-" if run.step is None else str(run.step)
        size, age = f"{run.num_bytes / 2**20:.1f} MiB", f"{run.seconds / 86400:.1f} days"
        rows.append([stage, fingerprint, step, size, age, done])
    typer.echo(table(["stage", "fingerprint", "step", "size", "age", ""], rows, 2))
    if in_use:
        raise UserError("; ".join(in_use))
