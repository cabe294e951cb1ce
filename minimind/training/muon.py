"""Muon for many small matrices: those of one shape are orthogonalized together."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from minimind.compute.sharding import full_tensor, part_like


class Muon(torch.optim.Muon):
    """The same update as :class:`torch.optim.Muon`, a matmul for all matrices of a shape at once.

    One after the other, those of a small model would be hundreds of matmuls too small for two
    cores. PyTorch's always orthogonalizes in bfloat16, ours in the type it is given. Where
    processes hold parts of each matrix, all of them orthogonalize the whole of it.
    """

    def __init__(self, params: list[nn.Parameter], *, dtype: torch.dtype, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
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
        settings = group["ns_coefficients"], group["ns_steps"], group["eps"]
        orthogonal = orthogonalize(stacked, *settings).unbind()
        # An orthogonal update as large as AdamW's: arXiv:2502.16982, section 2.2.
        scale = 0.2 * math.sqrt(max(parameters[0].shape))
        for parameter, update in zip(parameters, orthogonal, strict=True):
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
