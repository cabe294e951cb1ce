"""Teach a model, a new one if it has no weights yet, the statistics of plain text."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.encoded import EncodedDataset
from minimind.metrics import write_history, write_metrics
from minimind.model.checkpoint import save_checkpoint, start_model
from minimind.model.transformer import ModelShape
from minimind.objectives.next_token import NextToken
from minimind.params import UserPath, load_section
from minimind.terminal.command import stage_app
from minimind.training.bits import bits_per_byte
from minimind.training.fit import FitConfig, fit, summary
from minimind.training.run import start_training

app = stage_app("pretrain")


class PretrainConfig(FitConfig):
    """The `pretrain` section."""

    init: UserPath  # the path of a tokenizer, for a new model, or of a checkpoint of its shape


@app.command()
def main(
    text: Annotated[Path, typer.Option(help="encoded text")],
    output: Annotated[Path, typer.Option()],
    metrics: Annotated[Path, typer.Option()],
    history: Annotated[Path, typer.Option()],
    params: Annotated[Path, typer.Option()] = Path("params.yaml"),
) -> None:
    """Pretrain a model, from nothing or a checkpoint; its shape is the `model` section's."""
    config = load_section(params, "pretrain", PretrainConfig)
    shape = load_section(params, "model", ModelShape)
    sections = {"pretrain": config, "model": shape}
    with start_training("pretrain", params, sections, [config.init, text]) as run:
        model = start_model(config.init, shape, config.seed, f"{params}: model")
        run.say(f"{model.num_parameters:,} parameters")
        dataset = EncodedDataset.open(text)
        dataset.check_tokenizer_of(config.init)
        trained = fit(model, NextToken(), dataset, config, run)
        with run.saving(metrics):
            save_checkpoint(output, model, config.init)
            write_history(history, trained.rows)
            held_out = bits_per_byte(trained, dataset, config, ChatTokenizer.load(config.init))
            values = {"parameters": model.num_parameters, **summary(trained), **held_out}
            write_metrics(metrics, "pretrain", values)


if __name__ == "__main__":
    app()
