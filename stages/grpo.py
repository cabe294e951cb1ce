"""Group Relative Policy Optimization: sample several answers, learn from the better ones."""

from minimind.chat.tokenizer import ChatTokenizer
from minimind.metrics import write_history, write_metrics
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.params import load_path, load_section
from minimind.reinforcement.environment import Environment
from minimind.reinforcement.group_relative import GroupRelative, GrpoConfig
from minimind.reinforcement.loop import reinforce, summary
from minimind.reinforcement.watched import Watched
from minimind.terminal.command import stage_app
from minimind.training.run import start_training
from stages._shared import PARAMS, File, write_rows

app = stage_app("grpo")


@app.command()
def main(
    output: File, metrics: File, history: File, predictions: File, params: File = PARAMS
) -> None:
    """Train on sampled completions, each compared with the others of its prompt."""
    config = load_section(params, "grpo", GrpoConfig)
    prompts = load_path(params, "data.prompts")
    inputs = [config.init, prompts, config.reward_model, config.custom_reward]
    with start_training("grpo", params, {"grpo": config}, inputs) as run:
        model, tokenizer = load_model(config.init), ChatTokenizer.load(config.init)
        environment = Environment.open(config, model, tokenizer, prompts, run)
        algorithm = GroupRelative(config, len(environment.prompts))
        watched = Watched(environment)
        trained = reinforce(model, environment, algorithm, config, run, watched)
        with run.saving(metrics):
            save_checkpoint(output, model, config.init)
            write_history(history, trained.rows)
            write_rows(predictions, watched.rows)
            write_metrics(metrics, "grpo", summary(trained))


if __name__ == "__main__":
    app()
