"""What an objective returns: sums, and what each is to be divided by.

A term is divided by its count over the whole optimizer step, by whoever knows the whole step.
So micro-batches, packing and the number of processes do not change the mathematics.
"""

from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from minimind.datasets.batches import PackedBatch, Unit


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


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target: float32 [M, V], int64 [M] -> float32 [M]."""
    return -F.cross_entropy(logits, targets, reduction="none")
