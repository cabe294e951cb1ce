"""Reasoning distillation: teach a model to think before it answers."""

from pydantic import Field

from minimind.metrics import write_history, write_metrics
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.objectives.next_token import NextToken
from minimind.params import load_section
from minimind.terminal.command import stage_app
from minimind.training.fit import fit
from minimind.training.run import start_training
from stages._shared import PARAMS, EncodedThoughts, File
from stages._supervised import SupervisedConfig, measured, open_dataset

app = stage_app("reason")


class ReasonConfig(SupervisedConfig):
    """The `reason` section."""

    tag_weight: float = Field(gt=0)  # of <think>, </think>, <answer>, </answer> in the loss
    final_tag_weight: float = Field(gt=0)  # reached linearly at the last step


@app.command()
def main(
    conversations: EncodedThoughts,
    output: File,
    metrics: File,
    history: File,
    params: File = PARAMS,
) -> None:
    """Train on think/answer traces, the tags weighing more than other tokens."""
    config = load_section(params, "reason", ReasonConfig)
    with start_training("reason", params, {"reason": config}, [config.init, conversations]) as run:
        model = load_model(config.init)
        dataset = open_dataset(conversations, config.init, "chat", "text")
        objective = NextToken(config.tag_weight, config.final_tag_weight)
        trained = fit(model, objective, dataset, config, run)
        with run.saving(metrics):
            save_checkpoint(output, model, config.init)
            write_history(history, trained.rows)
            write_metrics(metrics, "reason", measured(trained, dataset, config))


if __name__ == "__main__":
    app()
