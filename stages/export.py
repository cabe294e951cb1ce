"""A chosen checkpoint as a folder to hand out."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.lineage.provenance import unchanged
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.terminal.command import stage_app

app = stage_app("export")


@app.command()
def main(
    checkpoint: Annotated[Path, typer.Option()],
    output: Annotated[Path, typer.Option()],
) -> None:
    """Write a Hugging Face directory that does not need this project."""
    with unchanged("export", Path("params.yaml"), {}, [checkpoint]):
        save_checkpoint(output, load_model(checkpoint), checkpoint)


if __name__ == "__main__":
    app()
