"""Draw a session of `minimind chat`: python docs/chat_svg.py FILE.svg CHECKPOINT... -- LINE..."""

import re
import sys
from html import unescape
from io import StringIO
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console

from minimind.talk.conversation import Settings
from minimind.talk.session import Session
from minimind.talk.speaker import open_speaker

file, *arguments = sys.argv[1:]
split = arguments.index("--")
names, lines = arguments[:split], arguments[split + 1 :]
console = Console(file=StringIO(), record=True, width=100, highlight=False, markup=False)
session = Session(console, [open_speaker(name) for name in names], Settings(), open_speaker)
for line in lines:
    console.print(f"> {line}", style="bold")
    session.handle(line)
title = " ".join(["minimind chat", *names])
# rich gives Chinese characters the width of one column: they would overlap.
svg = re.sub(
    r'textLength="[^"]*"([^>]*>)([^<]*)',
    lambda match: f'textLength="{12.2 * cell_len(unescape(match[2])):.1f}"{match[1]}{match[2]}',
    console.export_svg(title=title),
)
Path(file).write_text(svg, encoding="utf-8")
