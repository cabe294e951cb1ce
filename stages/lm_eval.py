"""Judge a checkpoint as others judge theirs: tasks of lm-evaluation-harness."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from minimind.errors import UserError
from minimind.metrics import write_metrics
from minimind.params import load_section
from minimind.terminal.command import stage_app
from minimind.training.run import start_run

app = stage_app("lm_eval")


@app.command()
def main(
    checkpoint: Annotated[Path, typer.Option(help="the checkpoint's directory")],
    name: Annotated[str, typer.Option(help="its name in metrics")],
    tasks: Annotated[Path, typer.Option(help="folder of task files")],
    data: Annotated[Path, typer.Option(help="folder of what they read")],
    metrics: Annotated[Path, typer.Option()],
    params: Annotated[Path, typer.Option()] = Path("lm-eval/params.yaml"),
) -> None:
    """Ask every task's questions, and print the harness's table."""
    if find_spec("lm_eval") is None:
        raise UserError("lm_eval is missing; pip install 'minimind-dvc[lm-eval]'.")
    from minimind.evaluation.harness import LmEvalConfig, MiniMindLM, judge

    config = load_section(params, "lm_eval", LmEvalConfig)
    inputs, sections = [checkpoint, tasks, data], {"lm_eval": config}
    with start_run(
        f"lm_eval-{name}", params, sections, inputs, code="lm_eval", saves_states=False
    ) as run:
        model = MiniMindLM(checkpoint, run.device, config.dtype, config.batch_size)
        values, table = judge(model, name, config, tasks)
        with run.saving(metrics):
            write_metrics(metrics, name, values)
    typer.echo(table)


if __name__ == "__main__":
    app()
