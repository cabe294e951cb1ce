"""A training loop that is not ours, held at each of its steps until we want the next one."""

import threading
from collections.abc import Callable


class Paced:
    """Runs a loop in a thread of its own; the loop calls `wait` where a step begins.

    So each step is timed as its own loop makes it, with whatever belongs to it, and steps of
    several peers can take turns.
    """

    def __init__(self, loop: Callable[[Callable[[], None]], None]) -> None:
        self._loop = loop
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()
        self._wait_for_loop()

    def step(self) -> None:
        """Let the loop run to the beginning of its next step."""
        self._go.release()
        self._wait_for_loop()

    def _wait(self) -> None:
        self._done.release()
        self._go.acquire()

    def _run(self) -> None:
        try:
            self._loop(self._wait)
            self._error = RuntimeError("the loop ended before the measurement did")
        except BaseException as error:  # told to whoever asks for a step
            self._error = error
        self._done.release()

    def _wait_for_loop(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise self._error
