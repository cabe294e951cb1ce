"""`minimind gguf`: a checkpoint as one file for llama.cpp and Ollama."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.exports.receipt import GgufType
from minimind.terminal.command import require_file


def gguf(
    folder: Annotated[Path, typer.Argument(help="of an export or checkpoint: exports/reason")],
    kind: Annotated[
        GgufType, typer.Option("--type", help="of matrices; q8_0: 8 bits, half the size of f16")
    ] = "f16",
    output: Annotated[
        Path | None,
        # Not in the folder, which is an output that DVC knows file by file.
        typer.Option("-o", "--output", help="default: beside the folder, exports/reason-f16.gguf"),
    ] = None,
) -> None:
    """Write a GGUF file and, beside it, a Modelfile for Ollama."""
    # Imported here: PyTorch takes seconds to load.
    from minimind.exports.gguf import write_gguf
    from minimind.exports.modelfile import write_modelfile
    from minimind.model.checkpoint import load_config

    output = output or folder.parent / f"{folder.resolve().name}-{kind}.gguf"
    require_file(output)
    write_gguf(folder, output, kind)
    modelfile = output.with_suffix(".Modelfile")
    write_modelfile(modelfile, output, load_config(folder).max_positions)
    typer.echo(f"{output}: {output.stat().st_size:,} bytes; for Ollama: {modelfile}")
