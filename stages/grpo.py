"""Group Relative Policy Optimization: sample several answers, learn from the better ones."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from minimind.chat.tokenizer import ChatTokenizer
from minimind.metrics import write_curve, write_metrics
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.params import load_path, load_section
from minimind.reinforcement.draws import Draws
from minimind.reinforcement.group_relative import GroupRelative
from minimind.reinforcement.loop import ReinforcementConfig, reinforce, summary
from minimind.reinforcement.setup import build_environment
from minimind.terminal.command import stage_app
from minimind.training.run import start_training

app = stage_app("grpo")


class GrpoConfig(ReinforcementConfig):
    """The `grpo` section."""

    num_generations: int = Field(ge=2)  # completions of each prompt


@app.command()
def main(
    output: Annotated[Path, typer.Option()],
    metrics: Annotated[Path, typer.Option()],
    curve: Annotated[Path, typer.Option()],
    params: Annotated[Path, typer.Option()] = Path("params.yaml"),
) -> None:
    """Train on sampled completions, each compared with the others of its prompt."""
    config = load_section(params, "grpo", GrpoConfig)
    prompts = load_path(params, "data.prompts")
    inputs = [config.init, prompts, config.reward_model, config.custom_reward]
    with start_training("grpo", params, {"grpo": config}, inputs) as run:
        model, tokenizer = load_model(config.init), ChatTokenizer.load(config.init)
        environment = build_environment(config, model, tokenizer, prompts, run)
        prompts_per_step = config.batch_size * config.accumulation_steps
        draws = Draws(len(environment.prompts), prompts_per_step, config.seed)
        # Dr. GRPO does without the division, which favours prompts that are almost always solved.
        method = GroupRelative(draws, config.num_generations, config.loss_type != "dr_grpo")
        history = reinforce(model, environment, method, config, run)
        with run.saving(metrics):
            save_checkpoint(output, model, config.init)
            write_curve(curve, history.curve)
            write_metrics(metrics, "grpo", summary(history))


if __name__ == "__main__":
    app()
