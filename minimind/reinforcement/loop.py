"""The loop of reinforcement: sample, reward, take gradient steps. GRPO and SPO share it."""

import copy
from typing import Literal, Protocol

from pydantic import Field
from torch import Tensor, nn

from minimind.compute.sharding import gather, shard
from minimind.datasets.batches import Step
from minimind.metrics import Number
from minimind.model.transformer import Layer, Transformer
from minimind.objectives.policy import LossType, PolicyGradient
from minimind.params import Seed, UserPath
from minimind.reinforcement.advantages import Values
from minimind.reinforcement.draws import Draws, Indices
from minimind.reinforcement.environment import Environment
from minimind.reinforcement.rewards import RewardsConfig
from minimind.reinforcement.rollout import Rollout, completion_logprobs, pack, statistics
from minimind.training.optimizer import Optimizer, OptimizerConfig
from minimind.training.run import Run
from minimind.training.schedule import ScheduleName, learning_rate
from minimind.training.session import History, Part, Session, Weights
from minimind.training.step import take_step


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
    curve_interval: int = Field(1, gt=0)  # steps a row of the curve averages over
    rewards: RewardsConfig = RewardsConfig()
    reward_model: UserPath  # a directory, read if rewards.reward_model is above 0
    hub_reward_model: str | None = None  # instead of it owner/name@commit on the Hugging Face hub
    trust_remote_code: bool = False  # whether code that comes with a reward model may run
    custom_reward: UserPath  # a Python file, read if rewards.custom is above 0


class Method(Protocol):
    """What GRPO and SPO differ in: which prompts, and what a reward is compared with."""

    draws: Draws
    num_samples: int  # completions of each prompt

    def start(self, model: Transformer, environment: Environment, run: Run) -> None:
        """Prepare a new run; a resumed one loads its state instead."""

    def draw(self, step: int) -> Indices:
        """The prompts of a step."""

    def advantages(
        self,
        model: Transformer,
        environment: Environment,
        indices: Indices,
        rollout: Rollout,
        rewards: Values,
    ) -> tuple[Values, dict[str, float]]:
        """Advantages of a rollout of these prompts [B], and numbers for the curve."""

    def state_tensors(self) -> dict[str, Tensor]:
        """All that the method remembers from step to step."""

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None: ...


def reinforce(
    model: Transformer,
    environment: Environment,
    method: Method,
    config: ReinforcementConfig,
    run: Run,
) -> History:
    """Train `model` in place against its own initial weights as the reference.

    Processes divide prompts and rows among themselves: each samples, rewards and scores its share,
    all know the whole rollout, and each computes the loss of its share.

    Picks up the newest state of the same run, if there is one, and continues as if it had never
    stopped.

    Raises:
        Stopped: a signal came; the state is saved.
        UserError: a loss or reward is not finite.
    """
    num_steps = method.draws.num_steps(config.epochs, config.max_steps)
    model.to(run.device).train()
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    # Where weights are divided, `model` is the whole policy, brought up to date to sample from.
    trained, forward = shard(model, Layer, run.device, run.processes, run.settings)
    optimizer = Optimizer(trained, config, run.device, run.processes.world)
    parts: dict[str, Part] = {"model": Weights(trained), "method": method}
    session = Session(run, num_steps, config.curve_interval, optimizer, parts)
    gather(trained, model)
    if session.history.step == 0:
        method.start(model, environment, run)
    rows_at_a_time = config.batch_size * method.num_samples
    for step in session.steps():
        indices = method.draw(step)
        rows_per_step = method.draws.prompts_per_step * method.num_samples
        rollout = environment.rollout(
            model, indices, method.num_samples, first_key=step * rows_per_step
        )
        parts_of_reward = environment.score(indices, rollout)
        rewards = environment.rewards.total(parts_of_reward)
        advantages, method_values = method.advantages(model, environment, indices, rollout, rewards)
        reference_logprobs = run.processes.in_order(
            completion_logprobs(
                reference,
                run.processes.share(rollout.prompts),
                run.processes.share(rollout.completions),
                config.temperature,
                config.dtype,
                rows_at_a_time,
            )
        )
        # Experts have a loss of their own.
        advantages_alone = not config.beta and not model.config.num_experts
        micro_batches = pack(
            rollout, advantages, reference_logprobs, advantages_alone, rows_at_a_time, run.processes
        )
        values = _update(forward, optimizer, micro_batches, config, step, num_steps, run)
        gather(trained, model)
        session.require_finite(values, config.dtype, lambda: _named(indices, environment))  # noqa: B023
        values |= {
            "reward": float(rewards.mean()),
            **statistics(parts_of_reward, rollout, reference_logprobs),
            **method_values,
        }
        session.record(values, rollout.num_tokens)
    session.finish()
    return session.history


def summary(history: History) -> dict[str, Number]:
    """The few numbers that stand for a run: its last stretch, and the reward of its first."""
    shown = ("reward", "kl", "completion_length", "unfinished", "groups_without_signal")
    row = history.curve[-1]
    last = {name: row[name] for name in shown if name in row}
    first_reward = history.curve[0]["reward"]
    return {"steps": history.step, "tokens": history.tokens, "first_reward": first_reward, **last}


def _update(
    model: nn.Module,
    optimizer: Optimizer,
    step: Step,
    config: ReinforcementConfig,
    number: int,
    num_steps: int,
    run: Run,
) -> dict[str, float]:
    """The gradient steps on one rollout; means of their losses and metrics."""
    objective = PolicyGradient(
        config.loss_type, config.epsilon, config.beta, config.temperature, config.max_new_tokens
    )
    sums: dict[str, float] = {"lr": 0.0}
    num_updates = num_steps * config.updates_per_rollout
    for k in range(config.updates_per_rollout):
        update = number * config.updates_per_rollout + k
        rate = learning_rate(config.schedule, 1.0, update, num_updates, config.warmup_steps)
        values = take_step(model, objective, optimizer, step, update / num_updates, rate, run)
        for name, value in {**values, "lr": rate * config.lr}.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: total / config.updates_per_rollout for name, total in sums.items()}


def _named(indices: Indices, environment: Environment) -> str:
    places = [str(environment.problems[index].place) for index in indices]
    return f"the prompts {', '.join(places[:8])}" + (", ..." if len(places) > 8 else "")
