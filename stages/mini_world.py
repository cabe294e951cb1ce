"""Generate the built-in data."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.lineage.provenance import unchanged
from minimind.metrics import write_metrics
from minimind.mini_world.rows import MiniWorldConfig, write_mini_world
from minimind.params import load_section
from minimind.terminal.command import stage_app

app = stage_app("mini_world")


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder for the JSONL files.")],
    metrics: Annotated[Path, typer.Option(help="JSON file for the numbers of rows.")],
    params: Annotated[Path, typer.Option(help="Parameters.")] = Path("params.yaml"),
) -> None:
    """Write short bilingual counting stories for every later stage, the same for equal seeds."""
    config = load_section(params, "mini_world", MiniWorldConfig)
    with unchanged("mini_world", params, {"mini_world": config}, inputs=[]):
        num_rows = write_mini_world(output, config)
        write_metrics(metrics, "mini_world", num_rows)


if __name__ == "__main__":
    app()
