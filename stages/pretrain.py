"""Teach a model, a new one if it has no weights yet, the statistics of plain text."""

from minimind.metrics import write_history, write_metrics
from minimind.model.checkpoint import save_checkpoint, start_model
from minimind.model.transformer import ModelShape
from minimind.objectives.next_token import NextToken
from minimind.params import UserPath, load_section
from minimind.terminal.command import stage_app
from minimind.training.fit import fit
from minimind.training.run import start_training
from stages._shared import PARAMS, EncodedText, File
from stages._supervised import SupervisedConfig, measured, open_dataset

app = stage_app("pretrain")


class PretrainConfig(SupervisedConfig):
    """The `pretrain` section."""

    init: UserPath  # the path of a tokenizer, for a new model, or of a checkpoint of its shape


@app.command()
def main(
    text: EncodedText, output: File, metrics: File, history: File, params: File = PARAMS
) -> None:
    """Pretrain a model, from nothing or a checkpoint; its shape is the `model` section's."""
    config = load_section(params, "pretrain", PretrainConfig)
    shape = load_section(params, "model", ModelShape)
    sections = {"pretrain": config, "model": shape}
    with start_training("pretrain", params, sections, [config.init, text]) as run:
        model = start_model(config.init, shape, config.seed, f"{params}: model")
        dataset = open_dataset(text, config.init)
        trained = fit(model, NextToken(), dataset, config, run)
        with run.saving(metrics):
            save_checkpoint(output, model, config.init)
            write_history(history, trained.rows)
            values = {"parameters": model.num_parameters, **measured(trained, dataset, config)}
            write_metrics(metrics, "pretrain", values)


if __name__ == "__main__":
    app()
