"""`minimind compare`: whether one checkpoint is better than another, and how sure that is."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from minimind.errors import UserError
from minimind.report.tables import table

if TYPE_CHECKING:
    from minimind.comparison.paired import Paired
    from minimind.comparison.runs import Checkpoint, Project
    from minimind.comparison.seeds import OverSeeds, Spread

ALPHA = 0.05
PROBLEM_HEADER = ["a → b", "measure", "a", "b", "difference", "95 %", "problems"]
PROBLEM_HEADER += ["wins", "losses", "p", "Holm", "b is"]
DIFFERENCE_HEADER = ["a → b", "measure", "seeds", "difference", "seeds 95 %", "both 95 %"]
DIFFERENCE_HEADER += ["p", "Holm", "b is", "more seeds"]
BY_PROBLEM = (
    "Right answers in %. 95 %: bootstrap interval of the difference over problems, not over seeds: "
    "how far another choice of problems may move it. wins, losses: problems of which b, or a, has "
    "more right. p: McNemar's exact test over problems; Holm: corrected for {num}."
)
BY_SEED = (
    "Right answers in %. 95 %: t interval of the mean over seeds, not over problems: runs that "
    "differ in nothing but the seed, at the same problems."
)
DIFFERENCES = (
    "Points between the means of b and a. Seeds: 95 % interval over seeds, with these problems; "
    "both: over seeds and problems. p: {tests}, over seeds; Holm: corrected for {num}. "
    "more seeds: of each, for a power of 80 % at this difference."
)
TESTS = {True: "paired t test where both have the same seeds", False: "Welch's t test"}


class Section(NamedTuple):
    """A table, and what its intervals cover."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    num_left: int = 2


@dataclass
class Row:
    """A comparison of b with a."""

    a: str
    b: str
    by_problem: "Paired"
    over_seeds: "OverSeeds | None"
    p_holm: float | None = None
    p_holm_seeds: float | None = None


def compare(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="dpo, models/dpo; dpo@main, exp-abc:models/dpo; or whole revisions: main exp-abc",
        ),
    ],
    markdown: Annotated[bool, typer.Option("--md", help="Markdown, for a pull request")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say whether B, and what else is named, is better than A, from their cached predictions.

    Problem by problem, and over seeds where there are runs that differ in nothing but the seed.
    Of whole revisions or experiments each checkpoint is compared with itself.
    """
    # Imported here: DVC takes as long to load as all else together.
    from minimind.comparison.runs import Project

    if find_spec("statsmodels") is None:
        raise UserError("statsmodels is missing; pip install 'minimind-dvc[compare]'.")
    if len(checkpoints) < 2:
        raise UserError(f"{checkpoints[0]} alone is named; name two or more to compare.")
    with Project() as project:
        pairs, unchanged = _pairs(project, checkpoints)
        rows, spreads, hints = _compare(project, pairs)
    if as_json:
        typer.echo(json.dumps(_as_json(rows, spreads, unchanged), indent=1))
        return
    console = Console()
    for section in _sections(rows, spreads):
        shown = table(section.header, section.rows, section.num_left)
        if markdown or not console.is_terminal or console.width < len(shown.partition("\n")[0]):
            typer.echo(f"## {section.title}\n\n{shown}\n\n{section.note}\n")
        else:
            console.print(as_rich(section))
    if unchanged:
        hints.append(f"The same predictions, not compared: {', '.join(unchanged)}.")
    for hint in hints:
        typer.echo(hint)


def _pairs(
    project: "Project", said: Sequence[str]
) -> tuple[list[tuple["Checkpoint", "Checkpoint"]], list[str]]:
    """What is compared, the first thing said with each other one; names of what is unchanged."""
    from minimind.comparison.runs import Checkpoint, Run

    found = [project.parse(one) for one in said]
    checkpoints = [one for one in found if isinstance(one, Checkpoint)]
    runs = [one for one in found if isinstance(one, Run)]
    if checkpoints and runs:
        raise UserError(
            f"{checkpoints[0]} is a checkpoint, {runs[0].name} a whole revision; compare "
            f"{checkpoints[0].name}@{runs[0].name}, or revisions alone."
        )
    pairs = [(checkpoints[0], other) for other in checkpoints[1:]] if checkpoints else []
    unchanged = []
    for run in runs[1:]:
        for a in runs[0].checkpoints():
            if b := run.find(a.name):
                if a.predictions.get("md5") == b.predictions.get("md5"):
                    unchanged.append(str(b))
                else:
                    pairs.append((a, b))
    if not pairs and not unchanged:
        raise UserError(f"{' and '.join(said)} have no checkpoint of the same name.")
    return pairs, unchanged


def _compare(
    project: "Project", pairs: Sequence[tuple["Checkpoint", "Checkpoint"]]
) -> tuple[list[Row], dict[tuple[str, str], "Spread"], list[str]]:
    """Every comparison; of checkpoints with several seeds, spreads by measure; what to be told."""
    from minimind.comparison.paired import compare as compare_paired
    from minimind.comparison.paired import holm
    from minimind.comparison.seeds import compare_over_seeds, share, spread

    rows: list[Row] = []
    spreads: dict[tuple[str, str], Spread] = {}
    hints: list[str] = []
    alone: list[str] = []
    for a, b in pairs:
        of_a, of_b = project.siblings(a), project.siblings(b)
        for checkpoint, siblings in ((a, of_a), (b, of_b)):
            if checkpoint.origin is None:
                hints.append(f"{checkpoint}: out of date, `dvc repro` would evaluate another one.")
            elif len(siblings) == 1:
                alone.append(str(checkpoint))
        same = a.origin and b.origin and a.name == b.name and a.origin[0] == b.origin[0]
        for measure in a.outcomes:
            if measure not in b.outcomes:
                continue
            over_seeds = None
            try:
                paired = compare_paired(measure, a.outcomes[measure], b.outcomes[measure])
                groups = [
                    {seeds: c.outcomes[measure] for seeds, c in of.items() if measure in c.outcomes}
                    for of in (of_a, of_b)
                ]
                if not same and all(len(group) > 1 for group in groups):
                    over_seeds = compare_over_seeds(*groups)
            except UserError as error:
                raise UserError(f"{a} and {b}: {error}") from None
            for checkpoint, group in [(a, groups[0])] if same else zip((a, b), groups, strict=True):
                if len(group) > 1:
                    shares = {seeds: share(outcomes) for seeds, outcomes in group.items()}
                    spreads[str(checkpoint), measure] = spread(shares)
            rows.append(Row(str(a), str(b), paired, over_seeds))
        if not rows or rows[-1].b != str(b):
            raise UserError(f"{a} and {b} have no level or task in common; evaluate them alike.")
        if same:
            what = "are one run" if a.origin == b.origin else "differ in nothing but the seed"
            hints.append(f"{a} and {b} {what}.")
    if alone:
        hints.append(
            f"{', '.join(dict.fromkeys(alone))}: one seed, so how far another moves it is unknown; "
            "`minimind seeds 4` queues four more."
        )
    of_problems = holm([row.by_problem.p for row in rows])
    of_seeds = holm([row.over_seeds.p if row.over_seeds else None for row in rows])
    for row, p, p_seeds in zip(rows, of_problems, of_seeds, strict=True):
        row.p_holm, row.p_holm_seeds = p, p_seeds
    return rows, spreads, list(dict.fromkeys(hints))


def _sections(
    rows: Sequence[Row], spreads: Mapping[tuple[str, str], "Spread"]
) -> Iterator[Section]:
    if rows:
        yield Section(
            "Problem by problem",
            PROBLEM_HEADER,
            [
                [
                    f"{row.a} → {row.b}",
                    one.measure,
                    f"{100 * one.share_a:.1f}",
                    f"{100 * one.share_b:.1f}",
                    f"{100 * one.difference:+.1f}",
                    _interval(one.interval),
                    f"{one.num_problems}",
                    f"{one.only_b}",
                    f"{one.only_a}",
                    _p(one.p),
                    _p(row.p_holm),
                    _verdict(one.difference, row.p_holm),
                ]
                for row in rows
                for one in [row.by_problem]
            ],
            BY_PROBLEM.format(num=len(rows)),
        )
    if spreads:
        yield Section(
            "Over seeds",
            ["checkpoint", "measure", "seeds", "mean", "sd", "95 %"],
            [
                [
                    *names,
                    f"{one.num_seeds}",
                    f"{100 * one.mean:.1f}",
                    f"{100 * one.sd:.1f}",
                    _interval(one.interval, sign=""),
                ]
                for names, one in spreads.items()
            ],
            BY_SEED,
        )
    if over_seeds := [(row, row.over_seeds) for row in rows if row.over_seeds]:
        kinds = {one.paired for _, one in over_seeds}
        yield Section(
            "Difference over seeds",
            DIFFERENCE_HEADER,
            [
                [
                    f"{row.a} → {row.b}",
                    row.by_problem.measure,
                    " and ".join(map(str, dict.fromkeys(one.num_seeds))),
                    f"{100 * one.difference:+.1f}",
                    _interval(one.of_seeds),
                    _interval(one.of_both),
                    _p(one.p),
                    _p(row.p_holm_seeds),
                    _verdict(one.difference, row.p_holm_seeds),
                    "–" if one.p is None else _further(one.further),
                ]
                for row, one in over_seeds
            ],
            DIFFERENCES.format(tests=", ".join(TESTS[kind] for kind in kinds), num=len(over_seeds)),
        )


def _interval(ends: tuple[float, float] | None, sign: str = "+") -> str:
    return "–" if ends is None else " to ".join(f"{100 * end:{sign}.1f}" for end in ends)


def _p(p: float | None) -> str:
    return "–" if p is None else f"{p:.2g}" if p >= 1e-4 else "<.0001"


def _further(seeds: int | None) -> str:
    from minimind.comparison.seeds import MAX_SEEDS

    return f"over {MAX_SEEDS}" if seeds is None else f"{seeds}"


def _verdict(difference: float, p_holm: float | None) -> str:
    if p_holm is None or p_holm >= ALPHA:
        return "unclear"
    return "better" if difference > 0 else "worse"


def as_rich(section: Section) -> Table:
    """A section for a terminal, what is better or worse in colour."""
    styles = {"better": "green", "worse": "red"}
    shown = Table(
        title=section.title, caption=section.note, caption_justify="left", box=box.SIMPLE_HEAD
    )
    for number, title in enumerate(section.header):
        justify: Literal["left", "right"] = "left" if number < section.num_left else "right"
        shown.add_column(title, justify=justify, no_wrap=True)
    for row in section.rows:
        shown.add_row(*row, style=next((styles[cell] for cell in row if cell in styles), None))
    return shown


def _as_json(
    rows: Sequence[Row], spreads: Mapping[tuple[str, str], "Spread"], unchanged: Sequence[str]
) -> dict[str, Any]:
    """What is printed, unrounded; shares from 0 to 1."""
    return {
        "comparisons": [asdict(row) for row in rows],
        "over_seeds": [
            {"checkpoint": checkpoint, "measure": measure, **asdict(one)}
            for (checkpoint, measure), one in spreads.items()
        ],
        "unchanged": unchanged,
    }
