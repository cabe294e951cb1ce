"""Draw what a command shows on a terminal: the pictures of these pages, in a project.

    python docs/picture.py plan.svg minimind plan -S sft.lr=1e-3
    python docs/picture.py --after 60 repro.svg minimind repro

The terminal is pyte, of the extra `docs`. With --after it is as it was then, and the command is
stopped.
"""

import argparse
import os
import pty
import select
import shlex
import subprocess
import termios
import time
from io import StringIO
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--width", type=int, default=112)
parser.add_argument("--after", type=float, help="seconds")
parser.add_argument("file", type=Path)
parser.add_argument("command", nargs=argparse.REMAINDER)
asked = parser.parse_args()

screen = pyte.Screen(asked.width, 200)
stream = pyte.ByteStream(screen)
ours, its = pty.openpty()
termios.tcsetwinsize(its, (screen.lines, screen.columns))
variables = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(asked.width)}
process = subprocess.Popen(asked.command, stdin=its, stdout=its, stderr=its, env=variables)
os.close(its)


def show_until(end: float) -> None:
    while time.monotonic() < end:
        has_ended = process.poll() is not None  # what it started may run on, and hold the terminal
        if select.select([ours], [], [], 0.1)[0]:
            try:
                stream.feed(os.read(ours, 65536))
            except OSError:  # nobody holds it
                return
        elif has_ended:
            return


def style_of(char: pyte.screens.Char) -> Style:
    color = {"default": None, "brown": "yellow"}.get(char.fg, char.fg.replace("bright", "bright_"))
    return Style(color=color, bold=char.bold, italic=char.italics)


show_until(time.monotonic() + (asked.after or 86_400))
filled = max(number for number, line in enumerate(screen.display) if line.strip()) + 1
console = Console(file=StringIO(), record=True, width=asked.width, force_terminal=True)
for number in range(filled):
    cells = (screen.buffer[number][column] for column in range(asked.width))
    parts = (("".join(cell.data for cell in run), style) for style, run in groupby(cells, style_of))
    line = Text.assemble(*parts)
    line.rstrip()
    console.print(line, no_wrap=True, crop=True)
title = shlex.join(asked.command)
asked.file.write_text(console.export_svg(title=title), encoding="utf-8")
if process.poll() is None:
    process.terminate()
    show_until(time.monotonic() + 3600)
