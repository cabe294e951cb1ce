"""What an objective returns: sums, and what each is to be divided by.

A term is divided by its count over the whole optimizer step, by whoever knows the whole step.
So micro-batches, packing and the number of processes do not change the mathematics.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.datasets.batches import PackedBatch, Unit
from minimind.model.transformer import Output

# On CPU, more scores than these are looked at a few rows at a time: as many as stay in its cache.
# Fewer are as fast together; more would each time be memory that the system has to hand out anew.
MANY_SCORES = 2**22
SCORES_AT_A_TIME = 2**18


class Term(NamedTuple):
    """A sum over a micro-batch, and the unit its mean is taken over."""

    total: Tensor  # float32 scalar
    per: Unit


class Loss(NamedTuple):
    """Terms are added up and differentiated; metrics are only reported."""

    terms: dict[str, Term]
    metrics: dict[str, Term]


class Objective(Protocol):
    """What stages differ in: a loss as a function of model and batch."""

    def __call__(self, model: nn.Module, batch: PackedBatch, progress: float) -> Loss:
        """The loss of a micro-batch; `progress` is the share of training done, from 0 to 1."""


def token_logprobs(scores: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target: [M, V] of any float type, int64 [M] -> float32 [M].

    The softmax is that of scores / temperature, in float32.
    """
    if scores.device.type == "cpu" and scores.numel() > MANY_SCORES:
        logprobs = _LogprobsByRows.apply(scores, targets, temperature)
        assert isinstance(logprobs, Tensor)
        return logprobs
    return _logprobs(scores, targets, temperature)


def _logprobs(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    scaled = scores.float() if temperature == 1 else scores.float() / temperature
    return -F.cross_entropy(scaled, targets, reduction="none")


class _LogprobsByRows(torch.autograd.Function):
    """The same, bit by bit, a few rows at a time, and once more for the gradient.

    Scores in float32, their log-softmax and both gradients would be the largest tensors of a step,
    and moving them would take longer than computing them twice.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(scores, targets)
        ctx.temperature = temperature
        parts = _by_rows(scores, targets)
        return torch.cat([_logprobs(part, target, temperature) for part, target in parts])

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor) -> tuple[Tensor, None, None]:
        scores, targets = ctx.saved_tensors
        grad_scores = torch.empty_like(scores)
        for part, target, grad, into in _by_rows(scores, targets, grad_logprobs, grad_scores):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                logprobs = _logprobs(leaf, target, ctx.temperature)
            into.copy_(torch.autograd.grad(logprobs, leaf, grad)[0])
        return grad_scores, None, None


def _by_rows(scores: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few rows of each tensor."""
    rows = max(1, SCORES_AT_A_TIME // scores.shape[1])
    return zip(*(tensor.split(rows) for tensor in (scores, *others)), strict=True)


def with_balance(loss: Loss, output: Output) -> Loss:
    """Add a mixture of experts' balance loss, and the load of each expert as a metric.

    A load is the expert's share of a sample's choices, the mean over layers; all add up to 1.
    Without experts the loss is returned as it is.
    """
    if output.balance is None or output.expert_load is None:
        return loss
    loads = output.expert_load.mean(0)
    return Loss(
        terms=loss.terms | {"balance": Term(output.balance, "rows")},
        metrics=loss.metrics
        | {f"load_expert_{expert}": Term(load, "rows") for expert, load in enumerate(loads)},
    )
