"""Digests of the code that decides each stage's result."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.lineage.code import source_files, stage_names, write_code
from minimind.lineage.provenance import unchanged
from minimind.terminal.command import stage_app

app = stage_app("code")


@app.command()
def main(output: Annotated[Path, typer.Option(help="Folder for <stage>.json.")]) -> None:
    """Write what code each stage is made of: other comments or layout give the same files."""
    with unchanged("code", Path("params.yaml"), {}, source_files()):
        write_code(output, stage_names())


if __name__ == "__main__":
    app()
