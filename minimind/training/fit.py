"""The training loop of every supervised stage; the objective is all that they differ in."""

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

import torch
from pydantic import Field
from torch import Tensor, nn

from minimind.compute.precision import autocast
from minimind.compute.sharding import (
    full_tensor,
    gather,
    load_parameters,
    part_like,
    shard,
    trained_parameters,
    without_sync,
)
from minimind.datasets.batches import (
    Batches,
    Extra,
    Rows,
    Step,
    Unit,
    count,
    in_order,
    split_samples,
)
from minimind.datasets.encoded import EncodedDataset
from minimind.errors import UserError
from minimind.lineage.resume import TrainingState
from minimind.metrics import Number
from minimind.model.transformer import Decoder, Layer
from minimind.objectives.loss import Loss, Objective, Term
from minimind.params import Seed
from minimind.training.optimizer import Optimizer, OptimizerConfig
from minimind.training.schedule import ScheduleName, learning_rate
from minimind.training.session import Run

MAX_CURVE_ROWS = 2000
HIDDEN = ("step", "lr", "grad_norm")  # of a curve's row, in the metrics


class FitConfig(OptimizerConfig):
    """Keys of every supervised stage's section."""

    seed: Seed = 1
    epochs: float = Field(1.0, gt=0, le=1e6)
    max_steps: int = Field(0, ge=0)  # 0: as the epochs say
    batch_size: int = Field(16, gt=0)  # samples of a micro-batch
    accumulation_steps: int = Field(1, gt=0)  # micro-batches of an optimizer step
    schedule: ScheduleName = "linear"
    warmup_steps: int = Field(0, ge=0)
    validation_share: float = Field(0.0, ge=0, lt=1)
    eval_interval: int = Field(500, gt=0)  # steps between validations
    patience: int = Field(0, ge=0)  # validations without gain before stopping early; 0: never
    min_delta: float = Field(0.0, ge=0)  # what counts as a gain
    curve_interval: int = Field(25, gt=0)  # steps a row of the curve averages over
    gradient_checkpointing: bool = False


@dataclass
class History:
    """What a run remembers beside weights and optimizer; goes into the resume state as JSON."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    resumes: int = 0
    curve: list[dict[str, Number]] = field(default_factory=list)
    window: dict[str, float] = field(default_factory=dict)  # sums since the curve's last row
    window_steps: int = 0
    validation: dict[str, float] = field(default_factory=dict)  # the latest
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_without_gain: int = 0


def fit(
    model: nn.Module,
    objective: Objective,
    dataset: EncodedDataset,
    config: FitConfig,
    run: Run,
    extras: Mapping[str, Extra] | None = None,
) -> History:
    """Train `model` in place; returns the history, its curve ready to be written.

    Picks up the newest state of the same run, if there is one, and continues as if it had never
    stopped. With patience, the model ends with the weights of its best validation.

    Raises:
        Stopped: a signal came; the state is saved.
        UserError: no sample to train on, or the loss is not finite.
    """
    extras = dict(extras or {})
    train, held_out = split(dataset, config)
    if not len(train):
        raise UserError(
            f"{dataset.directory} has {dataset.num_sources} source rows and validation_share "
            f"{config.validation_share} leaves none to train on; add data or lower the share."
        )
    if config.patience and not len(held_out):
        raise UserError(
            f"patience is {config.patience}, but validation_share {config.validation_share} of "
            f"{dataset.num_sources} source rows holds none out; raise the share, or set patience "
            "to 0."
        )
    batches = Batches(
        dataset,
        train,
        config.batch_size,
        config.accumulation_steps,
        config.epochs,
        config.max_steps,
        config.seed,
        extras,
    )
    num_steps = batches.num_steps
    curve_interval = max(config.curve_interval, math.ceil(num_steps / (MAX_CURVE_ROWS - 2)))

    for module in model.modules():
        if isinstance(module, Decoder):
            module.recompute_layers = config.gradient_checkpointing
    trained, forward = shard(model, Layer, run.device, run.processes, run.settings)

    if run.processes.rank:
        torch.manual_seed(config.seed + run.processes.rank)  # a dropout of its own
    optimizer = Optimizer(trained, config, run.device, run.processes.world)
    history, best = _restore(trained, optimizer, run)
    progress = run.progress(num_steps, history.step)
    last_save, save_seconds = time.monotonic(), 0.0

    def validate() -> None:
        nonlocal best
        history.validation = mean_loss(forward, objective, dataset, held_out, extras, config, run)
        if not math.isfinite(history.validation["loss"]):
            raise UserError(
                f"the validation loss is {history.validation['loss']} after {history.step} steps "
                f"on held-out rows of {dataset.directory}; lower lr, or look at these rows. "
                "The last good state is kept."
            )
        if config.patience and history.validation["loss"] < history.best_loss - config.min_delta:
            history.best_loss, history.best_step = history.validation["loss"], history.step
            history.evaluations_without_gain = 0
            best = {name: p.detach().clone() for name, p in trained_parameters(trained)}
        elif history.step:
            history.evaluations_without_gain += 1

    def save() -> None:
        nonlocal last_save, save_seconds
        started = time.monotonic()
        run.store.save(_state(trained, optimizer, history, best, run))
        last_save = time.monotonic()
        save_seconds = last_save - started

    if history.step == 0 and not history.curve and len(held_out):
        validate()
        history.curve.append({"step": 0, **_prefixed(history.validation)})

    while history.step < num_steps:
        if config.patience and history.evaluations_without_gain >= config.patience:
            progress.say(f"no gain in {config.patience} validations; best at {history.best_step}")
            break
        started = time.monotonic()
        scheduled = learning_rate(
            config.schedule, 1.0, history.step, num_steps, config.warmup_steps
        )
        samples = batches.samples_of(history.step)
        step = batches.step(history.step, run.processes.rank, run.processes.world)
        values = take_step(
            forward, objective, optimizer, step, history.step / num_steps, scheduled, run
        )
        _require_finite(values, history.step, scheduled * config.lr, samples, dataset, config)
        tokens = _num_tokens(dataset, samples)
        progress.update(history.step, values["loss"], tokens)
        history.step += 1
        history.tokens += tokens
        for name, value in values.items():
            history.window[name] = history.window.get(name, 0.0) + value
        history.window_steps += 1
        last = history.step == num_steps
        evaluated = bool(len(held_out)) and (history.step % config.eval_interval == 0 or last)
        if evaluated:
            validate()
        if history.step % curve_interval == 0 or last:
            row: dict[str, Number] = {"step": history.step, "lr": scheduled * config.lr}
            row |= {name: total / history.window_steps for name, total in history.window.items()}
            row |= _prefixed(history.validation) if evaluated else {}
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
    if best:
        trained.load_state_dict(best, strict=False)
        history.validation = mean_loss(forward, objective, dataset, held_out, extras, config, run)
    gather(trained, model)
    run.record |= {
        "steps": history.step,
        "tokens": history.tokens,
        "training_seconds": round(history.seconds, 2),
        "tokens_per_second": round(history.tokens / max(history.seconds, 1e-9)),
        "resumes": history.resumes,
    }
    return history


def split(dataset: EncodedDataset, config: FitConfig) -> tuple[Rows, Rows]:
    """Numbers of the samples that a run trains on, and of those that it holds out."""
    return split_samples(dataset.sources, config.validation_share, config.seed, dataset.copies)


def summary(history: History) -> dict[str, Number]:
    """The few numbers that stand for a run in its metrics: of the curve's last row, but lr.

    With validation also the loss before the first step.
    """
    first, last = history.curve[0], history.curve[-1]
    values = {name: value for name, value in last.items() if name not in HIDDEN}
    values |= _prefixed(history.validation)  # of the step that the weights are of
    if first["step"] == 0:
        values["initial_val_loss"] = first["val_loss"]
    return {"steps": history.step, "tokens": history.tokens, **values}


def take_step(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    step: Step,
    progress: float,
    rate: float,
    run: Run,
) -> dict[str, float]:
    """One optimizer step over all micro-batches: the mean of every term, loss and gradient norm.

    Each term is divided by its count over the whole step, so that micro-batches of unequal size
    weigh what they hold. The same holds for processes, each of which has a share of the step.
    """
    means: dict[str, Tensor] = {}
    for number, batch in enumerate(step.micro_batches, start=1):
        last = number == len(step.micro_batches)
        with nullcontext() if last else without_sync(model):
            with autocast(run.device, optimizer.config.dtype):
                loss = objective(model, batch.to(run.device), progress)
            shares = {
                name: term.total / getattr(step.totals, term.per)
                for name, term in loss.terms.items()
            }
            total = torch.stack(list(shares.values())).sum() * batch.weight
            optimizer.backward(total)
        _add(means, {"loss": total.detach()})
        for name, term in _reported(loss).items():
            mean = term.total.detach() / getattr(step.totals, term.per)
            _add(means, {name: mean * batch.weight})
    values = _to_floats(means, run)
    return values | {"grad_norm": optimizer.step(rate)}


def mean_loss(
    model: nn.Module,
    objective: Objective,
    dataset: EncodedDataset,
    samples: Rows,
    extras: dict[str, Extra],
    config: FitConfig,
    run: Run,
) -> dict[str, float]:
    """Loss and metrics over held-out samples, each the mean over all of them."""
    sums: dict[str, Tensor] = {}
    counts = count(dataset, samples)
    place = run.processes
    units: dict[str, Unit] = {}
    term_names: set[str] = set()
    model.eval()
    with torch.no_grad(), autocast(run.device, config.dtype):
        for batch in in_order(dataset, samples, config.batch_size, extras, place.rank, place.world):
            loss = objective(model, batch.to(run.device), progress=0.0)
            term_names |= set(loss.terms)
            for name, term in {**loss.terms, **_reported(loss)}.items():
                _add(sums, {name: term.total * batch.weight})
                units[name] = term.per
    model.train()
    totals = _to_floats(sums, run)
    means = {name: total / getattr(counts, units[name]) for name, total in totals.items()}
    shown = {name: means[name] for name in means if name in _reported(loss)}
    return {"loss": sum(means[name] for name in means if name in term_names), **shown}


def _reported(loss: Loss) -> dict[str, Term]:
    """Metrics, and terms where the loss has several."""
    return {**(loss.terms if len(loss.terms) > 1 else {}), **loss.metrics}


def _add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def _to_floats(values: dict[str, Tensor], run: Run) -> dict[str, float]:
    """Sums over processes. All at once: on a GPU every single read would wait for it."""
    together = run.processes.sum(torch.stack([v.float() for v in values.values()]))
    return dict(zip(values, together.tolist(), strict=True))


def _num_tokens(dataset: EncodedDataset, samples: Rows) -> int:
    """Tokens of some samples, trained on or not, from the data set's index alone."""
    first, last = samples * dataset.rows_per_sample, (samples + 1) * dataset.rows_per_sample
    return int((dataset.offsets[last] - dataset.offsets[first]).sum())


def _prefixed(validation: dict[str, float]) -> dict[str, float]:
    return {f"val_{name}": value for name, value in validation.items()}


def _require_finite(
    values: Mapping[str, float],
    step: int,
    rate: float,
    samples: Rows,
    dataset: EncodedDataset,
    config: FitConfig,
) -> None:
    # In float16 an infinite gradient is normal: the scaler skips the step and scales down.
    names = ["loss"] if config.dtype == "float16" else ["loss", "grad_norm"]
    for name in [name for name in names if not math.isfinite(values[name])]:
        per_sample = dataset.rows_per_sample
        rows = sorted(int(s) * per_sample + k for s in samples for k in range(per_sample))
        shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
        raise UserError(
            f"{name} is {values[name]} at step {step} (learning rate {rate:g}) on rows {shown} of "
            f"{dataset.directory}; lower lr, or look at these rows. The last good state is kept."
        )


def _state(
    model: nn.Module, optimizer: Optimizer, history: History, best: dict[str, Tensor], run: Run
) -> TrainingState:
    """All that the rest of the run depends on, whole: it can go on in other processes."""
    parameters = trained_parameters(model)
    tensors: dict[str, Tensor] = {f"model/{name}": full_tensor(p).cpu() for name, p in parameters}
    tensors |= {f"optimizer/{name}": t for name, t in optimizer.state_tensors().items()}
    tensors |= {f"best/{name}": full_tensor(tensor).cpu() for name, tensor in best.items()}
    # Of every process: each draws its own dropout.
    tensors["rng/cpu"] = torch.stack(run.processes.gather(torch.get_rng_state()))
    if run.device.type == "cuda":
        tensors["rng/cuda"] = torch.stack(run.processes.gather(torch.cuda.get_rng_state()))
    values = {
        "history": asdict(history),
        "scaler": optimizer.scaler_state(),
        "computed_with": run.computed_with(),
    }
    return TrainingState(history.step, tensors, values)


def _restore(model: nn.Module, optimizer: Optimizer, run: Run) -> tuple[History, dict[str, Tensor]]:
    """The newest state's history and best weights; model, optimizer and generators are set."""
    state, damaged = run.store.load()
    for line in damaged:
        run.say(line)
    if state is None:
        return History(), {}

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in state.tensors.items()
            if name.startswith(prefix)
        }

    load_parameters(model, part("model/"))
    optimizer.load_state_tensors(part("optimizer/"))
    optimizer.load_scaler_state(state.values["scaler"])
    rank = run.processes.rank
    if rank < len(state.tensors["rng/cpu"]):
        # Cloned: PyTorch reads a generator's state from where the whole tensor begins.
        torch.set_rng_state(state.tensors["rng/cpu"][rank].clone())
        if run.device.type == "cuda" and "rng/cuda" in state.tensors:
            torch.cuda.set_rng_state(state.tensors["rng/cuda"][rank].clone())
    history = History(**state.values["history"])
    history.resumes += 1
    run.say(f"going on from step {history.step}")
    before, now = state.values["computed_with"], run.computed_with()
    if before != now:
        changed = ", ".join(
            f"{k} {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]
        )
        run.say(f"computed otherwise than before ({changed}): the last bits may differ")
    parameters = dict(model.named_parameters())
    best = {
        name: part_like(tensor.to(run.device), parameters[name])
        for name, tensor in part("best/").items()
    }
    return history, best
