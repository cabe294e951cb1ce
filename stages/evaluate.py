"""Evaluate a checkpoint on held-out problems and text."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.formats import parse_text, read_rows
from minimind.evaluation.evaluate import EvaluateConfig, evaluate
from minimind.metrics import write_metrics
from minimind.model.checkpoint import load_model
from minimind.params import load_path, load_section
from minimind.tasks.problem import read_problems
from minimind.terminal.command import stage_app
from minimind.training.run import start_run
from stages._shared import write_rows

app = stage_app("evaluate")


@app.command()
def main(
    checkpoint: Annotated[Path, typer.Option(help="the checkpoint's directory")],
    name: Annotated[str, typer.Option(help="its name in metrics and reports")],
    metrics: Annotated[Path, typer.Option()],
    predictions: Annotated[Path, typer.Option(help="JSONL, a row for each problem")],
    params: Annotated[Path, typer.Option()] = Path("params.yaml"),
) -> None:
    """Answer every problem greedily and score what the model says."""
    config = load_section(params, "evaluate", EvaluateConfig)
    problems, text = load_path(params, "data.problems"), load_path(params, "data.text")
    inputs, sections = [checkpoint, problems, text], {"evaluate": config}
    with start_run(
        f"evaluate-{name}", params, sections, inputs, code="evaluate", saves_states=False
    ) as run:
        values, answered = evaluate(
            load_model(checkpoint).to(run.device).eval(),
            ChatTokenizer.load(checkpoint),
            read_problems(problems, say=run.say),
            [row.value for row in read_rows(text, parse_text)],
            config,
            as_text=name in config.text_checkpoints,
        )
        with run.saving(metrics):
            write_rows(predictions, map(asdict, answered))
            write_metrics(metrics, name, values)
    shown = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
    typer.echo(f"{name}: {shown}")


if __name__ == "__main__":
    app()
