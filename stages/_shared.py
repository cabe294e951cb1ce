"""What stages share: options, with what `--help` says of them, and rows of JSON as output."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind.files import replacing

PARAMS = Path("params.yaml")
File = Annotated[Path, typer.Option()]  # or folder
EncodedText = Annotated[Path, typer.Option(help="encoded text")]
EncodedChats = Annotated[Path, typer.Option(help="encoded chats")]
EncodedThoughts = Annotated[Path, typer.Option(help="encoded think/answer chats")]
EncodedPairs = Annotated[Path, typer.Option(help="encoded preference pairs")]
Encoded = Annotated[Path, typer.Option(help="folder of encoded data sets")]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSONL."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
