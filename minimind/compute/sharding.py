"""How a model's training is spread over processes: copies of it, or one in parts.

With copies (DistributedDataParallel) each process holds the whole model and its optimizer. In
parts (``fully_shard``) each holds a share of every weight, of its gradient and of its optimizer
state, and all of a layer's weights only while the layer is computed. Both take the *mean* of the
processes' gradients; losses here are sums, so they are multiplied by the number of processes.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minimind.compute.compiling import compiled
from minimind.compute.processes import Processes
from minimind.compute.settings import RuntimeSettings


def shard(
    model: nn.Module,
    layer_type: type[nn.Module],
    device: torch.device,
    processes: Processes,
    settings: RuntimeSettings,
) -> tuple[nn.Module, nn.Module]:
    """Give every process a part in training `model`: what is trained, and what is called for it.

    With one process, or copies, `model` itself is trained, on the device. In parts, a copy of it
    is, divided layer by layer, and `model` is left as it is: see :func:`gather`.
    """
    if processes.world > 1 and settings.shard:
        sharded = _sharded(model, layer_type, device, processes)
        return sharded, compiled(sharded, settings)
    model.to(device).train()
    forward = compiled(model, settings)
    if processes.world == 1:
        return model, forward
    with warnings.catch_warnings():  # of an option's new name, which older versions do not know
        warnings.simplefilter("ignore", FutureWarning)
        # Unless it looks for unused weights, DDP arranges gradients anew after its first step. A
        # resumed run would then add them up in another order, and end with other bits.
        return model, DistributedDataParallel(
            forward, broadcast_buffers=False, find_unused_parameters=True
        )


def _sharded(
    model: nn.Module, layer_type: type[nn.Module], device: torch.device, processes: Processes
) -> nn.Module:
    # Imported here: it takes a second, and only those who shard need it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.world,))
    sharded = copy.deepcopy(model).train()
    for module in list(sharded.modules()):
        if isinstance(module, layer_type):
            fully_shard(module, mesh=mesh)
    # In parts again after a forward pass: after one without a backward pass, as in validation,
    # the weights outside of layers would else stay whole, and not be those that are trained.
    fully_shard(sharded, mesh=mesh, reshard_after_forward=True)
    return sharded


def without_sync(forward: nn.Module) -> AbstractContextManager[None]:
    """Around a step's micro-batches but the last, with which copies exchange all gradients."""
    return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; all of them must ask."""
    return tensor.full_tensor() if _is_divided(tensor) else tensor  # type: ignore[attr-defined]


def part_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Of a whole tensor, that part which this process has of `other`, if `other` is divided."""
    if not _is_divided(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    # Without a source, nothing is sent: every process has the whole tensor.
    return distribute_tensor(
        tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None
    )


def _is_divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose import takes a second


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


@torch.no_grad()
def gather(trained: nn.Module, model: nn.Module) -> None:
    """Bring the weights of what `shard` made of `model` back into `model`."""
    if trained is not model:
        pairs = zip(trained_parameters(trained), trained_parameters(model), strict=True)
        for (_, source), (_, target) in pairs:
            target.copy_(full_tensor(source))
