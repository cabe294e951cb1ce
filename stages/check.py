"""Check the paths in params.yaml before anything is run that depends on them."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.files import replacing
from minimind.lineage.dvc_files import stages_as_written
from minimind.lineage.paths import refuse_lost
from minimind.lineage.provenance import unchanged
from minimind.params import read_params
from minimind.terminal.command import stage_app

app = stage_app("check")


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="A file that always says the same.")],
    params: Annotated[Path, typer.Option(help="Parameters.")] = Path("params.yaml"),
    graph: Annotated[Path, typer.Option(help="The graph.")] = Path("dvc.yaml"),
) -> None:
    """Name each path that neither exists nor is made by a stage, and checkpoints not evaluated.

    The stages behind this one depend on a file that never changes: they run after it, and what
    it has found does not make them run.
    """
    with unchanged("check", params, {}, inputs=[]):
        refuse_lost(read_params(params), stages_as_written(graph), params)
        with replacing(output) as partial:
            partial.write_text("Each path in params.yaml is there, or a stage makes it.\n")


if __name__ == "__main__":
    app()
