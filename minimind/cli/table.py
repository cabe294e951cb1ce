"""Print the report's table of checkpoints, and how long the stages took.

Times are no part of the report, which must be the same for the same results; they stand in
runs/, which only a machine that has run the stages has.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from minimind.errors import UserError
from minimind.report.report import record_table
from minimind.report.results import read_record
from minimind.report.tables import table
from minimind.terminal.command import stage_app

RECORD = Path("benchmarks/results/claims.json")
REPORT = Path("reports/report.md")
RECORD_COVERS = "Mean and lowest–highest over seeds, not over problems: all answer the same ones."

app = stage_app("table")


@app.command()
def main(
    report: Annotated[Path, typer.Option(help="the report")] = REPORT,
    runs: Annotated[Path | None, typer.Option(help="records; default: $DVC_ROOT/runs")] = None,
    record: Annotated[bool, typer.Option(help="the README's table, over recorded runs")] = False,
) -> None:
    """Print what each checkpoint can do, and the stages' times where they are known."""
    if record:
        typer.echo(f"{readme_table(RECORD, Path('dvc.yaml'))}\n\n{RECORD_COVERS}")
        return
    typer.echo(checkpoint_section_of(report))
    if times := time_table(runs or Path(os.environ.get("DVC_ROOT", ".")) / "runs"):
        typer.echo(f"\n## Stages that ran here\n\n{times}")


def checkpoint_section_of(report: Path) -> str:
    """The section of a report that `stages.report` writes first."""
    if not report.is_file():
        raise UserError(f"{report} is missing; run `dvc repro report`.")
    _, found, rest = report.read_text(encoding="utf-8").partition("## Checkpoints\n")
    if not found:
        raise UserError(f"{report} has no section Checkpoints; run `dvc repro --force report`.")
    return found + rest.split("\n## ")[0].rstrip()


def readme_table(record: Path, graph: Path) -> str:
    """The table over the recorded runs; the checkpoints are in the order of the graph."""
    recorded = read_record(record)
    if not recorded:
        raise UserError(f"{record} has no runs; run `python -m benchmarks.claims`.")
    stages = yaml.safe_load(graph.read_text(encoding="utf-8"))["stages"]
    return record_table(recorded, list(stages["evaluate"]["foreach"]))


def time_table(runs: Path) -> str:
    """Seconds and speed of each recorded stage, the first to finish first; empty without any."""
    records: list[dict[str, Any]] = []
    for file in sorted(runs.glob("*.json")):
        try:
            records.append(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue  # a record that is being written, or was cut short; it is for show only
    records = [r for r in records if isinstance(r, dict) and "seconds" in r and "stage" in r]
    if not records:
        return ""
    records.sort(key=lambda record: str(record.get("finished", "")))
    rows = []
    for r in records:
        speed = r.get("tokens_per_second")
        shown = "" if speed is None else f"{speed:,.0f}"
        rows.append([str(r["stage"]), _minutes(r["seconds"]), shown])
    rows.append(["all", _minutes(sum(record["seconds"] for record in records)), ""])
    return table(["stage", "time", "tokens/s"], rows)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    app()
