"""Learning-rate schedules: a function of the optimizer step, counted from 0."""

import math
from typing import Literal

ScheduleName = Literal["minimind_cosine", "cosine", "linear", "step", "constant"]


def learning_rate(
    name: ScheduleName, lr: float, step: int, num_steps: int, warmup_steps: int
) -> float:
    """The rate of optimizer step `step` (0-based) of `num_steps`.

    Over the first `warmup_steps` steps the schedule's start value is reached linearly, the first
    step already moving; after them, progress runs from 0 towards 1:

    - ``minimind_cosine``: lr/10 + lr/2 · (1 + cos(π · progress)): from 1.1 lr to lr/10
    - ``cosine``: from lr to lr/10
    - ``linear``: from lr to 0
    - ``step``: lr, a tenth of it from 50 %, a hundredth from 75 %
    - ``constant``: lr
    """
    if step < warmup_steps:
        start = learning_rate(name, lr, 0, num_steps, 0)
        return start * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    half_wave = (1 + math.cos(math.pi * progress)) / 2
    match name:
        case "minimind_cosine":
            return lr / 10 + lr * half_wave
        case "cosine":
            return lr / 10 + (lr - lr / 10) * half_wave
        case "linear":
            return lr * (1 - progress)
        case "step":
            return lr * (0.1 if progress >= 0.5 else 1.0) * (0.1 if progress >= 0.75 else 1.0)
        case "constant":
            return lr
