"""The keys that the sections of reinforcement share."""

from typing import Literal

from pydantic import Field

from minimind.objectives.loss import Objective
from minimind.objectives.policy import LossType, PolicyGradient
from minimind.params import Seed, UserPath
from minimind.reinforcement.draws import Draws
from minimind.rewards.weighted import RewardsConfig
from minimind.training.optimizer import OptimizerConfig
from minimind.training.schedule import ScheduleName


class ReinforcementConfig(OptimizerConfig):
    """Keys that the sections of grpo and spo share."""

    init: UserPath  # the path of the checkpoint to start from, and of the reference
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(8e-5, gt=0)
    seed: Seed = 1
    epochs: float = Field(1.0, gt=0, le=1e6)  # over the prompts
    max_steps: int = Field(0, ge=0)  # rollouts, each with its updates; 0: as the epochs say
    batch_size: int = Field(32, gt=0)  # prompts whose completions are one micro-batch
    accumulation_steps: int = Field(1, gt=0)  # micro-batches of a step
    updates_per_rollout: int = Field(1, gt=0)  # optimizer steps on the same completions
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(64, gt=0)
    loss_type: LossType = "grpo"
    epsilon: float = Field(0.2, gt=0)  # how far a probability ratio may move before it is clipped
    beta: float = Field(0.04, ge=0)  # weight of the KL to the reference
    schedule: ScheduleName = "linear"
    warmup_steps: int = Field(0, ge=0)  # of optimizer steps
    log_interval: int = Field(1, gt=0)  # steps a row of the history averages over
    rewards: RewardsConfig = RewardsConfig()
    reward_model: UserPath  # a directory, read if rewards.reward_model is above 0
    hub_reward_model: str | None = None  # instead of it owner/name@commit on the Hugging Face hub
    trust_remote_code: bool = False  # whether code that comes with a reward model may run
    custom_reward: UserPath  # a Python file, read if rewards.custom is above 0

    def draws(self, num_prompts: int) -> Draws:
        """Which of so many prompts each step takes."""
        return Draws(num_prompts, self.batch_size * self.accumulation_steps, self.seed)

    def without_effect(self, num_prompts: int, longest: int, max_positions: int) -> list[str]:
        """A line of warning for each setting that cannot do what it says.

        longest: tokens of the longest prompt; max_positions: of the model.
        """
        lines = []
        if "epsilon" in self.model_fields_set and self.updates_per_rollout == 1:
            lines.append(
                f"epsilon is {self.epsilon:g}, but in a rollout's first update all ratios are 1, "
                "rounding aside; with updates_per_rollout 2 it would clip"
            )
        if (size := self.batch_size * self.accumulation_steps) > num_prompts:
            lines.append(
                f"batch_size x accumulation_steps is {size}, more prompts than there are: "
                f"each step takes all {num_prompts}"
            )
        if self.max_new_tokens > (room := max_positions - longest):
            lines.append(
                f"max_new_tokens is {self.max_new_tokens}, but the longest prompt leaves {room} of "
                f"the model's {max_positions} positions; with max_new_tokens {room} all are alike"
            )
        if self.hub_reward_model and not self.rewards.weights().get("reward_model"):
            lines.append(
                "hub_reward_model is not read while rewards.reward_model is 0; with 1 it would be"
            )
        return lines

    def objective(self) -> Objective:
        """The loss of a rollout."""
        return PolicyGradient(
            self.loss_type, self.epsilon, self.beta, self.temperature, self.max_new_tokens
        )
