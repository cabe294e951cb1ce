"""`minimind lint`: look for what is wrong with data before anything is trained on it."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer
from tqdm import tqdm

from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.lint import Against, LintFormat, detect_format
from minimind.datasets.lint import lint as lint_rows
from minimind.errors import UserError
from minimind.report.tables import table

Row = list[str]


def lint(
    files: Annotated[list[Path], typer.Argument(help="JSONL files, or folders of *.jsonl shards")],
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
    rows: list[Row] = []
    num_errors = num_warnings = 0
    for file in files:
        counts: Counter[tuple[str, str]] = Counter()
        num_rows = 0
        found_format = "?"
        try:
            found_format = detect_format(file) if data_format == "auto" else data_format
            linted = lint_rows(file, found_format, evaluation, loaded, max_length)
            for findings in tqdm(linted, str(file), unit=" rows", leave=False, disable=None):
                num_rows += 1
                for finding in findings:
                    counts[finding.level, finding.kind] += 1
                    if counts[finding.level, finding.kind] <= show:
                        tqdm.write(str(finding))
        except UserError as error:
            typer.echo(f"{file}: error: unreadable: {error}")
            counts["error", "unreadable"] += 1
        for (level, kind), count in sorted(counts.items()):
            if count > show:
                typer.echo(f"{file}: {level}: {kind}: {count - show} more (--show)")
        rows += _summary(file, found_format, num_rows, counts, show)
        num_errors += sum(count for (level, _), count in counts.items() if level == "error")
        num_warnings += sum(count for (level, _), count in counts.items() if level == "warning")
    typer.echo(table(["file", "format", "level", "kind", "found", "rows", "share"], rows, 4))
    if num_errors or (strict and num_warnings):
        raise typer.Exit(1)


def _summary(
    file: Path, data_format: str, num_rows: int, counts: Counter[tuple[str, str]], show: int
) -> list[Row]:
    """A line for each kind of finding; errors first, then by name."""
    if not counts:
        return [[str(file), data_format, "-", "nothing found", "0", str(num_rows), ""]]
    return [
        [
            str(file),
            data_format,
            level,
            kind,
            str(count),
            str(num_rows),
            f"{count / num_rows:.2%}" if num_rows else "",
        ]
        for (level, kind), count in sorted(counts.items())
    ]
