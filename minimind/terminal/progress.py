"""What the terminal shows while a stage works: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Steps done of a known number, with loss, tokens per second and time left."""

    def __init__(
        self, stage: str, num_steps: int, first_step: int, log_seconds: float, silent: bool
    ) -> None:
        self.stage, self.num_steps, self.first_step = stage, num_steps, first_step
        self.log_seconds, self.silent = log_seconds, silent
        self.started = self.last_line = time.monotonic()
        self.tokens = 0
        self.bar = (
            tqdm(total=num_steps, initial=first_step, desc=stage, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty() and not silent
            else None
        )

    def update(self, step: int, loss: float, tokens: int) -> None:
        """After optimizer step `step` (0-based) over `tokens` tokens."""
        self.tokens += tokens
        now = time.monotonic()
        seconds = now - self.started
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {self.tokens / seconds:,.0f} tok/s", False)
            self.bar.update()
        elif now - self.last_line >= self.log_seconds or step + 1 == self.num_steps:
            self.last_line = now
            done = step + 1 - self.first_step
            left = seconds / done * (self.num_steps - step - 1)
            self.say(
                f"step {step + 1}/{self.num_steps}  loss {loss:.4f}  "
                f"{self.tokens / seconds:,.0f} tok/s  {left:.0f} s left"
            )

    def say(self, message: str) -> None:
        """A line above the bar."""
        line = f"{self.stage}: {message}"
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        elif not self.silent:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
