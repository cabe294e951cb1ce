"""Rejection sampling: several thoughts a prompt, those with a verified answer kept."""

import os
from pathlib import Path
from typing import Annotated

import typer

from minimind.chat.tokenizer import ChatTokenizer
from minimind.metrics import write_metrics
from minimind.model.checkpoint import load_model
from minimind.params import load_path, load_section
from minimind.tasks.problem import read_problems
from minimind.terminal.command import stage_app
from minimind.thinking.completions import Checkpoint, Source, complete_all
from minimind.thinking.endpoint import Endpoint
from minimind.thinking.rejection_sampling import RejectionSampling, RejectionSamplingConfig
from minimind.training.run import StageRun, start_run
from stages._shared import write_rows

app = stage_app("rejection_sampling")


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="JSONL in the reason format")],
    rejected: Annotated[Path, typer.Option(help="JSONL of the others, with a reason each")],
    metrics: Annotated[Path, typer.Option()],
    params: Annotated[Path, typer.Option()] = Path("params.yaml"),
) -> None:
    """Sample, verify, keep what differs."""
    config = load_section(params, "rejection_sampling", RejectionSamplingConfig)
    prompts = load_path(params, "data.prompts")
    with start_run(
        "rejection_sampling", params, {"rejection_sampling": config}, [config.init, prompts]
    ) as run:
        asked = read_problems(prompts, config.num_prompts, say=run.say)
        prompts_at_a_time = max(1, config.batch_size // config.num_samples)
        source = open_source(config, run)
        sampled = RejectionSampling()
        for prompt, completions in complete_all(source, asked, prompts_at_a_time, run):
            sampled.add(prompt, completions, config.max_kept_per_prompt)
        with run.saving(metrics):
            write_rows(output, sampled.kept)
            write_rows(rejected, sampled.rejected)
            write_metrics(metrics, "rejection_sampling", sampled.metrics())
    if not sampled.kept:
        run.say(f"no trace was kept: {rejected} says why; stage encode needs one row or more")


def open_source(config: RejectionSamplingConfig, run: StageRun) -> Source:
    """The endpoint if there is one, else the checkpoint."""
    if config.endpoint is not None and config.model is not None:
        return Endpoint(config.endpoint, config, os.environ.get("MINIMIND_API_KEY", "").strip())
    model = load_model(config.init).to(run.device).eval()
    return Checkpoint(model, ChatTokenizer.load(config.init), config, config.num_samples)


if __name__ == "__main__":
    app()
