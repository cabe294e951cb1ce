"""Muon for many small matrices: PyTorch's, with matrices of one shape orthogonalized together."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from minimind.compute.sharding import full_tensor, part_like


class Muon(torch.optim.Muon):
    """The same update as :class:`torch.optim.Muon`, a matmul for all matrices of a shape at once.

    PyTorch's always orthogonalizes in bfloat16, ours in the type it is given.

    One after the other, the matrices of a small model take hundreds of matmuls too small to keep
    two cores busy: a fifth of a training step at the built-in size.

    Where processes hold parts of each matrix, all of them orthogonalize the whole of it.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, dtype: torch.dtype, **settings: Any
    ) -> None:
        super().__init__(params, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows, columns = parameter.shape
                    shape = (min(rows, columns), max(rows, columns))
                    by_shape.setdefault(shape, []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters whose shapes are equal or each other's transpose."""
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer, gradient = state["momentum_buffer"], parameter.grad
            assert gradient is not None
            buffer.lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
            update = full_tensor(update)
            updates.append(update.T if _is_tall(parameter) else update)
        stacked = torch.stack(updates).to(self.dtype)
        orthogonal = orthogonalize(
            stacked, group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        # An orthogonal update as large as AdamW's: arXiv:2502.16982, section 2.2.
        scale = 0.2 * math.sqrt(max(parameters[0].shape))
        for parameter, update in zip(parameters, orthogonal.unbind(), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            update = update.T if _is_tall(parameter) else update
            parameter.add_(part_like(update, parameter), alpha=-group["lr"] * scale)


def orthogonalize(
    matrices: Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrices.

    matrices: [n, rows, columns], rows <= columns. Returns the same shape and type, singular values
    near 1 (Jordan et al., 2024: https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = coefficients
    norms = matrices.flatten(1).norm(dim=1).clamp(min=eps)
    matrices = matrices / norms[:, None, None]
    for _ in range(num_steps):
        gram = matrices @ matrices.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        matrices = torch.baddbmm(matrices, polynomial, matrices, beta=a)
    return matrices


def _is_tall(parameter: Tensor) -> bool:
    return parameter.shape[0] > parameter.shape[1]
