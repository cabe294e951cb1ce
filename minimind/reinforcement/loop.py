"""The loop of reinforcement: sample, judge, take gradient steps. GRPO and SPO share it."""

import copy
import math
import time
from dataclasses import asdict
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from minimind.compute.processes import Processes
from minimind.compute.sharding import full_tensor, gather, load_parameters, shard
from minimind.datasets.batches import Counts, Step, divide
from minimind.errors import UserError
from minimind.lineage.resume import TrainingState
from minimind.metrics import Number
from minimind.model.transformer import Layer, Transformer
from minimind.objectives.policy import LossType, PolicyGradient, k3
from minimind.params import Seed, UserPath
from minimind.reinforcement.advantages import Values
from minimind.reinforcement.environment import Environment
from minimind.reinforcement.prompts import Draws, Indices
from minimind.reinforcement.rewards import RewardsConfig
from minimind.reinforcement.rollout import Rollout, completion_logprobs, pack_completions
from minimind.training.fit import MAX_CURVE_ROWS, History, take_step
from minimind.training.optimizer import Optimizer, OptimizerConfig
from minimind.training.schedule import ScheduleName, learning_rate
from minimind.training.session import Run


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
    rewards: RewardsConfig
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

    Processes divide prompts and rows among themselves: each samples, judges and scores its share,
    all know the whole rollout, and each computes the loss of its share.

    Picks up the newest state of the same run, if there is one, and continues as if it had never
    stopped.

    Raises:
        Stopped: a signal came; the state is saved.
        UserError: a loss or reward is not finite.
    """
    num_steps = method.draws.num_steps(config.epochs, config.max_steps)
    curve_interval = max(config.curve_interval, math.ceil(num_steps / (MAX_CURVE_ROWS - 2)))
    model.to(run.device).train()
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    # Where weights are divided, `model` is the whole policy, brought up to date to sample from.
    trained, forward = shard(model, Layer, run.device, run.processes, run.settings)
    optimizer = Optimizer(trained, config, run.device, run.processes.world)
    history = _restore(trained, optimizer, method, run)
    gather(trained, model)
    if history.step == 0:
        method.start(model, environment, run)
    progress = run.progress(num_steps, history.step)
    last_save, save_seconds = time.monotonic(), 0.0

    def save() -> None:
        nonlocal last_save, save_seconds
        started = time.monotonic()
        run.store.save(_state(trained, optimizer, method, history, run))
        last_save = time.monotonic()
        save_seconds = last_save - started

    while history.step < num_steps:
        started = time.monotonic()
        indices = method.draw(history.step)
        rows_per_step = method.draws.prompts_per_step * method.num_samples
        rollout = environment.rollout(
            model, indices, method.num_samples, first_key=history.step * rows_per_step
        )
        parts = environment.judge(indices, rollout)
        rewards = environment.rewards.total(parts)
        advantages, method_values = method.advantages(model, environment, indices, rollout, rewards)
        rows_at_a_time = config.batch_size * method.num_samples
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
        advantages_alone = not config.beta and not model.config.num_experts  # these have a balance
        step = _pack(
            rollout, advantages, reference_logprobs, advantages_alone, rows_at_a_time, run.processes
        )
        values = _update(forward, optimizer, step, config, history.step, num_steps, run)
        gather(trained, model)
        _require_finite(values, history.step, indices, environment, config)
        values |= {
            "reward": float(rewards.mean()),
            **_statistics(parts, rollout, reference_logprobs),
            **method_values,
        }

        progress.update(history.step, values["loss"], rollout.num_tokens)
        history.step += 1
        history.tokens += rollout.num_tokens
        for name, value in values.items():
            history.window[name] = history.window.get(name, 0.0) + value
        history.window_steps += 1
        if history.step % curve_interval == 0 or history.step == num_steps:
            means = {name: total / history.window_steps for name, total in history.window.items()}
            row: dict[str, Number] = {"step": history.step, **means}
            history.curve.append(row)
            run.log(row)
            history.window, history.window_steps = {}, 0
        history.seconds += time.monotonic() - started
        stopping, saving = run.agree(run.is_save_due(last_save, save_seconds))
        if stopping or saving:
            save()
        if stopping:
            raise run.stopped(f"at step {history.step} of {num_steps}")

    progress.close()
    save()  # so that a kill from here on, while outputs are written and recorded, costs nothing
    run.record |= {
        "steps": history.step,
        "tokens": history.tokens,
        "training_seconds": round(history.seconds, 2),
        "tokens_per_second": round(history.tokens / max(history.seconds, 1e-9)),
        "resumes": history.resumes,
    }
    return history


def summary(history: History) -> dict[str, Number]:
    """The few numbers that stand for a run: its last stretch, and the reward of its first."""
    shown = ("reward", "kl", "completion_length", "unfinished", "groups_without_signal")
    row = history.curve[-1]
    last = {name: row[name] for name in shown if name in row}
    first_reward = history.curve[0]["reward"]
    return {"steps": history.step, "tokens": history.tokens, "first_reward": first_reward, **last}


def _pack(
    rollout: Rollout,
    advantages: Values,
    reference_logprobs: list[Tensor],
    advantages_alone: bool,
    rows_at_a_time: int,
    processes: Processes,
) -> Step:
    """A process's micro-batches of a step, with all that the loss compares the policy with.

    advantages_alone: whether the loss has no part but that of the advantages.
    """
    rows = np.arange(len(rollout.completions))
    if advantages_alone and advantages.any():
        rows = np.flatnonzero(advantages)  # the others have no gradient, and need not be computed
    micro_batches = []
    for part, weight in divide(rows, rows_at_a_time, processes.rank, processes.world):
        extras = {
            "sampled": torch.tensor([value for row in part for value in rollout.logprobs[row]]),
            "reference": torch.cat([reference_logprobs[row] for row in part]),
            "advantages": torch.from_numpy(advantages[part].astype(np.float32)),
        }
        micro_batches.append(
            pack_completions(
                [rollout.prompts[row] for row in part],
                [rollout.completions[row] for row in part],
                extras,
                weight,
            )
        )
    num_rows = len(rollout.completions)
    return Step(micro_batches, Counts(rollout.num_tokens, num_rows, num_rows))


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


def _statistics(
    parts: dict[str, Values], rollout: Rollout, reference_logprobs: list[Tensor]
) -> dict[str, float]:
    """What a rollout looks like, as means over its completions or tokens."""
    logprobs = torch.tensor([value for row in rollout.logprobs for value in row])
    return {
        **{f"reward_{name}": float(values.mean()) for name, values in parts.items()},
        "kl": float(k3(logprobs, torch.cat(reference_logprobs)).mean()),
        # The mean of -log p over drawn tokens estimates the entropy of drawing one.
        "entropy": -float(logprobs.mean()),
        "completion_length": rollout.num_tokens / len(rollout.completions),
        "unfinished": 1 - sum(rollout.finished) / len(rollout.finished),
    }


def _require_finite(
    values: dict[str, float],
    step: int,
    indices: Indices,
    environment: Environment,
    config: ReinforcementConfig,
) -> None:
    # In float16 an infinite gradient is normal: the scaler skips the step and scales down.
    names = ["loss"] if config.dtype == "float16" else ["loss", "grad_norm"]
    for name in names:
        if not math.isfinite(values[name]):
            places = [environment.prompts[index].place for index in indices]
            shown = ", ".join(places[:8]) + (", ..." if len(places) > 8 else "")
            raise UserError(
                f"{name} is {values[name]} at step {step} (learning rate {values['lr']:g}) on the "
                f"prompts {shown}; lower lr, or look at these. The last good state is kept."
            )


def _state(
    model: nn.Module, optimizer: Optimizer, method: Method, history: History, run: Run
) -> TrainingState:
    """All that the rest of the run depends on. Sampling has no state: its keys are the steps'."""
    parameters = model.named_parameters()
    tensors: dict[str, Tensor] = {f"model/{name}": full_tensor(p).cpu() for name, p in parameters}
    tensors |= {f"optimizer/{name}": t for name, t in optimizer.state_tensors().items()}
    tensors |= {f"method/{name}": tensor for name, tensor in method.state_tensors().items()}
    values = {
        "history": asdict(history),
        "scaler": optimizer.scaler_state(),
        "computed_with": run.computed_with(),
    }
    return TrainingState(history.step, tensors, values)


def _restore(model: nn.Module, optimizer: Optimizer, method: Method, run: Run) -> History:
    """The newest state's history; model, optimizer and method are set."""
    state, damaged = run.store.load()
    for line in damaged:
        run.say(line)
    if state is None:
        return History()

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in state.tensors.items()
            if name.startswith(prefix)
        }

    load_parameters(model, part("model/"))
    optimizer.load_state_tensors(part("optimizer/"))
    optimizer.load_scaler_state(state.values["scaler"])
    method.load_state_tensors(part("method/"))
    history = History(**state.values["history"])
    history.resumes += 1
    run.say(f"going on from step {history.step}")
    before, now = state.values["computed_with"], run.computed_with()
    if before != now:
        changed = ", ".join(
            f"{k} {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]
        )
        run.say(f"computed otherwise than before ({changed}): the last bits may differ")
    return history
