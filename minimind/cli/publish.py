"""`minimind publish`: an exported folder to a hub of models."""

from pathlib import Path
from typing import Annotated

import typer


def publish(
    folder: Annotated[Path, typer.Argument(help="that a stage export made: exports/reason")],
    repository: Annotated[str, typer.Argument(help="on the Hugging Face Hub: user/name")],
    upload: Annotated[
        bool, typer.Option("--upload", help="do it; without, only say what would be sent")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="a new repository is private")] = False,
) -> None:
    """Check an exported folder against its receipt and send it to a hub."""
    from minimind.exports.hub import files_to_publish, require_name
    from minimind.exports.hub import publish as send

    require_name(repository)
    for file in files_to_publish(folder):
        typer.echo(f"{file.name}: {file.stat().st_size:,} bytes")
    if upload:
        typer.echo(send(folder, repository, private))
    else:
        typer.echo(f"nothing was sent; --upload sends this to {repository}")
