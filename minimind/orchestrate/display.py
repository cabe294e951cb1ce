"""What is shown meanwhile: a line when a stage starts or ends, on a terminal also what runs."""

import sys
from collections.abc import Collection
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from minimind.orchestrate.process import StageProcess

STYLES = {"failed": "bold red", "stopped": "yellow", "ran": "green"}


class Display:
    """Lines that stay, and below them on a terminal one for each running stage."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, line: str, how: str = "") -> None:
        self._console.print(Text(line, STYLES.get(how, "")), soft_wrap=True)

    def started(self, stage: StageProcess) -> None:
        if not self._console.is_terminal:  # there it has a line as long as it runs
            self.say(f"{stage.stage}: started, threads: {stage.threads}, log: {stage.log}")

    def show(self, running: Collection[StageProcess], num_over: int, num_stages: int) -> None:
        if not self._live.is_started:
            return
        lines = Table.grid(padding=(0, 2))
        for _ in range(3):
            lines.add_column(no_wrap=True)
        lines.add_column(no_wrap=True, overflow="ellipsis", style="dim", ratio=1)
        for stage in running:
            time, threads = f"{stage.seconds:.0f} s", f"threads: {stage.threads}"
            lines.add_row(stage.stage, time, threads, stage.last_line())
        lines.add_row(f"{num_over}/{num_stages}", "", "", "Ctrl-C saves and stops")
        self._live.update(lines, refresh=True)
