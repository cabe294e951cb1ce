"""One stage: a process of DVC with its log."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# DVC's words for what a second try may mend: --wait-for-lock does not cover its list of who reads
# and writes what.
BUSY = ("Unable to acquire lock", "is busy, it is being blocked by")
FROM_CACHE, UNCHANGED = "is cached - skipping run", "didn't change, skipping"
OF_DVC = "ERROR: failed to reproduce"  # is said after what the stage itself says
LOG_TAIL_BYTES = 4096


@dataclass
class StageProcess:
    """A running `dvc repro --single-item`."""

    stage: str
    log: Path
    threads: int
    environment: Mapping[str, str]
    force: bool
    started: float = field(default_factory=time.monotonic)
    _told: set[tuple[int, int]] = field(default_factory=set)  # signals, by process

    def __post_init__(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.begin()

    def begin(self) -> None:
        """Start it, or start it again."""
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item"]
        command += [*["--force"] * self.force, "--", self.stage]
        with self.log.open("wb") as file:
            # In a session of its own Ctrl-C does not reach DVC, which is to record what is done.
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def met_another(self) -> bool:
        """Whether another DVC process was in the way, and nothing else is wrong."""
        return self.process.returncode != 0 and any(word in self._said() for word in BUSY)

    @property
    def outcome(self) -> str:
        if self.process.returncode:
            return "failed"
        said = self._said()
        return "unchanged" if UNCHANGED in said else "from cache" if FROM_CACHE in said else "ran"

    def last_line(self) -> str:
        """Of the log; what the stage said last where DVC adds to it."""
        lines = [line for line in self._said().splitlines() if line.strip()]
        own = [line for line in lines if not line.startswith(OF_DVC)] or lines or [""]
        return "".join(char if char.isprintable() else " " for char in own[-1]).strip()

    def send(self, number: int) -> None:
        """A signal to what DVC runs, once to each process.

        torchrun's workers have sessions of their own, and hear of it from torchrun.
        """
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    is_worker = os.getpgid(child.pid) != self.process.pid
                    if not is_worker and (child.pid, number) not in self._told:
                        self._told.add((child.pid, number))
                        child.send_signal(number)

    def end(self, number: int = signal.SIGINT) -> None:
        """Have what DVC runs end, and wait for both."""
        while self.process.poll() is None:
            self.send(number)
            time.sleep(0.05)

    def _said(self) -> str:
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
