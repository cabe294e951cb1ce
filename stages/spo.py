"""Single-stream Policy Optimization: one answer a prompt, compared with what was expected."""

from minimind.chat.tokenizer import ChatTokenizer
from minimind.metrics import write_history, write_metrics
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.params import load_path, load_section
from minimind.reinforcement.environment import Environment
from minimind.reinforcement.loop import reinforce, summary
from minimind.reinforcement.single_stream import SingleStream, SpoConfig
from minimind.reinforcement.watched import Watched
from minimind.terminal.command import stage_app
from minimind.training.run import start_training
from stages._shared import PARAMS, File, write_rows

app = stage_app("spo")


@app.command()
def main(
    output: File, metrics: File, history: File, predictions: File, params: File = PARAMS
) -> None:
    """Train on sampled completions, each compared with its prompt's tracked value."""
    config = load_section(params, "spo", SpoConfig)
    prompts = load_path(params, "data.prompts")
    inputs = [config.init, prompts, config.reward_model, config.custom_reward]
    with start_training("spo", params, {"spo": config}, inputs) as run:
        model, tokenizer = load_model(config.init), ChatTokenizer.load(config.init)
        environment = Environment.open(config, model, tokenizer, prompts, run)
        algorithm = SingleStream(config, len(environment.prompts))
        watched = Watched(environment)
        trained = reinforce(model, environment, algorithm, config, run, watched)
        with run.saving(metrics):
            save_checkpoint(output, model, config.init)
            write_history(history, trained.rows)
            write_rows(predictions, watched.rows)
            write_metrics(metrics, "spo", summary(trained))


if __name__ == "__main__":
    app()
