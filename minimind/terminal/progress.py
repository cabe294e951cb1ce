"""What the terminal shows while a stage trains: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

SHOWN = {  # of a step's values, in this order
    "loss": "loss {:.3f}",
    "val_loss": "val {:.3f}",
    "reward": "reward {:.3f}",
    "completion_length": "length {:.0f}",
    "lr": "lr {:.2g}",
}
SPEED_SECONDS = 10.0  # that tokens per second are of
REFRESH_SECONDS = 0.1


class TimeLeft:
    """How long the rest of some work will take, by the time that its parts took so far.

    The first part does not count: compiling and warming up are in it. The others are averaged with
    weights that fade over a tenth of all parts. So at constant speed the estimate is exact, and a
    part that takes k times as long as others of its size, be it for an evaluation, changes
    it by a factor of 1 + (k - 1) * max(1 / n, 1 / memory) at most, where n parts are counted.
    """

    def __init__(self, work: float, num_parts: int) -> None:
        """work: all that is to be done, in any unit, by num_parts parts or so."""
        self._left, self._memory = work, max(10.0, num_parts / 10)
        self._counted = -1
        self._seconds = self._work = 0.0  # faded means of a part

    def update(self, work: float, seconds: float) -> None:
        """A part is done: so much work, in so many seconds."""
        self._left -= work
        self._counted += 1
        if self._counted:
            weight = max(1 / self._counted, 1 / self._memory)
            self._seconds += weight * (seconds - self._seconds)
            self._work += weight * (work - self._work)

    @property
    def seconds(self) -> float | None:
        """None before two parts are done."""
        return max(0.0, self._left) * self._seconds / self._work if self._work else None


class Progress:
    """Steps of a known number, with their values, recent speed and the time left.

    A context: the bar is gone after it, however it is left.
    """

    def __init__(
        self,
        stage: str,
        num_steps: int,
        first_step: int,
        tokens_left: int | None,
        log_seconds: float,
        silent: bool,
    ) -> None:
        """tokens_left: in the steps from first_step on; None where nobody knows beforehand."""
        self.stage, self.num_steps, self.first_step = stage, num_steps, first_step
        self.log_seconds, self.silent = log_seconds, silent
        self.counts_tokens = tokens_left is not None
        steps_left = num_steps - first_step
        self.time_left = TimeLeft(steps_left if tokens_left is None else tokens_left, steps_left)
        self._values: dict[str, float] = {}
        self._last_shown = 0.0
        self._recent: deque[tuple[float, int]] = deque()  # moments, tokens done until then
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        self._last_shown = time.monotonic()
        self._recent.append((self._last_shown, 0))
        console = Console(stderr=True)  # knows NO_COLOR, and terminals without a cursor to move
        if console.is_interactive and sys.stderr.isatty() and not self.silent:
            self._bar = Bar(
                TextColumn(self.stage, markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.description}", markup=False),
                console=console,
                auto_refresh=False,  # no thread beside the training
                redirect_stdout=sys.stdout.isatty(),  # lines above the bar, but nothing into a file
                expand=True,
            )
            self._bar.start()
            console.show_cursor()  # a killed process could not bring it back
            self._task = self._bar.add_task("", total=self.num_steps, completed=self.first_step)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, num_done: int, values: Mapping[str, float], tokens: int) -> None:
        """After `num_done` steps, the last of which was over `tokens` tokens."""
        now = time.monotonic()
        then, tokens_before = self._recent[-1]
        self.time_left.update(tokens if self.counts_tokens else 1, now - then)
        self._recent.append((now, tokens_before + tokens))
        while now - self._recent[1][0] > SPEED_SECONDS:
            self._recent.popleft()
        self._values |= {name: values[name] for name in SHOWN if name in values}
        interval = REFRESH_SECONDS if self._bar else self.log_seconds
        if now - self._last_shown < interval and num_done != self.num_steps:
            return
        self._last_shown = now
        if self._bar is not None:
            self._bar.update(self._task, completed=num_done, description=self._said(), refresh=True)
        elif not self.silent:
            line = f"{self.stage}: step {num_done}/{self.num_steps}  {self._said()}"
            print(line, file=sys.stderr, flush=True)

    def _said(self) -> str:
        (first, tokens_before), (last, tokens) = self._recent[0], self._recent[-1]
        speed = (tokens - tokens_before) / max(last - first, 1e-9)
        shown = [name for name in SHOWN if name in self._values]
        said = [SHOWN[name].format(self._values[name]) for name in shown]
        said.append(f"{speed:,.0f} tok/s")
        if (left := self.time_left.seconds) is not None:
            said.append(f"{clock(left)} left")
        return "  ".join(said)


def clock(seconds: float) -> str:
    """1:05 or 2:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
