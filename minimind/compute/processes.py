"""Many processes that train one model: who one of them is, and what they know together.

All processes call the same functions in the same order; where there is one, each function gives
back what it is given. No number that is tracked depends on how many there are, rounding aside.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """One process's place among all that train the same model."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks, and writes states and outputs."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of some items: every world-th."""
        return items[self.rank :: self.world]

    def in_order(self, mine: Sequence[T]) -> list[T]:
        """From what each process made of its share, what was made of all items, in their order."""
        shares = self.gather(list(mine))
        merged: list[T | None] = [None] * sum(map(len, shares))
        for rank, share in enumerate(shares):
            merged[rank :: self.world] = share
        return merged  # type: ignore[return-value]  # no None is left

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank: what JSON can hold, and tensors."""
        if self.world == 1:
            return [value]
        text = to_bytes(value)
        (longest,) = self.largest(len(text))
        # JSON may end in spaces. PyTorch's own exchange of objects would unpickle what comes in.
        padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        texts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(texts, padded)
        return [from_bytes(text) for text in texts]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes; the same bits on each."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def largest(self, *values: int) -> list[int]:
        """The largest over processes of each value."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def wait(self) -> None:
        """Until all processes have come here."""
        self.largest(0)


def join_processes(device: torch.device) -> Processes:
    """Meet the processes that torchrun has started beside this one, if any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    # What is not on a GPU goes through gloo there too: flags, texts, states.
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size())


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_bytes(value: Any) -> bytes:
    """JSON, in which numbers keep all their bits; tuples become lists."""

    def tensor_as_json(tensor: Tensor) -> dict[str, Any]:
        return {"tensor": tensor.tolist(), "dtype": dtype_name(tensor.dtype)}

    return json.dumps(value, default=tensor_as_json).encode()


def from_bytes(text: Tensor) -> Any:
    def tensor_from_json(found: dict[str, Any]) -> Any:
        if found.keys() != {"tensor", "dtype"}:
            return found
        return torch.tensor(found["tensor"], dtype=getattr(torch, found["dtype"]))

    return json.loads(text.numpy().tobytes(), object_hook=tensor_from_json)
