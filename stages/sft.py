"""Supervised fine-tuning: teach a pretrained model to hold a conversation."""

from minimind.metrics import write_history, write_metrics
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.objectives.next_token import NextToken
from minimind.params import load_section
from minimind.terminal.command import stage_app
from minimind.training.fit import fit
from minimind.training.run import start_training
from stages._shared import PARAMS, EncodedChats, File
from stages._supervised import SupervisedConfig, measured, open_dataset

app = stage_app("sft")


class SftConfig(SupervisedConfig):
    """The `sft` section."""


@app.command()
def main(
    conversations: EncodedChats, output: File, metrics: File, history: File, params: File = PARAMS
) -> None:
    """Train on the assistant's turns of conversations."""
    config = load_section(params, "sft", SftConfig)
    with start_training("sft", params, {"sft": config}, [config.init, conversations]) as run:
        model = load_model(config.init)
        dataset = open_dataset(conversations, config.init, "chat", "text")
        trained = fit(model, NextToken(), dataset, config, run)
        with run.saving(metrics):
            save_checkpoint(output, model, config.init)
            write_history(history, trained.rows)
            write_metrics(metrics, "sft", measured(trained, dataset, config))


if __name__ == "__main__":
    app()
