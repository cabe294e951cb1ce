"""A chosen checkpoint as a folder to hand out."""

from minimind.lineage.provenance import unchanged
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.terminal.command import stage_app
from stages._shared import PARAMS, File

app = stage_app("export")


@app.command()
def main(checkpoint: File, output: File) -> None:
    """Write a Hugging Face directory that does not need this project."""
    with unchanged("export", PARAMS, {}, [checkpoint]):
        save_checkpoint(output, load_model(checkpoint), checkpoint)


if __name__ == "__main__":
    app()
