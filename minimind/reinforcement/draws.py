"""Which prompts a step of reinforcement takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minimind.datasets.epochs import num_steps, steps_per_epoch

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Draws:
    """Which prompts a step takes: a pure function of seed, step and, if given, weights."""

    num_prompts: int
    prompts_per_step: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.num_prompts, self.prompts_per_step)

    def num_steps(self, epochs: float, max_steps: int) -> int:
        """Steps of so many epochs, at most `max_steps` unless that is 0."""
        return num_steps(epochs, self.num_prompts, self.prompts_per_step, max_steps)

    def in_turn(self, step: int) -> Indices:
        """Every prompt once an epoch, in an order of the epoch's own; its last step is smaller."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.num_prompts)
        start = position * self.prompts_per_step
        return order[start : start + self.prompts_per_step]

    def by_weight(self, step: int, weights: Sequence[float] | NDArray[np.float64]) -> Indices:
        """Different prompts, each drawn with a chance in proportion to its weight."""
        shares = np.asarray(weights, dtype=np.float64)
        generator = np.random.default_rng([self.seed, 2, step])
        size = min(self.prompts_per_step, self.num_prompts)
        return generator.choice(
            self.num_prompts, size=size, replace=False, p=shares / shares.sum()
        ).astype(np.int64)
