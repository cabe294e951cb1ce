"""A chosen checkpoint as a folder to hand out."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.exports.folder import write_export
from minimind.exports.receipt import trace
from minimind.lineage.provenance import unchanged
from minimind.report.results import read_evaluations
from minimind.terminal.command import stage_app
from stages._shared import PARAMS, File

app = stage_app("export")


@app.command()
def main(
    checkpoint: File,
    output: File,
    evaluation: Annotated[Path | None, typer.Option(help="metrics of the checkpoint")] = None,
    predictions: Annotated[Path, typer.Option(help="folder of its answers")] = Path("predictions"),
) -> None:
    """Write a Hugging Face directory that needs no project, with a model card and a receipt."""
    evaluations = [evaluation] if evaluation else []
    answers = [predictions / f"{path.stem}.jsonl" for path in evaluations]
    with unchanged("export", PARAMS, {}, [checkpoint, *evaluations, *answers]):
        evaluated = next(iter(read_evaluations(evaluations, predictions)), None)
        write_export(output, checkpoint, trace(checkpoint, output), evaluated)


if __name__ == "__main__":
    app()
