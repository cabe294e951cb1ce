"""Low-rank adaptation: a small adapter learns, the checkpoint beneath it stays as it is."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.encoded import EncodedDataset
from minimind.metrics import write_history, write_metrics
from minimind.model.checkpoint import load_model
from minimind.model.lora import AdapterShape, add_adapter, save_adapter
from minimind.objectives.next_token import NextToken
from minimind.params import UserPath, load_section
from minimind.terminal.command import stage_app
from minimind.training.bits import bits_per_byte
from minimind.training.fit import FitConfig, fit, summary
from minimind.training.run import start_training

app = stage_app("lora")


class LoraStageConfig(FitConfig, AdapterShape):
    """The `lora` section."""

    init: UserPath  # the path of the checkpoint beneath the adapter
    data: str  # what the adapter learns: its name among the encoded data sets


@app.command()
def main(
    encoded: Annotated[Path, typer.Option(help="folder of encoded data sets")],
    output: Annotated[Path, typer.Option(help="adapter directory")],
    metrics: Annotated[Path, typer.Option()],
    history: Annotated[Path, typer.Option()],
    params: Annotated[Path, typer.Option()] = Path("params.yaml"),
) -> None:
    """Train an adapter that stock peft loads on the stock model."""
    config = load_section(params, "lora", LoraStageConfig)
    conversations = encoded / config.data
    with start_training("lora", params, {"lora": config}, [config.init, conversations]) as run:
        dataset = EncodedDataset.open(conversations)
        dataset.check_format("chat", "text")
        dataset.check_tokenizer_of(config.init)
        model = add_adapter(load_model(config.init), config, config.seed)
        num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        run.say(f"{num_trained:,} parameters of the adapter are trained")
        trained = fit(model, NextToken(), dataset, config, run)
        with run.saving(metrics):
            save_adapter(output, model)
            write_history(history, trained.rows)
            held_out = bits_per_byte(trained, dataset, config, ChatTokenizer.load(config.init))
            values = {"parameters": num_trained, **summary(trained), **held_out}
            write_metrics(metrics, "lora", values)


if __name__ == "__main__":
    app()
