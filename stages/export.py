"""A chosen checkpoint as a folder to hand out; an adapter is merged into its base."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.lineage.provenance import unchanged
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.model.lora import merge_adapter
from minimind.terminal.command import stage_app

app = stage_app("export")


@app.command()
def main(
    checkpoint: Annotated[Path, typer.Option(help="a checkpoint, or the base of an adapter")],
    output: Annotated[Path, typer.Option()],
    adapter: Annotated[Path | None, typer.Option(help="merged into the checkpoint")] = None,
) -> None:
    """Write a Hugging Face directory that needs neither adapter nor this project."""
    inputs = [checkpoint] if adapter is None else [checkpoint, adapter]
    with unchanged(Path("params.yaml"), {}, inputs):
        model = load_model(checkpoint)
        if adapter is not None:
            model = merge_adapter(model, adapter)
        save_checkpoint(output, model, checkpoint)


if __name__ == "__main__":
    app()
