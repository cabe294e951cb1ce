"""What a part of the reward is given, and what it is."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimind.params import Section
from minimind.tasks.problem import Problem

Values = NDArray[np.float64]


class Sample(NamedTuple):
    """A completion to be judged."""

    problem: Problem
    completion: str  # tags included, control tokens not
    ids: list[int]  # of the completion
    finished: bool  # whether it ended by itself


RewardModel = Callable[[Sequence[Sample]], Sequence[float]]
CustomReward = Callable[[str, str, str | None], float]  # of prompt, completion and answer


@dataclass(frozen=True)
class Given:
    """What parts may need beside their options."""

    max_new_tokens: int
    reward_model: RewardModel | None = None
    custom: CustomReward | None = None


class Reward(Section):
    """One part of the reward.

    A module of this package has its class by the name REWARD. The module's name is the key of the
    part's weight in `rewards`, where the fields of the class, its options, are keys as well.
    """

    default_weight: ClassVar[float] = 0.0

    def bounds(self) -> tuple[float, float]:
        """The least and the greatest value, so that the whole can be scaled to [0, 1]."""
        return 0.0, 1.0

    @abstractmethod
    def score(self, samples: Sequence[Sample], given: Given) -> Sequence[float] | Values:
        """The value of each sample."""
