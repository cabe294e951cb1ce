"""Metrics and histories as files: rounded, never NaN, the same bytes for the same run."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from minimind.files import replacing

SIGNIFICANT_DIGITS = 6
Number = int | float


def rounded(value: Number) -> Number:
    """To six significant digits; integers stay as they are."""
    if isinstance(value, int):
        return value
    assert math.isfinite(value), "metrics are finite: DVC shows NaN as changed every time"
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def write_metrics(path: Path, stage: str, metrics: Mapping[str, Number]) -> None:
    """Write {stage: metrics}: nested, so that `dvc metrics diff` has short columns."""
    values = {stage: {name: rounded(value) for name, value in metrics.items()}}
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_history(path: Path, rows: Sequence[Mapping[str, Number]]) -> None:
    """Write rows as CSV, `step` first; a value that a row lacks is left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: rounded(v) for k, v in row.items()} for row in rows)
