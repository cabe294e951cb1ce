"""The loop of reinforcement: sample, reward, take gradient steps. GRPO and SPO share it."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor, nn

from minimind.compute.sharding import gather, shard
from minimind.datasets.batches import PackedBatch, Step
from minimind.metrics import Number
from minimind.model.transformer import Layer, Transformer
from minimind.objectives.loss import Loss, Objective
from minimind.reinforcement.config import ReinforcementConfig
from minimind.reinforcement.draws import Draws, Indices
from minimind.reinforcement.environment import Environment
from minimind.reinforcement.rollout import Rollout, pack_step, sampling_difference, statistics
from minimind.reinforcement.watched import Watched
from minimind.rewards.reward import Values
from minimind.training.optimizer import Optimizer
from minimind.training.run import Run
from minimind.training.schedule import beyond_epochs, lr_factor, never_reached
from minimind.training.session import History, Part, Session, Weights
from minimind.training.step import take_step


class Algorithm(Protocol):
    """All that GRPO and SPO differ in: which prompts, advantages from rewards, and the loss."""

    draws: Draws
    num_samples: int  # completions of each prompt
    objective: Objective

    def start(self, model: Transformer, environment: Environment) -> Iterator[int]:
        """Prepare a run, from where its state is; after each part, how much is done."""

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
        """Advantages of a rollout of these prompts [B], and numbers for the history."""

    def state_tensors(self) -> dict[str, Tensor]:
        """All that the algorithm remembers from step to step."""

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None: ...


def reinforce(
    model: Transformer,
    environment: Environment,
    algorithm: Algorithm,
    config: ReinforcementConfig,
    run: Run,
    watched: Watched | None = None,
) -> History:
    """Train `model` in place against its own initial weights as the reference.

    Processes divide prompts and rows among themselves: each samples, rewards and scores its share,
    all know the whole rollout, and each computes the loss of its share.

    Goes on from the newest checkpoint of the same run, if there is one, as if it had never
    stopped.

    watched: is shown the policy from time to time.

    Raises:
        Stopped: a signal came; a checkpoint to resume from is saved.
        UserError: a loss or reward is not finite.
    """
    num_steps = algorithm.draws.num_steps(config.epochs, config.max_steps)
    model.to(run.device).train()
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    # Where weights are divided, `model` is the whole policy, brought up to date to sample from.
    trained, forward = shard(model, Layer, run.device, run.processes, run.settings)
    optimizer = Optimizer(trained, config, run.device, run.processes.world)
    parts: dict[str, Part] = {"model": Weights(trained), "algorithm": algorithm}
    parts |= {"watched": watched} if watched else {}
    session = Session(run, num_steps, config.log_interval, optimizer, parts)
    gather(trained, model)
    num_updates = num_steps * config.updates_per_rollout
    for warning in (
        beyond_epochs(config.max_steps, num_steps, config.epochs),
        never_reached(config.schedule, config.warmup_steps, num_updates),
    ):
        if warning:
            run.say(warning)
    rows_at_a_time = config.batch_size * algorithm.num_samples
    # Of many processes each would be stopped by the same signal somewhere else.
    can_go_back = config.updates_per_rollout > 1 and run.processes.world == 1
    with session.saving_what_is_given_up():
        if session.history.step == 0:
            for num_done in algorithm.start(model, environment):
                session.pause(num_done)
        for step in session.steps():
            if watched:
                watched.look(model, step, num_steps)
            indices = algorithm.draw(step)
            rows_per_step = algorithm.draws.prompts_per_step * algorithm.num_samples
            rollout = environment.rollout(
                model, indices, algorithm.num_samples, first_key=step * rows_per_step
            )
            parts_of_reward = environment.score(indices, rollout)
            rewards = environment.rewards.total(parts_of_reward)
            reference_logprobs = environment.logprobs(
                reference, rollout.prompts, rollout.completions, rows_at_a_time
            )
            # All before this may be given up: nothing has changed.
            before = copy.deepcopy(session.checkpoint()) if can_go_back else None
            advantages, own_values = algorithm.advantages(
                model, environment, indices, rollout, rewards
            )
            micro_batches = pack_step(
                rollout,
                advantages,
                reference_logprobs,
                config.beta,
                model.config.num_experts > 0,
                rows_at_a_time,
                run.processes,
            )

            def between_updates() -> None:
                if before and run.stop.requested:  # noqa: B023
                    session.go_back(before)  # noqa: B023

            values, num_skipped = _update(
                forward,
                algorithm.objective,
                optimizer,
                micro_batches,
                config,
                step,
                num_steps,
                run,
                between_updates,
            )
            gather(trained, model)
            session.require_finite(values, config.dtype, lambda: _named(indices, environment))  # noqa: B023
            values |= {
                "reward": float(rewards.mean()),
                **statistics(parts_of_reward, rollout, reference_logprobs),
                **own_values,
            }
            session.record(values, rollout.num_tokens, num_skipped)
        if watched:
            watched.look(model, num_steps, num_steps)
    session.finish()
    if all(row.get("frac_reward_zero_std") == 1 for row in session.history.rows):
        run.say(
            "the rewards of a prompt's completions never differed, and so nothing was learnt from "
            "them; look at rewards, temperature and max_new_tokens"
        )
    return session.history


def summary(history: History) -> dict[str, Number]:
    """The few numbers that stand for a run: its last stretch, and the reward of its first."""
    shown = ["reward", "kl", "completion_length", "unfinished", "frac_reward_zero_std"]
    shown += ["sampling_logp_difference_mean", "sampling_logp_difference_max", "skipped_steps"]
    row = history.rows[-1]
    last = {name: row[name] for name in shown if name in row}
    first_reward = history.rows[0]["reward"]
    return {"steps": history.step, "tokens": history.tokens, "first_reward": first_reward, **last}


def _update(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    step: Step,
    config: ReinforcementConfig,
    number: int,
    num_steps: int,
    run: Run,
    between_updates: Callable[[], None],
) -> tuple[dict[str, float], int]:
    """The gradient steps on one rollout: means of losses and metrics, and how many were skipped.

    A step whose gradient overflows in float16 is skipped, and counts for no mean gradient norm.
    """
    logprobs: list[Tensor] = []

    def first_objective(model: nn.Module, batch: PackedBatch, progress: float) -> Loss:
        loss = objective(model, batch, progress)
        assert loss.logprobs is not None
        logprobs.append(loss.logprobs.cpu())
        return loss

    sums: dict[str, float] = {"lr": 0.0}
    norms: list[float] = []
    num_updates = num_steps * config.updates_per_rollout
    for k in range(config.updates_per_rollout):
        if k:
            between_updates()
        update = number * config.updates_per_rollout + k
        factor = lr_factor(config.schedule, update, num_updates, config.warmup_steps)
        own = objective if k else first_objective
        values = take_step(model, own, optimizer, step, update / num_updates, factor, run)
        # Where decoding is no measure of it: see pack_step.
        for batch, old in zip(step.micro_batches, logprobs, strict=True):
            batch.extras.setdefault("old", old)
        for name, value in {**values, "lr": factor * config.lr}.items():
            sums[name] = sums.get(name, 0.0) + value
        norms.append(values["grad_norm"])
    means = {name: total / config.updates_per_rollout for name, total in sums.items()}
    finite = [norm for norm in norms if math.isfinite(norm)]
    if optimizer.scaler.is_enabled() and finite:
        means["grad_norm"] = sum(finite) / len(finite)
    return means | sampling_difference(step, logprobs, run.processes), len(norms) - len(finite)


def _named(indices: Indices, environment: Environment) -> str:
    places = [str(environment.problems[index].place) for index in indices]
    return f"the prompts {', '.join(places[:8])}" + (", ..." if len(places) > 8 else "")
