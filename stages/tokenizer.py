"""Train a tokenizer, or take over an existing one."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.chat.tokenizer import ChatTokenizer, add_tokens
from minimind.chat.tokenizer_training import (
    TokenizerConfig,
    adopt_tokenizer,
    measure_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from minimind.datasets.formats import read_texts
from minimind.lineage.provenance import unchanged
from minimind.metrics import write_metrics
from minimind.params import load_path, load_section
from minimind.terminal.command import stage_app

app = stage_app("tokenizer")


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Directory for the tokenizer.")],
    metrics: Annotated[Path, typer.Option(help="JSON file for vocabulary and compression.")],
    params: Annotated[Path, typer.Option(help="Parameters.")] = Path("params.yaml"),
) -> None:
    """Train a byte-level BPE on a JSONL source, or adopt the directory of a foreign tokenizer.

    With tokenizer.extend, a model beside a foreign tokenizer gets the new tokens, too.
    """
    config = load_section(params, "tokenizer", TokenizerConfig)
    source = load_path(params, "data.tokenizer")
    with unchanged("tokenizer", params, {"tokenizer": config}, [source]):
        if (source / "tokenizer.json").is_file():
            adopt_tokenizer(source, output, config.extend)
            if config.extend and (source / "config.json").is_file():
                # Imported here: it takes seconds, and few need it.
                from minimind.model.checkpoint import extend_checkpoint

                extend_checkpoint(source, output)
            measured = measure_tokenizer(ChatTokenizer.load(output), [])
        else:
            tokenizer = train_tokenizer(read_texts(source), config.vocab_size)
            add_tokens(tokenizer, config.extend)
            save_tokenizer(tokenizer, output)
            measured = measure_tokenizer(ChatTokenizer.load(output), read_texts(source))
            if measured["vocab_size"] < config.vocab_size:
                typer.echo(
                    f"tokenizer: {source} gives {measured['vocab_size']} pieces, "
                    f"fewer than tokenizer.vocab_size {config.vocab_size}.",
                    err=True,
                )
        write_metrics(metrics, "tokenizer", measured)


if __name__ == "__main__":
    app()
