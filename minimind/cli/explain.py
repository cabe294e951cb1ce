"""`minimind explain`: what differs between two revisions, or what a checkpoint comes of."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from minimind.lineage.repository import said_by_dvc
from minimind.lineage.verify import Project
from minimind.report.ancestry import OVERLAP, Ancestor, Ancestry, ancestry, output_named
from minimind.report.tables import table

if TYPE_CHECKING:
    from minimind.report.explain import Explanation

COLORS = {"outputs changed": "yellow", "same outputs": "cyan", "new": "green", "removed": "red"}
PLAIN_WIDTH = 120  # of a tree where there is no terminal
FIRST_COUNTS = ("rows", "samples", "tokens", "dropped_rows", OVERLAP)  # that a line has room for
MOST_SHOWN = 8  # stages in a line; --json has all


class Part(NamedTuple):
    """A table of the answer."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_left: int


def explain(
    before: Annotated[
        str, typer.Argument(help="a revision or experiment; or a checkpoint, for its ancestry")
    ] = "HEAD",
    now: Annotated[
        str | None, typer.Argument(help="another revision or experiment; by default the workspace")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    as_markdown: Annotated[bool, typer.Option("--md", help="print Markdown")] = False,
) -> None:
    """Say what differs between two revisions, which stages that reached, what it did to metrics.

    Of a checkpoint, as models/dpo, say what it comes of, back to the data.
    """
    found, shown = answer(before, now)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1, ensure_ascii=False))
    else:
        show(Console(), shown, as_markdown)


def answer(
    before: str, now: str | None
) -> tuple["Ancestry | Explanation", Iterator[Part | Tree | str]]:
    """What is found, and as it is shown."""
    project = Project(Path()) if now is None and Path("dvc.lock").is_file() else None
    if project and (output := output_named(before, project)):
        ancestors = ancestry(output, project)
        return ancestors, _shown_ancestry(ancestors)
    explanation = _explained(before, now or "workspace")
    return explanation, _shown_explanation(explanation)


def show(console: Console, shown: Iterable[Part | Tree | str], as_markdown: bool = False) -> None:
    """On a terminal with colours, elsewhere as text."""
    for number, part in enumerate(shown):
        in_color = console.is_terminal and not as_markdown
        if number:
            console.print() if in_color else typer.echo()
        if in_color:
            console.print(_colored(part) if isinstance(part, Part) else part, markup=False)
        elif isinstance(part, Part):
            title = f"### {part.title}\n\n" if as_markdown else ""
            typer.echo(title + table(part.header, part.rows, part.num_left))
        elif isinstance(part, Tree):
            text = StringIO()
            Console(file=text, width=PLAIN_WIDTH).print(part)
            typer.echo(f"```\n{text.getvalue()}```" if as_markdown else text.getvalue().rstrip())
        else:
            typer.echo(part)


def _explained(before: str, now: str) -> "Explanation":
    # Imported here: DVC takes as long to load as all else together.
    from dvc.exceptions import DvcException
    from scmrepo.exceptions import SCMError

    from minimind.report.explain import explain, revisions

    try:
        with revisions(before, now) as (a, b):
            return explain(a, b)
    except (DvcException, SCMError) as error:
        raise said_by_dvc(error) from None


def _shown_explanation(found: "Explanation") -> Iterator[Part | Tree | str]:
    from minimind.report.explain import some

    sides = (found.before, found.now)
    yield "\n".join([" → ".join(sides), *found.notes])
    rows = [[r.name, _text(r.before), _text(r.now), some(r.stages)] for r in found.params]
    if rows:
        yield Part("Parameters", ["parameter", *sides, "read by"], rows, 4)
    for title, roots in [("code", found.code), ("file", found.files)]:
        rows = [[r.name, _short(r.before), _short(r.now), some(r.stages)] for r in roots]
        if rows:
            yield Part(title.capitalize(), [title, *sides, "read by"], rows, 4)
    rows = [
        [d.name, d.before or "-", d.now or "-", d.note, _text(d.removed), _text(d.added)]
        for d in found.data
    ]
    if rows:
        header = ["data", *sides, "", "rows removed", "added"]
        yield Part("Data", header, rows, 4)
    reached = [s for s in found.stages if s.verdict != "not reached" or s.was]
    rows = [
        [f"{s.was} → {s.stage}" if s.was else s.stage, s.verdict, some(s.because)] for s in reached
    ]
    if rows:
        yield Part("Stages", ["stage", "", "because of"], rows, 3)
    rest = [stage.stage for stage in found.stages if stage not in reached]
    if rest:
        yield f"not reached: same inputs, same outputs ({len(rest)}): {some(rest, MOST_SHOWN)}"
    rows = []
    for m in found.metrics:
        numbers = isinstance(m.before, float | int) and isinstance(m.now, float | int)
        change = f"{m.now - m.before:+.4g}" if numbers else ""
        half_width = "" if m.half_width is None else f"{m.half_width:.2g}"
        rows.append([m.file, m.name, _text(m.before), _text(m.now), change, half_width])
    if rows:
        yield Part("Metrics", ["metrics", "", *sides, "change", "±"], rows, 2)
    if any(metric.half_width for metric in found.metrics):
        yield f"±: half of the 95 % interval over problems, of {found.now}; no seeds"
    if found.out_of_date:
        stages = [f"{name} ({some(why)})" for name, why in found.out_of_date.items()]
        yield f"out of date, and not run yet (`dvc status`): {some(stages, MOST_SHOWN)}"
    if not (reached or found.metrics or found.data or found.params or found.out_of_date):
        yield "nothing differs"


def _shown_ancestry(found: Ancestry) -> Iterator[Part | Tree | str]:
    path, text, verdict = found.verdict
    text = text.partition("; ")[0] if verdict == "whole" else text  # the tree has what it comes of
    lines = [f"{path}: {verdict}: {text}"]
    if found.running:
        lines.append(f"stages that run: {', '.join(found.running)}; what they write is left out")
    lines.append(f"commit: {found.commit or 'none has it'}")
    if found.compared_with:
        rows = f"{found.overlap_rows:,} of {found.training_rows:,} training rows"
        lines.append(f"overlap with {' and '.join(found.compared_with)}: {rows}")
    if found.not_compared:
        lines.append(f"overlap not counted of {', '.join(found.not_compared)}")
    if found.hosts:
        here = f"{found.runs_here} of {found.num_stages} stages ran here"
        lines.append(f"{here}: {found.seconds:.0f} s, {', '.join([*found.hosts, *found.versions])}")
    yield "\n".join(lines)
    yield _tree(found.output)


def _tree(ancestor: Ancestor) -> Tree:
    label = Text(ancestor.path, "bold", no_wrap=True, overflow="ellipsis")
    label.append(f" {_short(ancestor.md5)}", "dim")
    if ancestor.stage:
        label.append(f" by {ancestor.stage}" + " (above)" * ancestor.is_above, "cyan")
    if ancestor.rows is not None:
        label.append(f", {ancestor.rows:,} rows", "not bold")
    for line in filter(None, map(", ".join, _facts(ancestor))):
        label.append(f"\n{line}", "not bold")
    tree = Tree(label)
    tree.children += map(_tree, ancestor.made_of)
    return tree


def _facts(ancestor: Ancestor) -> Iterator[list[str]]:
    """What is said of an ancestor, by lines."""
    license_ = ancestor.license and f"license {ancestor.license}"
    yield [text for text in (license_, not ancestor.stage and ancestor.desc) if text]
    made = [f"{ancestor.run['seconds']:.0f} s"] if "seconds" in ancestor.run else []
    if ancestor.code:
        made.append(f"{ancestor.num_modules} modules of code {_short(ancestor.code)}")
    counts = sorted(ancestor.counts.items(), key=lambda count: count[0] not in FIRST_COUNTS)
    yield made + [f"{name} {_text(value)}" for name, value in counts]
    own = f"{ancestor.stage}."
    params = sorted(ancestor.params.items(), key=lambda item: not item[0].startswith(own))
    yield [f"{name.removeprefix(own)} {_text(value)}" for name, value in params]


def _colored(part: Part) -> Table:
    shown = Table(title=part.title, title_justify="left")
    for number, name in enumerate(part.header):
        shown.add_column(name, justify="left" if number < part.num_left else "right")
    for row in part.rows:
        shown.add_row(*row, style=next((COLORS[cell] for cell in row if cell in COLORS), None))
    return shown


def _text(value: Any) -> str:
    """Numbers to six digits, those of things with commas."""
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _short(digest: str | None) -> str:
    return "-" if digest is None else digest[:8]
