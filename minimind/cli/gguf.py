"""`minimind gguf`: a checkpoint as one file for llama.cpp and Ollama."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def gguf(
    folder: Annotated[Path, typer.Argument(help="of an export or checkpoint: exports/reason")],
    kind: Annotated[
        Literal["f32", "f16", "q8_0"],
        typer.Option("--type", help="of matrices; q8_0: 8 bits, half the size of f16"),
    ] = "f16",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="default: DIR/NAME-TYPE.gguf")
    ] = None,
) -> None:
    """Write a GGUF file and, beside it, a Modelfile for Ollama."""
    # Imported here: PyTorch takes seconds to load.
    from minimind.exports.gguf import write_gguf
    from minimind.exports.modelfile import write_modelfile
    from minimind.model.checkpoint import load_config

    output = output or folder / f"{folder.resolve().name}-{kind}.gguf"
    write_gguf(folder, output, kind)
    write_modelfile(output.with_name("Modelfile"), output, load_config(folder).max_positions)
    typer.echo(f"{output}: {output.stat().st_size:,} bytes, and a Modelfile beside it")
