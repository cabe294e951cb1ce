"""Encode a data set as token arrays."""

import json
from pathlib import Path
from typing import Annotated

import typer

from minimind.chat.agreement import is_as_trained, require_agreement
from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.augment import Augmentation, load_synonyms
from minimind.datasets.encode import (
    ChatEncodeConfig,
    DataConfig,
    EncodeConfig,
    Format,
    encode_dataset,
)
from minimind.datasets.sources import unread_files
from minimind.files import replacing
from minimind.lineage.provenance import unchanged
from minimind.params import load_path, load_section
from minimind.terminal.command import stage_app

app = stage_app("encode")


@app.command()
def main(
    data_format: Annotated[Format, typer.Option("--format", help="What a row is.")],
    name: Annotated[str, typer.Option(help="The data set's section below encode.")],
    output: Annotated[Path, typer.Option(help="Directory for the arrays.")],
    metrics: Annotated[Path, typer.Option(help="JSON file for rows, tokens, shares.")],
    params: Annotated[Path, typer.Option(help="Parameters.")] = Path("params.yaml"),
) -> None:
    """Check the rows of a data set and write them as memory-mapped arrays of tokens."""
    data = load_section(params, "data", DataConfig)
    section = ChatEncodeConfig if data_format in ("chat", "reason") else EncodeConfig
    config = load_section(params, f"encode.{name}", section)
    sections = {"data": data, f"encode.{name}": config}
    source, synonyms = load_path(params, f"data.{name}"), load_path(params, "data.synonyms")
    tokenizer = load_path(params, "encode.tokenizer")
    evaluation = [load_path(params, "data.problems"), load_path(params, "data.text")]
    with unchanged("encode", params, sections, [source, tokenizer, synonyms, *evaluation]):
        if not is_as_trained(tokenizer):
            require_agreement(tokenizer, tokenizer)
        augmentation = None
        if isinstance(config, ChatEncodeConfig) and config.changes_chats:
            augmentation = Augmentation(config, load_synonyms(synonyms))
        counts = encode_dataset(
            source,
            output,
            ChatTokenizer.load(tokenizer),
            data_format,
            config.max_length,
            data.on_bad_row,
            augmentation,
            evaluation=evaluation,
        )
        if unread := unread_files(source):
            shown = ", ".join(unread[:8]) + (", ..." if len(unread) > 8 else "")
            typer.echo(f"encode: not read: {shown}", err=True)
        for line in counts.said(output / "skipped.jsonl"):
            typer.echo(f"encode: {line}", err=True)
        values = {"encode": {name: counts.metrics()}}
        with replacing(metrics) as partial:
            partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
