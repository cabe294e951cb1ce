"""Group Relative Policy Optimization (GRPO, arXiv:2402.03300): a prompt's completions compete."""

from collections.abc import Iterator

from pydantic import Field
from torch import Tensor

from minimind.model.transformer import Transformer
from minimind.reinforcement.advantages import group_advantages, has_signal
from minimind.reinforcement.config import ReinforcementConfig
from minimind.reinforcement.draws import Indices
from minimind.reinforcement.environment import Environment
from minimind.reinforcement.rollout import Rollout
from minimind.rewards.reward import Values


class GrpoConfig(ReinforcementConfig):
    """The `grpo` section."""

    num_generations: int = Field(8, ge=2)  # completions of each prompt


class GroupRelative:
    """Prompts in turn, several completions each, advantages within each prompt's group."""

    def __init__(self, config: GrpoConfig, num_prompts: int) -> None:
        self.draws, self.num_samples = config.draws(num_prompts), config.num_generations
        self.objective = config.objective()
        # Dr. GRPO does without the division, which favours prompts that are almost always solved.
        self.divide_by_std = config.loss_type != "dr_grpo"

    def start(self, model: Transformer, environment: Environment) -> Iterator[int]:
        """Nothing to prepare: a group is its own baseline."""
        return iter(())

    def draw(self, step: int) -> Indices:
        return self.draws.in_turn(step)

    def advantages(
        self,
        model: Transformer,
        environment: Environment,
        indices: Indices,
        rollout: Rollout,
        rewards: Values,
    ) -> tuple[Values, dict[str, float]]:
        """Advantages [B], and the share of groups that teach nothing."""
        advantages = group_advantages(rewards, self.num_samples, self.divide_by_std)
        without = 1 - has_signal(rewards, self.num_samples).mean()
        return advantages, {"frac_reward_zero_std": float(without)}

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        assert not tensors
