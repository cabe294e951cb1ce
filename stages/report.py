"""Report on all checkpoints side by side."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.files import replacing
from minimind.lineage.provenance import unchanged
from minimind.report.page import render
from minimind.report.report import checkpoint_section, data_section, record_section
from minimind.report.results import Results, read_encodings
from minimind.terminal.command import stage_app

app = stage_app("report")


@app.command()
def main(
    checkpoints: Annotated[list[str], typer.Argument(help="their names, in this order")],
    evaluations: Annotated[Path, typer.Option(help="folder of <checkpoint>.json")],
    predictions: Annotated[Path, typer.Option(help="folder of <checkpoint>.jsonl")],
    training: Annotated[Path, typer.Option(help="folder of <stage>.json")],
    histories: Annotated[Path, typer.Option(help="folder of <stage>.csv")],
    output: Annotated[Path, typer.Option(help="Markdown: the tables")],
    page: Annotated[Path, typer.Option(help="HTML: all of it")],
    record: Annotated[Path | None, typer.Option(help="runs of other seeds, recorded")] = None,
    encoded: Annotated[Path | None, typer.Option(help="folder of <data>.json")] = None,
    params: Annotated[Path, typer.Option(help="what each was trained from")] = Path("params.yaml"),
) -> None:
    """Write what each checkpoint can do, what it was trained on and how, and what it says."""
    inputs = [evaluations / f"{name}.json" for name in checkpoints]
    inputs += [predictions / f"{name}.jsonl" for name in checkpoints]
    inputs += [training / f"{name}.json" for name in checkpoints]
    inputs += [histories / f"{name}.csv" for name in checkpoints]
    watched = [histories / f"{name}.jsonl" for name in checkpoints]
    inputs += [file for file in watched if file.is_file()]
    # Of data sets, those that a checkpoint has its name from.
    data = [encoded / f"{name}.json" for name in checkpoints] if encoded else []
    data = [file for file in data if file.is_file()]
    with unchanged("report", params, {}, [*inputs, *data, *([record] if record else [])]):
        results = Results.read(
            checkpoints, evaluations, predictions, training, histories, record, params
        )
        table = checkpoint_section(results.evaluations, results.training)
        sections = ["# Report", table]
        if results.runs:
            sections.append(record_section(results.runs, checkpoints))
        if data:
            sections.append(data_section(read_encodings(data)))
        with replacing(output) as partial, replacing(page) as partial_page:
            partial.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
            partial_page.write_text(render(results), encoding="utf-8", errors="replace")
    typer.echo(table)


if __name__ == "__main__":
    app()
