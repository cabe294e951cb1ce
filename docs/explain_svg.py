"""Draw what `minimind explain` shows: python docs/explain_svg.py FILE.svg A [B], in a project."""

import sys
from io import StringIO
from pathlib import Path

from rich.console import Console

from minimind.cli.explain import answer, show

file, before, *now = sys.argv[1:]
console = Console(file=StringIO(), record=True, width=112, force_terminal=True)
show(console, answer(before, now[0] if now else None)[1])
title = " ".join(["minimind explain", before, *now])
Path(file).write_text(console.export_svg(title=title), encoding="utf-8")
