"""Generate chats in which tools are called, and problems that call for them."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.lineage.provenance import unchanged
from minimind.metrics import write_metrics
from minimind.mini_world.tool_rows import ToolWorldConfig, write_tool_world
from minimind.params import load_section
from minimind.terminal.command import stage_app

app = stage_app("tool_world")


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder for the JSONL files.")],
    metrics: Annotated[Path, typer.Option(help="JSON file for the numbers of rows.")],
    params: Annotated[Path, typer.Option(help="Parameters.")] = Path("params.yaml"),
) -> None:
    """Write bilingual chats with four built-in tools, the same for equal seeds."""
    config = load_section(params, "tool_world", ToolWorldConfig)
    with unchanged("tool_world", params, {"tool_world": config}, inputs=[]):
        write_metrics(metrics, "tool_world", write_tool_world(output, config))


if __name__ == "__main__":
    app()
