"""Draw what `minimind show` shows: python docs/show_svg.py FILE.svg ROWS.jsonl, in a project."""

import sys
from io import StringIO
from pathlib import Path

from rich.console import Console

from minimind.chat.tokenizer import ChatTokenizer
from minimind.cli.show import print_rows
from minimind.datasets.formats import parse_chat, read_rows_and_bad_rows

file, rows = map(Path, sys.argv[1:])
console = Console(file=StringIO(), record=True, width=100, force_terminal=True)
found = list(read_rows_and_bad_rows(rows, parse_chat))
print_rows(console, found, ChatTokenizer.load("models/tokenizer"), "chat", None)
file.write_text(console.export_svg(title=f"minimind show {rows}"), encoding="utf-8")
