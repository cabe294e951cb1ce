"""Functions of a step's logits, [M, V], that are computed a few rows at a time on CPU.

In float32 the logits, their softmax and the gradients of both are the largest tensors of a step:
moving them takes longer than to compute them twice in parts that stay in the processor's cache.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Fewer logits than these are as fast together.
MANY_LOGITS = 2**22
LOGITS_AT_A_TIME = 2**18

# function(logits [M, V], *others [M, ..]) -> tensors [M]; row i is a matter of rows i alone
RowFunction = Callable[..., tuple[Tensor, ...]]


def chunked(function: RowFunction, logits: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """function(logits, *others), with the same bits; only the logits get a gradient."""
    if logits.device.type != "cpu" or logits.numel() <= MANY_LOGITS:
        return function(logits, *others)
    results: tuple[Tensor, ...] = _Chunked.apply(function, logits, *others)
    return results


class _Chunked(torch.autograd.Function):
    """Keeps no results but those returned, and computes the others again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, function: RowFunction, logits: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(logits, *others)
        parts = [function(*part) for part in _parts(logits, *others)]
        return tuple(torch.cat(results) for results in zip(*parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, *others = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        parts = zip(_parts(logits, *others), _parts(logits, grad_logits, *grads), strict=True)
        for (part, *rest), (_, grad_part, *grad_results) in parts:
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                results = ctx.function(leaf, *rest)
            grad_part.copy_(torch.autograd.grad(results, leaf, grad_results)[0])
        return None, grad_logits, *(None for _ in others)


def _parts(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few rows of each tensor."""
    rows = max(1, LOGITS_AT_A_TIME // logits.shape[1])
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)
