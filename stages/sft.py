"""Supervised fine-tuning: teach a pretrained model to hold a conversation."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.encoded import EncodedDataset
from minimind.metrics import write_history, write_metrics
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.objectives.next_token import NextToken
from minimind.params import UserPath, load_section
from minimind.terminal.command import stage_app
from minimind.training.bits import bits_per_byte
from minimind.training.fit import FitConfig, fit, summary
from minimind.training.run import start_training

app = stage_app("sft")


class SftConfig(FitConfig):
    """The `sft` section."""

    init: UserPath  # the path of the checkpoint to start from


@app.command()
def main(
    conversations: Annotated[Path, typer.Option(help="encoded chats")],
    output: Annotated[Path, typer.Option()],
    metrics: Annotated[Path, typer.Option()],
    history: Annotated[Path, typer.Option()],
    params: Annotated[Path, typer.Option()] = Path("params.yaml"),
) -> None:
    """Train on the assistant's turns of conversations."""
    config = load_section(params, "sft", SftConfig)
    with start_training("sft", params, {"sft": config}, [config.init, conversations]) as run:
        model = load_model(config.init)
        dataset = EncodedDataset.open(conversations)
        dataset.check_format("chat", "text")
        dataset.check_tokenizer_of(config.init)
        trained = fit(model, NextToken(), dataset, config, run)
        with run.saving(metrics):
            save_checkpoint(output, model, config.init)
            write_history(history, trained.rows)
            held_out = bits_per_byte(trained, dataset, config, ChatTokenizer.load(config.init))
            write_metrics(metrics, "sft", summary(trained) | held_out)


if __name__ == "__main__":
    app()
