"""Low-rank adaptation: a small adapter learns, the checkpoint beneath it stays as it is."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.metrics import write_history, write_metrics
from minimind.model.checkpoint import load_model
from minimind.model.lora import AdapterShape, add_adapter, save_adapter
from minimind.objectives.next_token import NextToken
from minimind.params import load_section
from minimind.terminal.command import stage_app
from minimind.training.fit import fit
from minimind.training.run import start_training
from stages._shared import PARAMS, Encoded, File
from stages._supervised import SupervisedConfig, measured, open_dataset

app = stage_app("lora")


class LoraStageConfig(SupervisedConfig, AdapterShape):
    """The `lora` section."""

    data: str  # what the adapter learns: its name among the encoded data sets


@app.command()
def main(
    encoded: Encoded,
    output: Annotated[Path, typer.Option(help="adapter directory")],
    metrics: File,
    history: File,
    params: File = PARAMS,
) -> None:
    """Train an adapter that stock peft loads on the stock model."""
    config = load_section(params, "lora", LoraStageConfig)
    conversations = encoded / config.data
    with start_training("lora", params, {"lora": config}, [config.init, conversations]) as run:
        dataset = open_dataset(conversations, config.init, "chat", "text")
        model = add_adapter(load_model(config.init), config, config.seed)
        num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trained = fit(model, NextToken(), dataset, config, run)
        with run.saving(metrics):
            save_adapter(output, model, config.init)
            write_history(history, trained.rows)
            values = {"parameters": num_trained, **measured(trained, dataset, config)}
            write_metrics(metrics, "lora", values)


if __name__ == "__main__":
    app()
