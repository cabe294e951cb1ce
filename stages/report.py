"""Report on all checkpoints side by side."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.files import replacing
from minimind.lineage.provenance import unchanged
from minimind.report.report import (
    checkpoint_section,
    data_section,
    examples_section,
    record_section,
    training_section,
)
from minimind.report.results import read_encodings, read_evaluations, read_metrics, read_record
from minimind.terminal.command import stage_app

app = stage_app("report")


@app.command()
def main(
    checkpoints: Annotated[list[str], typer.Argument(help="their names, in this order")],
    evaluations: Annotated[Path, typer.Option(help="folder of <checkpoint>.json")],
    predictions: Annotated[Path, typer.Option(help="folder of <checkpoint>.jsonl")],
    training: Annotated[Path, typer.Option(help="folder of <stage>.json")],
    output: Annotated[Path, typer.Option(help="Markdown")],
    record: Annotated[Path | None, typer.Option(help="runs of other seeds, recorded")] = None,
    encoded: Annotated[Path | None, typer.Option(help="folder of <data>.json")] = None,
) -> None:
    """Write what each checkpoint can do, what it was trained on, how that ended, what it says.

    Of data, what those sets were that a checkpoint has its name from.
    """
    evaluated = [evaluations / f"{name}.json" for name in checkpoints]
    answers = [predictions / f"{name}.jsonl" for name in checkpoints]
    trained = [training / f"{name}.json" for name in checkpoints]
    data = [encoded / f"{name}.json" for name in checkpoints] if encoded else []
    data = [file for file in data if file.is_file()]
    inputs = [*evaluated, *answers, *trained, *data, *([record] if record else [])]
    with unchanged("report", Path("params.yaml"), {}, inputs):
        results, metrics = read_evaluations(evaluated, predictions), read_metrics(trained)
        table = checkpoint_section(results, metrics)
        sections = ["# Report", table]
        if runs := read_record(record) if record else []:
            sections.append(record_section(runs, checkpoints))
        if data:
            sections.append(data_section(read_encodings(data)))
        sections += [training_section(metrics), examples_section(results)]
        with replacing(output) as partial:
            partial.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    typer.echo(table)


if __name__ == "__main__":
    app()
