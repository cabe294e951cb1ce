"""Where a run stands: its history, and the resume checkpoints that any kill leaves it with."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import NoReturn, Protocol

import torch
from torch import Tensor, get_device_module, nn

from minimind.compute.precision import DType
from minimind.compute.sharding import full_tensor, part_like, trained_parameters
from minimind.errors import Stopped, UserError
from minimind.lineage.resume import ResumeCheckpoint
from minimind.metrics import Number
from minimind.terminal.signals import GivenUp
from minimind.training.optimizer import Optimizer
from minimind.training.run import Run, newest_checkpoint

MAX_ROWS = 2000


@dataclass
class History:
    """What a run remembers beside weights and optimizer; JSON in the resume checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    resumes: int = 0
    rows: list[dict[str, Number]] = field(default_factory=list)
    window: dict[str, float] = field(default_factory=dict)  # sums since the last row
    window_counts: dict[str, int] = field(default_factory=dict)  # of what
    skipped_steps: int = 0  # whose gradient overflowed in float16
    validation: dict[str, float] = field(default_factory=dict)  # the latest
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_without_gain: int = 0


class Part(Protocol):
    """Something that the rest of a run depends on."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Whole, on the CPU: a run can go on in other processes."""

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Weights:
    """Those of a model that are trained."""

    model: nn.Module

    def state_tensors(self) -> dict[str, Tensor]:
        return {name: full_tensor(p).cpu() for name, p in trained_parameters(self.model)}

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in trained_parameters(self.model):
            parameter.copy_(part_like(tensors[name], parameter))


@dataclass
class BestWeights:
    """Those of a run's best validation; none without one."""

    model: nn.Module
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def keep(self) -> None:
        self.tensors = {name: p.detach().clone() for name, p in trained_parameters(self.model)}

    def bring_back(self) -> None:
        self.model.load_state_dict(self.tensors, strict=False)

    def state_tensors(self) -> dict[str, Tensor]:
        return {name: full_tensor(tensor).cpu() for name, tensor in self.tensors.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        self.tensors = {
            name: part_like(tensor.to(parameters[name].device), parameters[name])
            for name, tensor in tensors.items()
        }


@dataclass(frozen=True)
class Generators:
    """PyTorch's random generators, of every process: each draws its own dropout."""

    run: Run

    def state_tensors(self) -> dict[str, Tensor]:
        gather = self.run.processes.gather
        tensors = {"cpu": torch.stack(gather(torch.get_rng_state()))}
        device = self.run.device
        if device.type != "cpu":
            tensors[device.type] = torch.stack(gather(get_device_module(device).get_rng_state()))
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        rank = self.run.processes.rank
        if rank < len(tensors["cpu"]):
            # Cloned: PyTorch reads a generator's state from where the whole tensor begins.
            torch.set_rng_state(tensors["cpu"][rank].clone())
            device = self.run.device
            if device.type != "cpu" and device.type in tensors:
                get_device_module(device).set_rng_state(tensors[device.type][rank].clone())


class Session:
    """The steps of one run, of `fit` or `reinforce`, from the newest checkpoint on."""

    def __init__(
        self,
        run: Run,
        num_steps: int,
        log_interval: int,
        optimizer: Optimizer,
        parts: Mapping[str, Part],
        num_tokens: int | None = None,
    ) -> None:
        """parts: all that the run depends on beside the optimizer; set to the newest saved.

        num_tokens: of all steps; None where they are not known beforehand.
        """
        self.run, self.num_steps = run, num_steps
        self.log_interval = max(log_interval, math.ceil(num_steps / (MAX_ROWS - 2)))
        self.optimizer = optimizer
        self.parts = {**parts, "optimizer": optimizer}
        num_parameters = sum(parameter.numel() for parameter in optimizer.parameters)
        run.announce(num_parameters, num_steps, num_tokens, optimizer.config.dtype)
        self.history = self._restored()
        tokens_left = None if num_tokens is None else num_tokens - self.history.tokens
        self.progress = run.progress(num_steps, self.history.step, tokens_left)
        self._last_save, self._save_seconds = time.monotonic(), 0.0
        self._part = 0

    @property
    def is_new(self) -> bool:
        """Whether nothing has been done yet."""
        return self.history.step == 0 and not self.history.rows

    def steps(self) -> Iterator[int]:
        """Numbers of the steps still to be taken; after each, :meth:`record` is called.

        Raises:
            Stopped: a signal came; a checkpoint to resume from is saved.
        """
        with self.progress:
            while self.history.step < self.num_steps:
                started = time.monotonic()
                yield self.history.step
                self.history.seconds += time.monotonic() - started
                self.pause()

    def pause(self, part: int = 0) -> None:
        """Save a checkpoint where one is due, or wanted by a signal, and stop if one came.

        part: how much is done of what comes before the next step.

        Raises:
            Stopped: a signal came; a checkpoint to resume from is saved.
        """
        self._part = part
        due = self.run.is_save_due(self._last_save, self._save_seconds)
        stopping, saving = self.run.agree(due)
        if stopping or saving:
            self._save(self.checkpoint())
        if stopping:
            raise self._stopped()

    @contextmanager
    def saving_what_is_given_up(self) -> Iterator[None]:
        """Around steps in which :meth:`StopRequest.giving_up` is used before they change anything.

        Raises:
            Stopped: as :meth:`steps` does.
        """
        try:
            yield
        except GivenUp:
            self._save(self.checkpoint())
            raise self._stopped() from None

    def go_back(self, checkpoint: ResumeCheckpoint) -> NoReturn:
        """Stop at a checkpoint that :meth:`checkpoint` gave; raises Stopped."""
        self._save(checkpoint)
        raise self._stopped()

    def _stopped(self) -> Stopped:
        return self.run.stopped(f"at step {self.history.step} of {self.num_steps}")

    def record(
        self,
        values: Mapping[str, float],
        tokens: int,
        num_skipped: int,
        validate: Callable[[int], Mapping[str, Number]] = lambda step: {},
    ) -> None:
        """A step is done: these were its values.

        num_skipped: times that the optimizer left the weights as they were.
        validate: called with the number of steps done; what it gives is part of the history's row.
        """
        history = self.history
        history.step += 1
        history.tokens += tokens
        for name, value in values.items():
            if math.isfinite(value) or name != "grad_norm":
                history.window[name] = history.window.get(name, 0.0) + value
                history.window_counts[name] = history.window_counts.get(name, 0) + 1
        history.skipped_steps += num_skipped
        validation = validate(history.step)
        self.progress.update(history.step, {**values, **validation}, tokens)
        if history.step % self.log_interval == 0 or history.step == self.num_steps:
            counts = history.window_counts
            means = {name: total / counts[name] for name, total in history.window.items()}
            row: dict[str, Number] = {"step": history.step, **means, **validation}
            if self.optimizer.scaler.is_enabled():
                row["skipped_steps"] = history.skipped_steps
            history.rows.append(row)
            self.run.log(row)
            history.window, history.window_counts = {}, {}

    def require_finite(
        self, values: Mapping[str, float], dtype: DType, where: Callable[[], str]
    ) -> None:
        """Raise UserError where a loss or gradient is not; `where`: on what, in words."""
        # In float16 an infinite gradient is normal: the scaler skips the step and scales down.
        for name in ["loss"] if dtype == "float16" else ["loss", "grad_norm"]:
            if not math.isfinite(values[name]):
                raise UserError(
                    f"{name} is {values[name]} at step {self.history.step} (learning rate "
                    f"{values['lr']:g}) on {where()}; lower lr, or look at these. The last good "
                    "checkpoint is kept."
                )

    def finish(self) -> None:
        """All steps are taken, or no more are wanted."""
        # So that a kill while outputs are written and recorded costs nothing.
        self._save(self.checkpoint())
        history = self.history
        self.run.record |= {
            "steps": history.step,
            "tokens": history.tokens,
            "training_seconds": round(history.seconds, 2),
            "tokens_per_second": round(history.tokens / max(history.seconds, 1e-9)),
            "resumes": history.resumes,
        }

    def checkpoint(self) -> ResumeCheckpoint:
        """All that the rest of the run depends on, as it is now: the tensors themselves."""
        tensors = {
            f"{name}/{key}": tensor
            for name, part in self.parts.items()
            for key, tensor in part.state_tensors().items()
        }
        for name, tensor in tensors.items():
            if name.startswith("model/") and not torch.isfinite(tensor).all():
                raise UserError(
                    f"{name.removeprefix('model/')} is not finite after step {self.history.step}; "
                    "lower lr or weight_decay. The last good checkpoint is kept."
                )
        values = {
            "history": asdict(self.history),
            "scaler": self.optimizer.scaler_state(),
            "computed_with": self.run.computed_with(),
        }
        return ResumeCheckpoint(self.history.step, tensors, values, self._part)

    def _save(self, checkpoint: ResumeCheckpoint) -> None:
        started = time.monotonic()
        if self.run.store is not None:
            self.run.store.save(checkpoint)
        self._last_save = time.monotonic()
        self._save_seconds = self._last_save - started

    def _restored(self) -> History:
        """The newest checkpoint's history; all parts are set."""
        run = self.run
        state = newest_checkpoint(run)
        if state is None:
            return History()
        for name, part in self.parts.items():
            prefix = f"{name}/"
            own = [key for key in state.tensors if key.startswith(prefix)]
            part.load_state_tensors({k.removeprefix(prefix): state.tensors[k] for k in own})
        self.optimizer.load_scaler_state(state.values["scaler"])
        history = History(**state.values["history"])
        history.resumes += 1
        run.say(f"going on from step {history.step}")
        before, now = state.values["computed_with"], run.computed_with()
        changed = [f"{k} {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]]
        if changed:
            run.say(f"computed otherwise than before ({', '.join(changed)}): last bits may differ")
        return history
