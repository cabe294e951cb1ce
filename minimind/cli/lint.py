"""`minimind lint`: look for what is wrong with data before anything is trained on it."""

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn

from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.sources import shown_path, unread_files
from minimind.datasets.unread_keys import UnreadKeys
from minimind.errors import UserError
from minimind.lint import Against, LintFormat, detect_format
from minimind.lint import lint as lint_rows
from minimind.report.tables import table
from minimind.tasks.problem import KNOWN_KEYS


def lint(
    files: Annotated[list[Path], typer.Argument(help="files of rows, or folders of them")],
    data_format: Annotated[
        Literal["auto", LintFormat],
        typer.Option("--format", help="what a row is; auto: as the first row's keys say"),
    ] = "auto",
    tokenizer: Annotated[
        Path | None, typer.Option(help="directory of a tokenizer, to look for lost characters")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="tokens a row may have; needs --tokenizer")
    ] = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="evaluation data that must not be in the files")
    ] = None,
    similarity: Annotated[
        float, typer.Option(min=0.3, max=1, help="of questions that are nearly the same")
    ] = 0.7,
    show: Annotated[int, typer.Option(min=0, help="findings of a kind to show of a file")] = 20,
    strict: Annotated[bool, typer.Option("--strict", help="warnings fail, too")] = False,
) -> None:
    """Check data sets row by row; exit code 1 if there are errors."""
    if max_length and not tokenizer:
        raise UserError("--max-length counts tokens; give --tokenizer, too.")
    loaded = ChatTokenizer.load(tokenizer) if tokenizer else None
    evaluation = Against.read(against or [], similarity)
    rows: list[list[str]] = []
    levels = Counter[str]()
    for file in files:
        name = shown_path(file)
        for unread_file in unread_files(file):
            typer.echo(f"{name}: not read: {unread_file}")
        counts, unread, formats = Counter[tuple[str, str]](), UnreadKeys(), Counter[str]()
        num_rows, found_format = 0, "?"
        try:
            found_format = detect_format(file) if data_format == "auto" else data_format
            unread = UnreadKeys(KNOWN_KEYS if found_format == "prompts" else ())
            linted = lint_rows(file, found_format, evaluation, loaded, max_length, unread, formats)
            with _row_counter() as counter:
                for findings in counter.track(linted, description=name):
                    num_rows += 1
                    for finding in findings:
                        counts[finding.level, finding.kind] += 1
                        if counts[finding.level, finding.kind] <= show:
                            typer.echo(str(finding))
        except UserError as error:
            typer.echo(f"{name}: error: unreadable: {error}")
            counts["error", "unreadable"] += 1
        if found := ", ".join(f"{number} {name}" for name, number in formats.items()):
            typer.echo(f"{name}: rows that are read: {found}")
        if keys := unread.shown(warned=False):
            typer.echo(f"{name}: keys that are not read: {keys}")
        if keys := unread.shown(warned=True):
            typer.echo(f"{name}: warning: unread: keys that are not read: {keys}")
            counts["warning", "unread"] = unread.num_warned
        for (level, kind), count in sorted(counts.items()):  # errors first
            if count > show and kind != "unread":
                typer.echo(f"{name}: {level}: {kind}: {count - show} more (--show)")
            levels[level] += count
            share = f"{count / num_rows:.2%}" if num_rows else ""
            rows.append([name, found_format, level, kind, str(count), str(num_rows), share])
        if not counts:
            rows.append([name, found_format, "-", "nothing found", "0", str(num_rows), ""])
    typer.echo(table(["file", "format", "level", "kind", "found", "rows", "share"], rows, 4))
    if levels["error"] or (strict and levels["warning"]):
        raise typer.Exit(1)


def _row_counter() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.completed:,} rows"),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not sys.stderr.isatty(),
    )
