"""Look at how a checkpoint thinks, on free prompts."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from minimind.chat.tokenizer import ChatTokenizer
from minimind.metrics import write_metrics
from minimind.model.checkpoint import load_model
from minimind.params import load_path, load_section
from minimind.tasks.problem import read_problems
from minimind.terminal.command import stage_app
from minimind.thinking.completions import Checkpoint, complete_all
from minimind.thinking.quality import ThinkingConfig, assess
from minimind.thinking.quality import metrics as metrics_of
from minimind.training.run import start_run
from stages._shared import write_rows

app = stage_app("thinking")


@app.command()
def main(
    predictions: Annotated[Path, typer.Option(help="JSONL, a row for each prompt")],
    metrics: Annotated[Path, typer.Option()],
    params: Annotated[Path, typer.Option()] = Path("params.yaml"),
) -> None:
    """Sample a thought and an answer a prompt, and check what can be checked."""
    config = load_section(params, "thinking", ThinkingConfig)
    prompts = load_path(params, "data.free_prompts")
    with start_run("thinking", params, {"thinking": config}, [config.init, prompts]) as run:
        asked = read_problems(prompts, config.num_prompts, needs_answers=False, say=run.say)
        tokenizer = ChatTokenizer.load(config.init)
        model = load_model(config.init).to(run.device).eval()
        source = Checkpoint(model, tokenizer, config, num_samples=1)
        assessed = [
            assess(prompt, completion, lambda text: len(tokenizer.encode_text(text)))
            for prompt, (completion,) in complete_all(source, asked, config.batch_size, run)
        ]
        with run.saving(metrics):
            write_rows(predictions, map(asdict, assessed))
            write_metrics(metrics, "thinking", metrics_of(assessed))


if __name__ == "__main__":
    app()
