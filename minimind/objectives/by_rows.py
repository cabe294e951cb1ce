"""Functions of a step's scores, [M, V], that are computed a few rows at a time on CPU.

In float32 the scores, their softmax and the gradients of both are the largest tensors of a step.
Moving them, and having the system hand out that memory anew, takes longer than to compute them
twice in parts that stay in the processor's cache.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Fewer scores than these are as fast together.
MANY_SCORES = 2**22
SCORES_AT_A_TIME = 2**18

# function(scores [M, V], *others [M, ..]) -> tensors [M]; row i is a matter of rows i alone
RowFunction = Callable[..., tuple[Tensor, ...]]


def by_rows(function: RowFunction, scores: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """function(scores, *others), with the same bits; only the scores get a gradient."""
    if scores.device.type != "cpu" or scores.numel() <= MANY_SCORES:
        return function(scores, *others)
    results: tuple[Tensor, ...] = _ByRows.apply(function, scores, *others)
    return results


class _ByRows(torch.autograd.Function):
    """Keeps no results but those returned, and computes the others again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, function: RowFunction, scores: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(scores, *others)
        parts = [function(*part) for part in _parts(scores, *others)]
        return tuple(torch.cat(results) for results in zip(*parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, *others = ctx.saved_tensors
        grad_scores = torch.empty_like(scores)
        parts = zip(_parts(scores, *others), _parts(scores, grad_scores, *grads), strict=True)
        for (part, *rest), (_, grad_part, *grad_results) in parts:
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                results = ctx.function(leaf, *rest)
            grad_part.copy_(torch.autograd.grad(results, leaf, grad_results)[0])
        return None, grad_scores, *(None for _ in others)


def _parts(scores: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few rows of each tensor."""
    rows = max(1, SCORES_AT_A_TIME // scores.shape[1])
    return zip(*(tensor.split(rows) for tensor in (scores, *others)), strict=True)
