"""Evaluate a checkpoint on held-out problems and text."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.formats import parse_text, read_rows
from minimind.evaluation.evaluate import EvaluateConfig, Prediction, evaluate
from minimind.files import replacing
from minimind.metrics import write_metrics
from minimind.model.checkpoint import load_model
from minimind.params import load_path, load_section
from minimind.tasks.problem import Problem, read_problems
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
    choices: Annotated[Path | None, typer.Option(help="CSV, a row for each with choices")] = None,
    params: Annotated[Path, typer.Option()] = Path("params.yaml"),
) -> None:
    """Answer every problem greedily and score what the model says."""
    config = load_section(params, "evaluate", EvaluateConfig)
    problems, text = load_path(params, "data.problems"), load_path(params, "data.text")
    inputs, sections = [checkpoint, problems, text], {"evaluate": config}
    with start_run(
        f"evaluate-{name}", params, sections, inputs, code="evaluate", saves_states=False
    ) as run:
        asked = read_problems(problems, say=run.say)
        values, answered = evaluate(
            load_model(checkpoint).to(run.device).eval(),
            ChatTokenizer.load(checkpoint),
            asked,
            [row.value for row in read_rows(text, parse_text)],
            config,
            as_text=name in config.text_checkpoints,
        )
        with run.saving(metrics):
            write_rows(predictions, map(asdict, answered))
            if choices is not None:
                with replacing(choices) as partial:
                    partial.write_text(_confusion(asked, answered), encoding="utf-8")
            write_metrics(metrics, name, values)
    shown = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
    typer.echo(f"{name}: {shown}")


def _confusion(problems: Sequence[Problem], predictions: Sequence[Prediction]) -> str:
    """CSV: the right choice of each problem that has some, and the likeliest one, A to Z."""
    numbers = [
        (problem.label, problem.choices.index(prediction.choice))
        for problem, prediction in zip(problems, predictions, strict=True)
        if problem.label is not None and prediction.choice is not None
    ]
    rows = ["right,chosen", *(f"{chr(65 + right)},{chr(65 + chosen)}" for right, chosen in numbers)]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    app()
