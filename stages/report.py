"""Report on all checkpoints side by side."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.files import replacing
from minimind.lineage.provenance import unchanged
from minimind.report.report import (
    checkpoint_section,
    examples_section,
    record_section,
    training_section,
)
from minimind.report.results import read_evaluations, read_metrics, read_record
from minimind.terminal.command import stage_app

app = stage_app("report")


@app.command()
def main(
    evaluation: Annotated[list[Path], typer.Option(help="a checkpoint's metrics, in this order")],
    predictions: Annotated[Path, typer.Option(help="folder of <checkpoint>.jsonl")],
    output: Annotated[Path, typer.Option(help="Markdown")],
    training: Annotated[list[Path] | None, typer.Option(help="a training stage's metrics")] = None,
    record: Annotated[Path | None, typer.Option(help="runs of other seeds, recorded")] = None,
) -> None:
    """Write what each checkpoint can do, how its training ended, and what it says."""
    answers = [predictions / f"{path.stem}.jsonl" for path in evaluation]
    inputs = [*evaluation, *answers, *(training or []), *([record] if record else [])]
    with unchanged(Path("params.yaml"), {}, inputs):
        evaluations = read_evaluations(evaluation, predictions)
        trained = read_metrics(training or [])
        checkpoints = checkpoint_section(evaluations, trained)
        sections = ["# Report", checkpoints]
        if runs := read_record(record) if record else []:
            sections.append(record_section(runs, [e.name for e in evaluations]))
        if trained:
            sections.append(training_section(trained))
        sections.append(examples_section(evaluations))
        with replacing(output) as partial:
            partial.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    typer.echo(checkpoints)


if __name__ == "__main__":
    app()
