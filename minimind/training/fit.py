"""The training loop of every supervised stage; the objective is all that they differ in."""

import math
from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import nn

from minimind.compute.sharding import gather, shard
from minimind.datasets.batches import Batches, Extra, Rows, split_samples
from minimind.datasets.encoded import EncodedDataset
from minimind.errors import UserError
from minimind.metrics import Number
from minimind.model.transformer import Decoder, Layer
from minimind.objectives.loss import Objective
from minimind.params import Seed
from minimind.training.optimizer import Optimizer, OptimizerConfig
from minimind.training.run import Run
from minimind.training.schedule import ScheduleName, beyond_epochs, lr_factor, never_reached
from minimind.training.session import BestWeights, Generators, History, Part, Session, Weights
from minimind.training.step import mean_loss, take_step


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
    log_interval: int = Field(25, gt=0)  # steps a row of the history averages over
    gradient_checkpointing: bool = False


def fit(
    model: nn.Module,
    objective: Objective,
    dataset: EncodedDataset,
    config: FitConfig,
    run: Run | None = None,
    extras: Mapping[str, Extra] | None = None,
) -> History:
    """Train `model` in place; with patience, it ends with the weights of its best validation.

    run: of a stage in the graph, which goes on from its newest checkpoint, if there is one, as if
        it had never stopped; without one nothing is saved.
    extras: numbers beside the samples, for the objective.

    Raises:
        Stopped: a signal came; a checkpoint to resume from is saved.
        UserError: no sample to train on, or the loss is not finite.
    """
    run, extras = run or Run.alone(), dict(extras or {})
    train, held_out = split(dataset, config)
    _require_samples(dataset, train, held_out, config)
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
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
        torch.manual_seed(config.seed + run.processes.rank)  # each process has a dropout of its own
        for module in model.modules():
            if isinstance(module, Decoder):
                module.recompute_layers = config.gradient_checkpointing
                dataset.check_positions(module.max_positions)
        trained, forward = shard(model, Layer, run.device, run.processes, run.settings)
        optimizer = Optimizer(trained, config, run.device, run.processes.world)
        best = BestWeights(trained)
        parts: dict[str, Part] = {"model": Weights(trained), "best": best, "rng": Generators(run)}
        num_tokens = _num_tokens_of_all(batches)
        session = Session(run, num_steps, config.log_interval, optimizer, parts, num_tokens)
        history = session.history

        def held_out_loss() -> dict[str, float]:
            return mean_loss(forward, objective, batches, held_out, config.dtype, run)

        def validate(step: int) -> dict[str, float]:
            is_due = step % config.eval_interval == 0 or step == num_steps
            if not is_due or not len(held_out):
                return {}
            history.validation = losses = held_out_loss()
            if not math.isfinite(losses["loss"]):
                raise UserError(
                    f"the validation loss is {losses['loss']} after {step} steps on held-out rows "
                    f"of {dataset.directory}; lower lr, or look at these rows. The last good "
                    "checkpoint is kept."
                )
            if config.patience and losses["loss"] < history.best_loss - config.min_delta:
                history.best_loss, history.best_step = losses["loss"], step
                history.evaluations_without_gain = 0
                best.keep()
            elif step:
                history.evaluations_without_gain += 1
            return _prefixed(losses)

        for warning in (
            beyond_epochs(config.max_steps, num_steps, config.epochs),
            never_reached(config.schedule, config.warmup_steps, num_steps),
            *_without_effect(config, dataset.num_sources, len(held_out), num_steps),
        ):
            if warning:
                run.say(warning)
        if session.is_new and len(held_out):
            history.rows.append({"step": 0, **validate(0)})
        for step in session.steps():
            if config.patience and history.evaluations_without_gain >= config.patience:
                run.say(f"no gain in {config.patience} validations; best at {history.best_step}")
                break
            factor = lr_factor(config.schedule, step, num_steps, config.warmup_steps)
            samples = batches.samples_of(step)
            parts_of_step = batches.step(step, run.processes.rank, run.processes.world)
            values = {"lr": factor * config.lr} | take_step(
                forward, objective, optimizer, parts_of_step, step / num_steps, factor, run
            )
            session.require_finite(values, config.dtype, lambda: _named(samples, dataset))  # noqa: B023
            num_skipped = int(not math.isfinite(values["grad_norm"]))
            session.record(values, _num_tokens(dataset, samples), num_skipped, validate)
        session.finish()
        if 0 < history.step == history.skipped_steps:
            run.say(
                "the gradient of every step overflowed in float16, and so nothing was learnt; take "
                "bfloat16, or a lower lr or loss"
            )
        if best.tensors:
            best.bring_back()
            history.validation = held_out_loss()
        gather(trained, model)
        return history


def split(dataset: EncodedDataset, config: FitConfig) -> tuple[Rows, Rows]:
    """Numbers of the samples that a run trains on, and of those that it holds out."""
    return split_samples(dataset.sources, config.validation_share, config.seed, dataset.copies)


def summary(history: History) -> dict[str, Number]:
    """The few numbers that stand for a run in its metrics: those of the history's last row.

    With validation also the loss before the first step.
    """
    first, last = history.rows[0], history.rows[-1]
    hidden = ("step", "lr", "grad_norm")
    values = {name: value for name, value in last.items() if name not in hidden}
    values |= _prefixed(history.validation)  # of the step that the weights are of
    if first["step"] == 0:
        values["initial_val_loss"] = first["val_loss"]
    return {"steps": history.step, "tokens": history.tokens, **values}


def _num_tokens(dataset: EncodedDataset, samples: Rows) -> int:
    """Tokens of some samples, trained on or not, from the data set's index alone."""
    first, last = samples * dataset.rows_per_sample, (samples + 1) * dataset.rows_per_sample
    return int((dataset.offsets[last] - dataset.offsets[first]).sum())


def _num_tokens_of_all(batches: Batches) -> int:
    """Tokens of all steps of a run."""
    num_epochs, num_more = divmod(batches.num_steps, batches.steps_per_epoch)
    rest = range(batches.num_steps - num_more, batches.num_steps)
    more = sum(_num_tokens(batches.dataset, batches.samples_of(step)) for step in rest)
    return num_epochs * _num_tokens(batches.dataset, batches.samples) + more


def _prefixed(validation: dict[str, float]) -> dict[str, float]:
    return {f"val_{name}": value for name, value in validation.items()}


def _require_samples(
    dataset: EncodedDataset, train: Rows, held_out: Rows, config: FitConfig
) -> None:
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


def _without_effect(
    config: FitConfig, num_sources: int, num_held_out: int, num_steps: int
) -> Iterator[str]:
    """Lines of warning for settings of validation that cannot do what they say."""
    if config.validation_share and not num_held_out:
        yield (
            f"validation_share {config.validation_share:g} of {num_sources} source rows holds none "
            f"out, so nothing is validated; {1 / num_sources:.2g} would hold out one"
        )
    num_validations = (num_steps - 1) // config.eval_interval
    if config.patience > num_validations:
        yield (
            f"patience is {config.patience}, but before the last of {num_steps} steps there are "
            f"{num_validations} validations, so it stops nothing; lower eval_interval"
        )
    if config.min_delta and not config.patience:
        yield f"min_delta is {config.min_delta:g}, but patience is 0, so it counts for nothing"


def _named(samples: Rows, dataset: EncodedDataset) -> str:
    per_sample = dataset.rows_per_sample
    rows = sorted(int(s) * per_sample + k for s in samples for k in range(per_sample))
    shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
    return f"rows {shown} of {dataset.directory}"
