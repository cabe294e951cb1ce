"""`minimind`: what is done beside the graph."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.cli.chat import chat
from minimind.cli.compare import compare
from minimind.cli.explain import explain
from minimind.cli.get import get
from minimind.cli.gguf import gguf
from minimind.cli.lint import lint
from minimind.cli.plan import plan
from minimind.cli.presets import apply_preset, read_preset
from minimind.cli.project import init, pull, push, upgrade
from minimind.cli.publish import publish
from minimind.cli.report import report
from minimind.cli.repro import repro
from minimind.cli.resume import resume
from minimind.cli.seeds import seeds
from minimind.cli.serve import serve
from minimind.cli.show import show
from minimind.cli.verify import verify
from minimind.cli.web import web
from minimind.lineage.repository import running_stages
from minimind.terminal.command import stage_app

app = stage_app("minimind")


@app.callback()
def main_options() -> None:
    """The graph's stages side by side, and what is done beside it."""


@app.command()
def preset(
    name: Annotated[
        str,
        typer.Argument(
            help="small, base, moe, minimind3, minimind3-moe, tiny, or a file of yours in presets/"
        ),
    ],
    params: Annotated[Path, typer.Option(help="the file to change")] = Path("params.yaml"),
    presets: Annotated[Path, typer.Option(help="where presets are")] = Path("presets"),
) -> None:
    """Write a preset's values into params.yaml, whose comments stay."""
    changes = apply_preset(params, read_preset(presets, name))
    for line in changes:
        typer.echo(line)
    typer.echo(f"{params}: {len(changes)} values changed. `dvc repro` runs what depends on them.")
    if changes and (running := running_stages(params.parent)):
        typer.echo(
            f"DVC runs {', '.join(running)} now: a stage that runs and has other values since ends "
            "with an error, and those after it take the new ones."
        )


app.command()(chat)
app.command()(compare)
app.command()(explain)
app.command()(get)
app.command()(gguf)
app.command()(init)
app.command()(lint)
app.command()(plan)
app.command()(publish)
app.command()(pull)
app.command()(push)
app.command()(report)
app.command()(repro)
app.command()(resume)
app.command()(seeds)
app.command()(serve)
app.command()(show)
app.command()(upgrade)
app.command()(verify)
app.command()(web)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
