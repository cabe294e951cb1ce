"""`minimind init` and `minimind upgrade`: a project outside the clone, and its next version."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.errors import UserError
from minimind.lineage.paths import quoted
from minimind.report.tables import table


def init(folder: Annotated[Path, typer.Argument(help="where; it may be there already")]) -> None:
    """Make a small project of your own, which uses the installed package.

    It has params.yaml, dvc.yaml and a README; in a git repository it becomes a part of it.
    """
    # Imported here: DVC takes as long to load as all else together.
    from minimind.project.upgrade import create_project

    create_project(folder)
    typer.echo(f"{folder}: a project with the whole graph; README.md says what is where.\n\nNext:")
    typer.echo(
        f'  cd {quoted(str(folder))}\n  git add -A && git commit -m "Start"\n  minimind repro'
    )


def upgrade(
    dry: Annotated[bool, typer.Option("--dry", help="only say what would change")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="where both changed the same lines, have both, marked")
    ] = False,
) -> None:
    """Bring a project of `minimind init` to the installed version; your edits stay.

    It says what changes in params.yaml, dvc.yaml and the code, and which stages would run again.
    """
    from minimind.project.upgrade import apply_upgrade, plan_upgrade

    plan = plan_upgrade(Path())
    typer.echo(f"minimind-dvc {plan.before} -> {plan.now}")
    others = [f"{name} changes" for name in plan.files if not name.endswith(".yaml")]
    for line in [*plan.values, *others]:
        typer.echo(line)
    if plan.code:
        typer.echo(f"code of {len(plan.code)} stages changes")
    if plan.stages:
        typer.echo("\n" + table(["runs again", "because of"], [*plan.stages.items()], 2))
    if plan.conflicts and not force:
        raise UserError(
            f"you and the new version changed the same lines of {', '.join(plan.conflicts)}; "
            "nothing is written. `minimind upgrade --force` marks them in the file, as git does."
        )
    if not dry:
        apply_upgrade(Path(), plan)
        typer.echo(f"\n{len(plan.files)} files and the digests in code/ are up to date.")
    if plan.conflicts and not dry:
        typer.echo(f"Choose between yours and ours at the marks in: {', '.join(plan.conflicts)}")


def push() -> None:
    """Share what is trained: `dvc push --run-cache`, with the metrics of past runs."""
    from minimind.project import share

    typer.echo(f"{share.push()} files sent")


def pull() -> None:
    """Bring what others have trained, and past runs: `minimind repro` then runs none of it."""
    from minimind.project import share

    typer.echo(f"{share.pull()} files brought")
