"""The report's tables: what each checkpoint can do, in one run and over seeds.

They hold no times and no names of machines, so that the same results give the same bytes.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from minimind.evaluation.wilson import effective_trials, wilson_interval
from minimind.metrics import Number
from minimind.report.results import Evaluation, Record, RecordedRun
from minimind.report.tables import table

NOTE = (
    "Answers in %, with the 95 % Wilson interval: how far another choice of as many problems may "
    "move them, and\nnothing else, neither seeds nor machines. level: right answers, greedy. Of a "
    "task: the same or, where there are\nchoices, problems whose right choice is the likeliest; "
    "choice: the same of problems without a task. bits/byte: not in\n%, of the rows that the stage "
    "itself held out. Of the outputs without a task, form: an answer and nothing else;\n"
    "sentence: a full sentence; think: a complete thought and answer; truncated: cut off before "
    "their end."
)
RECORD_NOTE = (
    "Mean and lowest–highest over {num_seeds} in % ({dtype}, {isa}), and the same problems in all: "
    "how far another\nseed may move them, and nothing else. bits/byte: lowest–highest, not in %. "
    "Made by `python -m benchmarks.claims`."
)
BITS = "bits_per_byte"
OF_OUTPUTS = {
    "form": "in_form",
    "sentence": "full_sentence",
    "think": "complete_think",
    "truncated": "unfinished",
}
OF_DATA = {
    "rows": "rows",
    "samples": "samples",
    "left out": "skipped_rows",
    "dropped": "dropped_rows",
    "cut": "truncated_rows",
    "repeated": "duplicate_rows",
    "asked in evaluation": "eval_overlap_rows",
}
MAX_SHOWN = 400  # characters of what was left out

Metrics = Mapping[str, Number]


def checkpoint_section(evaluations: Sequence[Evaluation], training: Mapping[str, Metrics]) -> str:
    """A column for each checkpoint: at most 120 wide with the nine of the graph as shipped."""
    rows = []
    for title, metric in measures([evaluation.metrics for evaluation in evaluations]):
        cells = [shown(measured(e, training, metric), metric) for e in evaluations]
        if any(cells):
            rows.append([title, *cells])
    names = [evaluation.name for evaluation in evaluations]
    return "\n\n".join(["## Checkpoints", table(["", *names], rows), NOTE])


def measured(
    evaluation: Evaluation, training: Mapping[str, Metrics], metric: str
) -> tuple[Number, Number, Number] | None:
    """A metric of a checkpoint and its 95 % interval, itself where it has none; None without it."""
    if metric == BITS or metric in OF_OUTPUTS.values():
        of = training.get(evaluation.name, {}) if metric == BITS else evaluation.metrics
        value = of.get(metric)
        return None if value is None else (value, value, value)
    found = outcomes(evaluation.predictions, metric)
    return interval(found) if found else None


def shown(value: tuple[Number, Number, Number] | None, metric: str) -> str:
    """As in "96 94–98"; bits and what has no interval as one number."""
    if value is None:
        return ""
    share, low, high = value
    if metric == BITS:
        return f"{share:.3f}"
    if metric in OF_OUTPUTS.values():
        return _percent(share)
    return f"{100 * share:.0f} {100 * low:.0f}–{100 * high:.0f}"


def record_section(runs: Sequence[RecordedRun], order: Sequence[str]) -> str:
    """What the recorded runs have in common, and the seeds apart from one another."""
    same = alike(runs)
    note = RECORD_NOTE.format(num_seeds=_num_seeds(same), dtype=same[0].dtype, isa=same[0].isa)
    return "\n\n".join(["## Over seeds", record_table(runs, order), note])


def record_table(runs: Sequence[RecordedRun], order: Sequence[str]) -> str:
    """:func:`record_rows` as Markdown."""
    header, *rows = record_rows(runs, order)
    return table(header, rows)


def record_rows(runs: Sequence[RecordedRun], order: Sequence[str]) -> list[list[str]]:
    """As the table of `checkpoint_section`, over the runs that are `alike`; its header first.

    order: names of checkpoints as they are to come; others that were recorded come last.
    """
    same = alike(runs)
    recorded = dict.fromkeys(name for run in same for name in run.evaluation)
    names = list(dict.fromkeys([*(name for name in order if name in recorded), *recorded]))
    every = [metrics for run in same for metrics in run.evaluation.values()]
    rows = [[_num_seeds(same), *names]]
    for title, metric in measures(every):
        cells = []
        for name in names:
            metrics = [run.training if metric == BITS else run.evaluation for run in same]
            values = [m[name][metric] for m in metrics if metric in m.get(name, {})]
            cells.append(_bits_spread(values) if metric == BITS else _spread(values))
        if any(cells):
            rows.append([title, *cells])
    return rows


def alike(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """The largest group of runs that differ in nothing but the seed: those of the shipped dtype."""
    ((most, _),) = Counter((run.dtype, run.isa) for run in runs).most_common(1)
    return [run for run in runs if (run.dtype, run.isa) == most]


def data_section(encodings: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each data set, then why rows were left out, with the first of each reason."""
    rows, reasons = [], []
    for name, counts in encodings.items():
        formats = ", ".join(f"{number} {format_}" for format_, number in counts["formats"].items())
        cells = [f"{counts[key]}" for key in OF_DATA.values()]
        rows.append([name, formats, *cells, _percent(counts["trained_share"])])
        for fault, number in counts["left_out"].items():
            first = f"{counts['first_left_out'].get(fault)}"
            reasons.append([name, fault, f"{number}", first[:MAX_SHOWN]])
    header = ["data", "formats", *OF_DATA, "% trained on"]
    parts = ["## Data", table(header, rows, num_left=2)]
    if reasons:
        parts.append(table(["data", "left out for", "rows", "the first"], reasons, num_left=4))
    return "\n\n".join(parts)


def measures(metrics: Sequence[Metrics]) -> list[tuple[str, str]]:
    """Titles of rows, and which metric each one shows."""
    names = {name for values in metrics for name in values}
    levels = sorted(int(name[7:]) for name in names if re.fullmatch(r"exact_l\d+", name))
    of_tasks = (name for name in names if re.fullmatch(r"(exact|choice)_[a-z_]+", name))
    tasks = sorted({name.partition("_")[2] for name in of_tasks})
    return [
        *([("exact", "exact")] if "exact" in names else []),
        *((f"level {level}", f"exact_l{level}") for level in levels),
        *((t, f"choice_{t}" if f"choice_{t}" in names else f"exact_{t}") for t in tasks),
        ("choice", "choice"),
        ("bits/byte", BITS),
        *OF_OUTPUTS.items(),
    ]


def outcomes(predictions: Sequence[Record], metric: str) -> list[tuple[bool, str]]:
    """Of each answer that a metric is the share of right ones of: is it right; its problem."""
    what, _, of = metric.partition("_")
    found = []
    for row in predictions:
        level = "" if what == "choice" or row["level"] is None else f"l{row['level']}"
        right = row["choice_correct"] if what == "choice" else row["correct"]
        if of == (row["task"] or level) and right is not None:
            found.append((right, row["problem"]))
    return found


def interval(outcomes: Sequence[tuple[bool, str]]) -> tuple[float, float, float]:
    """The share that is right of one answer or more, and both ends of its 95 % interval."""
    right, problems = zip(*outcomes, strict=True)
    share = sum(right) / len(right)
    return share, *wilson_interval(share, effective_trials(right, problems))


def _spread(shares: Sequence[Number]) -> str:
    """Mean and ends, as in "96 94–98"; one number where there is no spread to be seen."""
    if not shares:
        return ""
    low, high = f"{100 * min(shares):.0f}", f"{100 * max(shares):.0f}"
    return _percent(mean(shares)) if low == high else f"{100 * mean(shares):.0f} {low}–{high}"


def _bits_spread(values: Sequence[Number]) -> str:
    """The ends alone, as in ".96–1.03": with the mean they would take too many columns."""
    if not values:
        return ""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low.lstrip('0')}–{high.lstrip('0')}"


def _percent(share: Number) -> str:
    return "100" if share == 1 else f"{100 * share:.1f}"


def _num_seeds(runs: Sequence[RecordedRun]) -> str:
    num_seeds = len({run.seed for run in runs})
    return f"{num_seeds} seed{'s' * (num_seeds > 1)}"
