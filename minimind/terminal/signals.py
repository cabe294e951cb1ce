"""Being asked to stop: by a signal, or because the DVC process that started us is gone.

A stage is never torn from the middle of a step: the request is a flag that the training loop
reads between two steps, where it saves a resume checkpoint and leaves with the signal's exit code.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from types import FrameType

import psutil

from minimind.errors import Stopped
from minimind.lineage.dvc_process import is_elsewhere, writers

# Of a person, dvc, systemd, docker, Slurm and a terminal that closes. Windows has two of them.
ASKING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
# Whatever else ends a process and is no fault of its own: a battery, a timer, a line that wakes.
RARE = ("SIGPWR", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGSTKFLT", "SIGRTMIN", "SIGRTMAX")
NAMES = tuple(name for name in (*ASKING, *RARE) if hasattr(signal, name))
# Slurm signals every process of a job, and those that start others pass it on as well: there, the
# same signal again so soon is the same wish.
ECHO_SECONDS = 2.0
SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh"}


class GivenUp(Stopped):
    """A signal came in the middle of what may be left undone."""


class StopRequest:
    """Set by a signal or the death of the parent; the same signal again acts at once.

    One of each may come for a single wish: Ctrl-C reaches a process both directly and through
    the launcher that starts it.

    at_once: raise :class:`GivenUp` where the signal finds us, for a stage with nothing to save.
    listening: False leaves the signals alone, as a library should. One that is ignored from the
        start, as by nohup, stays ignored.
    """

    def __init__(self, at_once: bool = False, listening: bool = True) -> None:
        self.at_once = at_once
        self.signal = 0
        self._came: dict[int, float] = {}  # when each came first
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (catchable() if listening else ())
        }

    @property
    def requested(self) -> bool:
        return self.signal != 0

    @property
    def exit_code(self) -> int:
        return 128 + self.signal

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.signal, now = number, time.monotonic()
        age = now - self._came.setdefault(number, now)
        if age > (ECHO_SECONDS if _is_passed_on() else 0.0):
            signal.signal(number, self._previous.pop(number))
            signal.raise_signal(number)
        if self.at_once and not age:
            raise self._given_up()

    @contextmanager
    def giving_up(self) -> Iterator[None]:
        """What is done inside, and changes nothing, is given up as soon as a signal comes.

        Raises:
            GivenUp: one has come.
        """
        before, self.at_once = self.at_once, True
        try:
            if self.requested:
                raise self._given_up()
            yield
        finally:
            self.at_once = before

    def _given_up(self) -> "GivenUp":
        return GivenUp("asked to stop. Run the same command again.", self.exit_code)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _is_passed_on() -> bool:
    return is_elsewhere() or not {"SLURM_JOB_ID", "RANK"}.isdisjoint(os.environ)


def catchable() -> list[int]:
    """Numbers of the signals that ask to stop, but for those ignored from the start."""
    numbers = [int(getattr(signal, name)) for name in NAMES]
    if hasattr(signal, "SIGRTMIN"):
        numbers += range(signal.SIGRTMIN + 1, signal.SIGRTMAX)  # they have no names of their own
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def watch_parents(interval_seconds: float = 0.5) -> None:
    """Send ourselves SIGTERM when the process that started us dies.

    DVC starts commands through a shell, which outlives a killed DVC; so the first ancestor that
    is no shell is watched, and every shell on the way.
    """
    ancestors = psutil.Process().parents()
    pids = set() if is_elsewhere() else {*writers().values()}
    # If DVC died before we could look, and left us to some other process, then its list of who
    # writes what names others than our ancestors alone.
    if pids and pids.isdisjoint(ancestor.pid for ancestor in ancestors):
        os.kill(os.getpid(), signal.SIGTERM)
    num_shells = len(list(takewhile(lambda ancestor: ancestor.name() in SHELLS, ancestors)))
    watched = ancestors[: num_shells + 1]

    def watch() -> None:
        # is_running compares creation times too, so a reused process number does not fool it.
        while all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in watched):
            time.sleep(interval_seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-parents", daemon=True).start()
