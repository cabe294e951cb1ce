"""Ratios of interleaved measurements, and how they are shown and saved."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rates = Mapping[str, Sequence[float]]  # by the peer's name, one of each round
SETTINGS = {"ours": "eager", "ours compiled": "compiled"}  # ours, by the name of its rates


def ratio_rows(work: str, rates: Rates, ours: str = "ours") -> list[dict[str, Any]]:
    """How many times faster ours is, in the setting named so, than each peer.

    A ratio is taken in each round, of steps that ran one after the other: what slows down the
    whole machine for a while cancels. `low` and `high` are the quartiles of the rounds' ratios.
    """
    rows = []
    for peer, peer_rates in rates.items():
        if peer in SETTINGS:
            continue
        ratios = [a / b for a, b in zip(rates[ours], peer_rates, strict=True)]
        low, high = quartiles(ratios)
        rows.append(
            {
                "work": work,
                "peer": peer,
                "setting": SETTINGS[ours],
                "ratio": round(statistics.median(ratios), 3),
                "low": round(low, 3),
                "high": round(high, 3),
                "rounds": len(ratios),
                "ours": round(statistics.median(rates[ours]), 3),
                "theirs": round(statistics.median(peer_rates), 3),
            }
        )
    return rows


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown."""
    lines = [
        "| work | against | setting | times faster | quartiles | ours | theirs | unit |",
        "|---|---|---|---:|---|---:|---:|---|",
    ]
    for row in rows:
        quartiles_shown = f"{row['low']:.2f}-{row['high']:.2f}"
        lines.append(
            f"| {row['work']} | {row['peer']} | {row['setting']} | {row['ratio']:.2f} | "
            f"{quartiles_shown} | {row['ours']:,g} | {row['theirs']:,g} | {row['unit']} |"
        )
    return "\n".join(lines)


def save(file: Path, rows: Sequence[Mapping[str, Any]], setting: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**setting, "rows": list(rows)}, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
