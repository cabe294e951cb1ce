"""Group Relative Policy Optimization (GRPO, arXiv:2402.03300): a prompt's completions compete."""

from torch import Tensor

from minimind.model.transformer import Transformer
from minimind.reinforcement.advantages import Values, group_advantages, has_signal
from minimind.reinforcement.draws import Draws, Indices
from minimind.reinforcement.environment import Environment
from minimind.reinforcement.rollout import Rollout
from minimind.training.run import Run


class GroupRelative:
    """Prompts in turn, several completions each, advantages within each prompt's group."""

    def __init__(self, draws: Draws, num_generations: int, divide_by_std: bool) -> None:
        self.draws, self.num_samples = draws, num_generations
        self.divide_by_std = divide_by_std

    def start(self, model: Transformer, environment: Environment, run: Run) -> None:
        """Nothing to prepare: a group is its own baseline."""

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
        return advantages, {"groups_without_signal": float(without)}

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        assert not tensors
