"""Learning-rate schedules: a function of the optimizer step, counted from 0."""

import math
from typing import Literal

ScheduleName = Literal["minimind_cosine", "cosine", "linear", "step", "constant"]


def never_reached(name: ScheduleName, warmup_steps: int, num_steps: int) -> str | None:
    """A line of warning where the warm-up ends so late that no step has all of lr."""
    if warmup_steps <= num_steps or lr_factor(name, num_steps - 1, num_steps, warmup_steps) >= 1:
        return None
    return (
        f"warmup_steps is {warmup_steps} of only {num_steps} optimizer steps: the learning rate "
        f"never reaches lr; with warmup_steps {num_steps // 10} it would"
    )


def beyond_epochs(max_steps: int, num_steps: int, epochs: float) -> str | None:
    """A line of warning where `max_steps`, which bounds steps, is more than there are."""
    if max_steps <= num_steps:
        return None
    return (
        f"max_steps is {max_steps}, but {epochs:g} epochs have {num_steps}; raise epochs for more"
    )


def lr_factor(name: ScheduleName, step: int, num_steps: int, warmup_steps: int) -> float:
    """What `lr` is multiplied by in optimizer step `step` (0-based) of `num_steps`.

    Over the first `warmup_steps` steps the schedule's start value is reached linearly, the first
    step already moving; after them, progress runs from 0 towards 1:

    - ``minimind_cosine``: 1/10 + 1/2 · (1 + cos(π · progress)): from 1.1 to 1/10
    - ``cosine``: from 1 to 1/10
    - ``linear``: from 1 to 0
    - ``step``: 1, a tenth of it from 50 %, a hundredth from 75 %
    - ``constant``: 1
    """
    if step < warmup_steps:
        return lr_factor(name, 0, num_steps, 0) * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    half_wave = (1 + math.cos(math.pi * progress)) / 2
    match name:
        case "minimind_cosine":
            return 0.1 + half_wave
        case "cosine":
            return 0.1 + 0.9 * half_wave
        case "linear":
            return 1 - progress
        case "step":
            return (0.1 if progress >= 0.5 else 1.0) * (0.1 if progress >= 0.75 else 1.0)
        case "constant":
            return 1.0
