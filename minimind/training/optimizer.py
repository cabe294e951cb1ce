"""The optimizer step that every training loop shares: scale, clip, update, and its state."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from minimind.compute.precision import DType
from minimind.compute.sharding import full_tensor, part_like, trained_parameters
from minimind.params import Section
from minimind.training.muon import Muon

FIRST_SCALE = 2.0**16  # of a loss in float16; halved whenever a gradient overflows


class OptimizerConfig(Section):
    """Keys of every trained stage's section that decide a single update."""

    optimizer: Literal["adamw", "muon"] = "muon"
    lr: float = Field(3e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)  # of matrices; norms and the like never decay
    beta2: float = Field(0.95, gt=0, lt=1)
    grad_clip: float = Field(1.0, gt=0)
    dtype: DType = "bfloat16"


class Optimizer:
    """AdamW (arXiv:1711.05101), or Muon for the matrices inside layers and AdamW for the rest.

    Muon is PyTorch's, its updates scaled to the size of AdamW's (arXiv:2502.16982, section 2.2):
    one learning rate serves both.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        device: torch.device,
        num_processes: int = 1,
    ) -> None:
        self.config, self.num_processes = config, num_processes
        self.parameters = [p for _, p in trained_parameters(model)]
        self.optimizers = list(_build(model, config))
        # For float16's range. What `backward` multiplies by is taken from it, so that no process
        # overflows where one alone would not.
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=FIRST_SCALE / num_processes, enabled=config.dtype == "float16"
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's part of a loss."""
        # They become their mean over processes; what is wanted is their sum.
        self.scaler.scale(loss * self.num_processes).backward()

    def step(self, lr_factor: float) -> float:
        """Clip, update and clear the gradients; returns their norm before clipping.

        Where it is not finite in float16, nothing is updated and the loss is scaled down.

        lr_factor: the scheduled share of the configured learning rate, 1 being the whole.
        """
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        # One decision for all optimizers: the scaler's own is made for each.
        is_skipped = self.scaler.is_enabled() and not math.isfinite(full_tensor(norm))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * lr_factor
            if not is_skipped:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return float(full_tensor(norm))

    def state_tensors(self) -> dict[str, Tensor]:
        """Every moment and counter, whole, by name: ``<optimizer>.<parameter>.<key>``."""
        return {
            f"{index}.{parameter}.{key}": full_tensor(value).cpu()
            for index, optimizer in enumerate(self.optimizers)
            for parameter, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        for index, optimizer in enumerate(self.optimizers):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                which, number, key = name.split(".")
                if int(which) == index:
                    part = part_like(tensor, parameters[int(number)])
                    state.setdefault(int(number), {})[key] = part
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def scaler_state(self) -> dict[str, Any]:
        """As that of one process."""
        state = self.scaler.state_dict()
        return state and state | {"scale": state["scale"] * self.num_processes}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state | {"scale": state["scale"] / self.num_processes})


def _build(model: nn.Module, config: OptimizerConfig) -> Iterable[torch.optim.Optimizer]:
    named = list(trained_parameters(model))
    matrices = {name: p for name, p in named if p.dim() == 2}
    others = [p for _, p in named if p.dim() != 2]
    inside = [name for name in matrices if ".layers." in name]
    if config.optimizer == "muon" and inside:
        yield Muon(
            [matrices.pop(name) for name in inside],
            # Not in float16: gradients below its range would be zero before they are normalized.
            dtype=torch.float32 if config.dtype == "float32" else torch.bfloat16,
            lr=config.lr,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
    groups = [
        {"params": [*matrices.values()], "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if groups := [group for group in groups if group["params"]]:  # of an adapter Muon has all
        yield torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)
