"""Single-stream Policy Optimization (SPO, arXiv:2509.13232): one completion a prompt, no groups."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from minimind.model.transformer import Transformer
from minimind.reinforcement.advantages import single_stream_advantages
from minimind.reinforcement.config import ReinforcementConfig
from minimind.reinforcement.draws import Indices
from minimind.reinforcement.environment import Environment
from minimind.reinforcement.rollout import Rollout
from minimind.reinforcement.value_tracker import TrackerConfig, ValueTracker, Visit, mean_change
from minimind.rewards.reward import Values

ROWS_AT_A_TIME = 512
# Keys of the noise of initial samples, far from those of any step.
INITIAL_KEYS = 2**48


class SpoConfig(ReinforcementConfig):
    """The `spo` section."""

    tracker: TrackerConfig = TrackerConfig()


class SingleStream:
    """Uncertain prompts first, one completion each, advantages over the tracked values."""

    num_samples = 1

    def __init__(self, config: SpoConfig, num_prompts: int) -> None:
        self.draws, self.objective = config.draws(num_prompts), config.objective()
        self.tracker = ValueTracker(config.tracker, num_prompts)

    def start(self, model: Transformer, environment: Environment) -> Iterator[int]:
        """Try every prompt a few times to see what can be expected of it."""
        num_samples = self.tracker.config.initial_samples
        prompts_at_a_time = max(1, ROWS_AT_A_TIME // num_samples)
        for first in range(self.tracker.num_tried, self.draws.num_prompts, prompts_at_a_time):
            indices = np.arange(first, min(first + prompts_at_a_time, self.draws.num_prompts))
            first_key = INITIAL_KEYS + first * num_samples
            rollout = environment.rollout(model, indices, num_samples, first_key)
            rewards = environment.rewards
            scaled = rewards.scaled(rewards.total(environment.score(indices, rollout)))
            visits = _visits(model, environment, indices, rollout)
            self.tracker.initialize(indices, scaled.reshape(-1, num_samples), visits)
            yield self.tracker.num_tried

    def draw(self, step: int) -> Indices:
        return self.draws.by_weight(step, self.tracker.weights())

    def advantages(
        self,
        model: Transformer,
        environment: Environment,
        indices: Indices,
        rollout: Rollout,
        rewards: Values,
    ) -> tuple[Values, dict[str, float]]:
        """Advantages [B] over the values so far; then the tracker learns of the rewards."""
        scaled = environment.rewards.scaled(rewards)
        values = self.tracker.values()[indices]
        advantages = single_stream_advantages(scaled, values)
        change = self._change(model, environment, indices)
        visits = _visits(model, environment, indices, rollout)
        rho = self.tracker.update(indices, scaled, change, visits)
        return advantages, {
            "value": float(values.mean()),
            "value_error": float(np.abs(scaled - values).mean()),
            "change": float(change.mean()),
            "rho": float(rho.mean()),
        }

    def _change(self, model: Transformer, environment: Environment, indices: Indices) -> Values:
        """How far the policy has moved on each prompt since it last answered it."""
        visits = [self.tracker.visits[index] for index in indices]
        prompts = [environment.prompts[index] for index in indices]
        completions = [visit.completion for visit in visits]
        now = environment.logprobs(model, prompts, completions, ROWS_AT_A_TIME)
        return np.array([mean_change(v.logprobs, n) for v, n in zip(visits, now, strict=True)])

    def state_tensors(self) -> dict[str, Tensor]:
        return self.tracker.state_tensors()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.tracker.load_state_tensors(tensors)


def _visits(
    model: Transformer, environment: Environment, indices: Indices, rollout: Rollout
) -> list[Visit]:
    """The last completion of each of these prompts, and how likely it is."""
    num_samples = len(rollout.completions) // len(indices)
    last = slice(num_samples - 1, None, num_samples)
    completions, logprobs = rollout.completions[last], rollout.logprobs[last]
    if model.config.num_experts:  # decoding chooses other experts, which is no change of the policy
        now = environment.logprobs(model, rollout.prompts[last], completions, ROWS_AT_A_TIME)
        logprobs = [row.tolist() for row in now]
    return [Visit(ids, values) for ids, values in zip(completions, logprobs, strict=True)]
