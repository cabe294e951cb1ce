"""Draw docs/compare.svg: what `minimind compare` prints in a terminal.

python -m benchmarks.compare_picture reason grpo
"""

import sys

from rich.console import Console

from minimind.cli import compare

if __name__ == "__main__":
    console = Console(record=True, width=140, force_terminal=True)
    compare.Console = lambda: console  # type: ignore[assignment,misc]
    compare.compare(sys.argv[1:])
    title = f"minimind compare {' '.join(sys.argv[1:])}"
    console.save_svg("docs/compare.svg", title=title)
