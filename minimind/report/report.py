"""The report: what each checkpoint can do, how training ended, what the outputs look like.

It holds no times and no names of machines, so that the same results give the same bytes.
"""

from collections.abc import Mapping, Sequence

from minimind.evaluation.wilson import wilson_interval
from minimind.metrics import Number
from minimind.report.results import Evaluation
from minimind.report.tables import table

NOTE = (
    "In %, answers with their 95 % interval (Wilson). level: right answers to problems of it, "
    "greedy.\nchoice: problems whose right choice is the likeliest. ppl: perplexity of held-out "
    "text. think: outputs\nwith a complete thought and answer. sentence: answers in a full "
    "sentence. endless: outputs cut off."
)
MAX_SHOWN = 400  # characters of an output in the examples

Metrics = Mapping[str, Number]


def checkpoint_section(evaluations: Sequence[Evaluation]) -> str:
    """A row for each checkpoint; at most 120 columns wide with four levels and short names."""
    columns = [("checkpoint", [evaluation.name for evaluation in evaluations])]
    for level in _levels(evaluations):
        title = "exact" if level is None else f"level {level}"
        columns.append((title, [_exact(evaluation, level) for evaluation in evaluations]))
    columns.append(("choice", [_choice(evaluation) for evaluation in evaluations]))
    metrics = [evaluation.metrics for evaluation in evaluations]
    columns += [
        ("ppl", [_number(values.get("perplexity")) for values in metrics]),
        ("think", [_percent(values.get("complete_think")) for values in metrics]),
        ("sentence", [_percent(values.get("full_sentence")) for values in metrics]),
        ("endless", [_percent(values.get("unfinished")) for values in metrics]),
    ]
    columns = [(title, cells) for title, cells in columns if any(cells)]
    rows = list(zip(*(cells for _, cells in columns), strict=True))
    return "\n\n".join(["## Checkpoints", table([title for title, _ in columns], rows), NOTE])


def training_section(training: Mapping[str, Metrics]) -> str:
    """A row for each stage with all its metrics, whatever they are."""
    rows = [
        [stage, ", ".join(f"{name} {_exactly(value)}" for name, value in metrics.items())]
        for stage, metrics in training.items()
    ]
    return "\n\n".join(["## Training", table(["stage", "metrics"], rows, num_left=2)])


def examples_section(evaluations: Sequence[Evaluation]) -> str:
    """A problem of each level, as the last checkpoint was asked it, and what each one said."""
    parts = ["## Examples"]
    asked = evaluations[-1].predictions
    for place, level in enumerate(_levels(evaluations[-1:])):
        of_level = [row for row in asked if row["level"] == level]
        # Another place in each level, since neighbours may differ in language.
        problem = of_level[place % len(of_level)]
        rows = [
            [evaluation.name, "✓" if row["correct"] else "✗", _shown(row["output"])]
            for evaluation in evaluations
            for row in evaluation.predictions
            if row["id"] == problem["id"]
        ]
        parts.append(f"**{problem['id']}** {problem['prompt']} → {problem['answer']}")
        parts.append(table(["checkpoint", "", "output"], rows, num_left=3))
    return "\n\n".join(parts)


def _levels(evaluations: Sequence[Evaluation]) -> list[int | None]:
    """Problems without a level come first."""
    levels = {row["level"] for evaluation in evaluations for row in evaluation.predictions}
    return sorted(levels, key=lambda level: -1 if level is None else level)


def _exact(evaluation: Evaluation, level: int | None) -> str:
    return _interval([row["correct"] for row in evaluation.predictions if row["level"] == level])


def _choice(evaluation: Evaluation) -> str:
    right = [row["choice_correct"] for row in evaluation.predictions]
    return _interval([chosen for chosen in right if chosen is not None])


def _interval(right: Sequence[bool]) -> str:
    """Share and interval, as in "96.2 94–98"; empty without problems."""
    if not right:
        return ""
    low, high = wilson_interval(sum(right), len(right))
    return f"{_percent(sum(right) / len(right))} {100 * low:.0f}–{100 * high:.0f}"


def _percent(share: Number | None) -> str:
    if share is None:
        return ""
    return "100" if share == 1 else f"{100 * share:.1f}"


def _number(value: Number | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _exactly(value: Number) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shown(output: str) -> str:
    return output if len(output) <= MAX_SHOWN else output[: MAX_SHOWN - 1] + "…"
