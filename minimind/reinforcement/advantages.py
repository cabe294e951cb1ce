"""Advantages: by how much a completion was better than expected."""

import numpy as np
from numpy.typing import NDArray

from minimind.rewards.reward import Values

# Below so many samples, dividing by their deviation says more about the draw than about them:
# of two samples it always makes +0.71 and -0.71.
MIN_SAMPLES_TO_NORMALIZE = 16
STD_EPSILON = 1e-4


def group_advantages(rewards: Values, num_generations: int, divide_by_std: bool) -> Values:
    """Rewards relative to those of the same prompt (arXiv:2402.03300, section 4.1.2).

    ``(r - mean) / (std + 1e-4)`` in each group of `num_generations` successive rewards, with the
    deviation of a sample (N - 1); without the division for Dr. GRPO (arXiv:2503.20783, eq. 3).
    """
    groups = rewards.reshape(-1, num_generations)
    advantages = groups - groups.mean(axis=1, keepdims=True)
    # Rounding of the mean must not be blown up to a signal where there is none.
    advantages[~has_signal(rewards, num_generations)] = 0.0
    if divide_by_std:
        advantages = advantages / (groups.std(axis=1, ddof=1, keepdims=True) + STD_EPSILON)
    return advantages.reshape(-1)


def has_signal(rewards: Values, num_generations: int) -> NDArray[np.bool_]:
    """For each group whether its rewards differ; where they do not, there is nothing to learn."""
    groups = rewards.reshape(-1, num_generations)
    return (groups != groups[:, :1]).any(axis=1)


def single_stream_advantages(rewards: Values, values: Values) -> Values:
    """Rewards relative to each prompt's expected one (arXiv:2509.13232, section 3).

    Normalized over the step's samples where there are enough of them.
    """
    advantages = rewards - values
    if len(advantages) < MIN_SAMPLES_TO_NORMALIZE:
        return advantages
    centered = advantages - advantages.mean()
    return centered / (advantages.std(ddof=1) + STD_EPSILON)
