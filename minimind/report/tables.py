"""Markdown tables with aligned columns, to be read in a terminal too."""

import unicodedata
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """A table; its first `num_left` columns are aligned to the left, the others to the right."""
    lines = [[_escape(cell) for cell in row] for row in (header, *rows)]
    # Markdown wants three dashes below a title.
    widths = [max(3, *(_width(row[i]) for row in lines)) for i in range(len(header))]
    rule = ["-" * (width - (i >= num_left)) for i, width in enumerate(widths)]
    lines.insert(1, [dashes + ":" * (i >= num_left) for i, dashes in enumerate(rule)])
    for line in lines:
        for i, (cell, width) in enumerate(zip(line, widths, strict=True)):
            space = " " * (width - _width(cell))
            line[i] = cell + space if i < num_left else space + cell
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<").replace("\n", " ⏎ ")


def _width(text: str) -> int:
    """Columns of a terminal that a text takes: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
