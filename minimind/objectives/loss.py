"""What an objective returns: sums, and what each is to be divided by.

A term is divided by its count over the whole optimizer step, by whoever knows the whole step.
So micro-batches, packing and the number of processes do not change the mathematics.
"""

from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from minimind.datasets.batches import PackedBatch, Unit
from minimind.model.transformer import Output
from minimind.objectives.chunked import chunked


class Term(NamedTuple):
    """A sum over a micro-batch, and the unit its mean is taken over."""

    total: Tensor  # float32 scalar
    per: Unit


class Loss(NamedTuple):
    """Terms are added up and differentiated; metrics are only reported."""

    terms: dict[str, Term]
    metrics: dict[str, Term]
    logprobs: Tensor | None = None  # of the targets, float32 [M]: what a policy now says of them

    @classmethod
    def mean(cls, values: Tensor, per: Unit, name: str = "loss", **metrics: Tensor) -> "Loss":
        """The mean of `values`, and of each metric, over as many as there are of a unit in a step.

        values: [M] of the micro-batch, one for each token, row or sample as `per` says.
        """
        return cls(
            terms={name: Term(values.float().sum(), per)},
            metrics={key: Term(m.detach().float().sum(), per) for key, m in metrics.items()},
        )


class Objective(Protocol):
    """What stages differ in: a loss as a function of model and batch."""

    def __call__(self, model: nn.Module, batch: PackedBatch, progress: float) -> Loss:
        """The loss of a micro-batch; `progress` is the share of training done, from 0 to 1."""


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target: [M, V] of any float type, int64 [M] -> float32 [M].

    The softmax is that of logits / temperature, in float32.
    """

    def row_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor]:
        scaled = logits.float() if temperature == 1 else logits.float() / temperature
        return (-F.cross_entropy(scaled, targets, reduction="none"),)

    (logprobs,) = chunked(row_logprobs, logits, targets)
    return logprobs


def with_aux_loss(loss: Loss, output: Output) -> Loss:
    """Add a mixture of experts' auxiliary loss, and the load of each expert as a metric.

    A load is the expert's share of a sample's choices, the mean over layers; all add up to 1.
    Without experts the loss is returned as it is.
    """
    if output.aux_loss is None or output.expert_load is None:
        return loss
    loads = output.expert_load.mean(0)
    load_terms = {f"load_expert_{e}": Term(load, "rows") for e, load in enumerate(loads)}
    aux_loss = {"aux_loss": Term(output.aux_loss, "rows")}
    return loss._replace(terms=loss.terms | aux_loss, metrics=loss.metrics | load_terms)
