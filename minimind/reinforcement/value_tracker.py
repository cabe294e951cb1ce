"""The value tracker of Single-stream Policy Optimization (SPO, arXiv:2509.13232).

For each prompt a Beta distribution over its success: what the policy can be expected to earn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from minimind.params import Section
from minimind.reinforcement.draws import Indices
from minimind.rewards.reward import Values


class TrackerConfig(Section):
    """How fast what was seen is forgotten, and which prompts are preferred."""

    d_half: float = Field(0.06, gt=0)  # change of the policy after which half of it is forgotten
    rho_min: float = Field(0.5, gt=0, lt=1)  # share that is kept at least
    rho_max: float = Field(0.96, gt=0, lt=1)  # and at most
    initial_samples: int = Field(2, gt=0)  # completions of each prompt to start from
    exploration: float = Field(0.05, gt=0)  # added to every prompt's weight

    @model_validator(mode="after")
    def _fits(self) -> "TrackerConfig":
        if self.rho_min > self.rho_max:
            raise ValueError(f"rho_min {self.rho_min} must be at most rho_max {self.rho_max}")
        return self


class Visit(NamedTuple):
    """What a prompt was last answered with, and how likely that was then."""

    completion: list[int]
    logprobs: list[float]


class ValueTracker:
    """Pseudo-counts of success `a` and failure `b` for each prompt [P], and its last visit."""

    def __init__(self, config: TrackerConfig, num_prompts: int) -> None:
        self.config = config
        self.a: Values = np.zeros(num_prompts)
        self.b: Values = np.zeros(num_prompts)
        self.visits = [Visit([], [])] * num_prompts

    def initialize(self, prompts: Indices, rewards: Values, visits: Sequence[Visit]) -> None:
        """Start prompts [p] from a few rewards each, [p, initial_samples], in [0, 1].

        They count as 1/(1 - rho_min) observations, as many as the tracker keeps when it forgets
        as fast as it can.
        """
        weight = 1 / (1 - self.config.rho_min)
        successes = rewards.sum(axis=1) + 0.5
        failures = (1 - rewards).sum(axis=1) + 0.5
        self.a[prompts] = weight * successes / (successes + failures)
        self.b[prompts] = weight * failures / (successes + failures)
        self._remember(prompts, visits)

    @property
    def num_tried(self) -> int:
        """Of the prompts, which are initialized in their order."""
        return int(np.count_nonzero(self.a))

    def values(self) -> Values:
        """Expected reward of every prompt: the distributions' means [P]."""
        return self.a / (self.a + self.b)

    def weights(self) -> Values:
        """How much each prompt is worth drawing: most where its outcome is most uncertain [P]."""
        values = self.values()
        return np.sqrt(values * (1 - values)) + self.config.exploration

    def rho(self, change: Values) -> Values:
        """The share of the past that is kept after a change of the policy: 2^(-D / d_half)."""
        return np.clip(
            2 ** (-change / self.config.d_half), self.config.rho_min, self.config.rho_max
        )

    def update(
        self, prompts: Indices, rewards: Values, change: Values, visits: Sequence[Visit]
    ) -> Values:
        """Forget some of the past of prompts [p] and add a reward in [0, 1] each; returns rho.

        To be called after the advantages have been taken: a reward is no part of its own baseline.
        """
        rho = self.rho(change)
        self.a[prompts] = rho * self.a[prompts] + rewards
        self.b[prompts] = rho * self.b[prompts] + (1 - rewards)
        self._remember(prompts, visits)
        return rho

    def _remember(self, prompts: Indices, visits: Sequence[Visit]) -> None:
        for prompt, visit in zip(prompts, visits, strict=True):
            self.visits[prompt] = visit

    def state_tensors(self) -> dict[str, Tensor]:
        """All of it, for the resume checkpoint."""
        lengths = np.array([len(visit.completion) for visit in self.visits])
        return {
            "a": torch.from_numpy(self.a),
            "b": torch.from_numpy(self.b),
            "lengths": torch.from_numpy(lengths),
            "completions": torch.tensor(
                [token for visit in self.visits for token in visit.completion], dtype=torch.int64
            ),
            "logprobs": torch.tensor(
                [value for visit in self.visits for value in visit.logprobs], dtype=torch.float64
            ),
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.a, self.b = tensors["a"].numpy().copy(), tensors["b"].numpy().copy()
        ends = np.cumsum(tensors["lengths"].numpy())
        completions = np.split(tensors["completions"].numpy(), ends[:-1])
        logprobs = np.split(tensors["logprobs"].numpy(), ends[:-1])
        self.visits = [
            Visit(completion.tolist(), values.tolist())
            for completion, values in zip(completions, logprobs, strict=True)
        ]


def mean_change(before: Sequence[float], now: Tensor) -> float:
    """Mean absolute change of the log-probabilities of a completion's tokens."""
    return float((now.double() - torch.tensor(before, dtype=torch.float64)).abs().mean())
