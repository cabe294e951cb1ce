"""An adapter merged into the checkpoint beneath it: a checkpoint like any other."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.lineage.provenance import unchanged
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.model.lora import merge_adapter
from minimind.params import load_path
from minimind.terminal.command import stage_app

app = stage_app("merge")


@app.command()
def main(
    adapter: Annotated[Path, typer.Option(help="what stage lora has trained")],
    output: Annotated[Path, typer.Option()],
    params: Annotated[Path, typer.Option()] = Path("params.yaml"),
) -> None:
    """Write a Hugging Face directory that needs neither adapter nor this project."""
    base = load_path(params, "lora.init")
    with unchanged("merge", params, {}, [base, adapter]):
        save_checkpoint(output, merge_adapter(load_model(base), adapter), base)


if __name__ == "__main__":
    app()
