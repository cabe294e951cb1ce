"""One optimizer step over micro-batches, and the mean loss over held-out samples."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from minimind.compute.precision import DType, autocast
from minimind.compute.sharding import without_sync
from minimind.datasets.batches import Batches, Rows, Step, Unit, count, in_order
from minimind.objectives.loss import Loss, Objective, Term
from minimind.training.optimizer import Optimizer
from minimind.training.run import Run


def take_step(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    step: Step,
    progress: float,
    lr_factor: float,
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
    return _to_floats(means, run) | {"grad_norm": optimizer.step(lr_factor)}


def mean_loss(
    model: nn.Module, objective: Objective, batches: Batches, samples: Rows, dtype: DType, run: Run
) -> dict[str, float]:
    """Loss and metrics over held-out samples, each the mean over all of them."""
    sums: dict[str, Tensor] = {}
    dataset, size, extras = batches.dataset, batches.batch_size, batches.extras
    rank, world = run.processes.rank, run.processes.world
    units: dict[str, Unit] = {}
    term_names: set[str] = set()
    model.eval()
    with torch.no_grad(), autocast(run.device, dtype):
        for batch in in_order(dataset, samples, size, extras, rank, world):
            loss = objective(model, batch.to(run.device), progress=0.0)
            term_names |= set(loss.terms)
            terms = loss.terms | loss.metrics
            _add(sums, {name: term.total * batch.weight for name, term in terms.items()})
            units |= {name: term.per for name, term in terms.items()}
    model.train()
    totals = _to_floats(sums, run)
    counts = count(dataset, samples)
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
