"""What is shown meanwhile: a line when a stage starts or ends, on a terminal also what runs."""

import sys
from collections.abc import Collection
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from minimind.orchestrate.process import StageProcess

WIDE = 80  # columns of a terminal that has room for all
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
        widest = max((len(stage.stage) for stage in running), default=0)
        lines = []
        for stage in running:
            threads = f"threads: {stage.threads}  " * (self._console.width >= WIDE)
            begin = f"{stage.stage:<{widest}}  {stage.seconds:4.0f} s  {threads}"
            said = (stage.last_line().removeprefix(f"{stage.stage}: "), "dim")
            lines.append(Text.assemble(begin, said, no_wrap=True, overflow="ellipsis"))
        lines.append(Text(f"{num_over}/{num_stages}  Ctrl-C saves and stops", "dim"))
        self._live.update(Group(*lines), refresh=True)
