"""Resume states of many processes that train one model: one has the disk, all read what it has."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minimind.compute.processes import Processes, dtype_name, from_bytes, to_bytes
from minimind.lineage.resume import ResumeStore, TrainingState


class SharedStore(ResumeStore):
    """The states of many processes: one writes them, all of them read."""

    def __init__(self, directory: Path, processes: Processes) -> None:
        self.processes = processes
        if processes.is_main:
            super().__init__(directory)

    def save(self, state: TrainingState) -> None:
        """As for one process, with tensors that are whole; returns when the state is there."""
        if self.processes.is_main:
            super().save(state)
        self.processes.wait()

    def load(self) -> tuple[TrainingState | None, list[str]]:
        """What the writer reads, sent to all: they need not have its disk."""
        state, damaged = super().load() if self.processes.is_main else (None, [])
        return _send(state), damaged

    def finish(self, record: dict[str, Any]) -> None:
        if self.processes.is_main:
            super().finish(record)

    def remove(self) -> None:
        if self.processes.is_main:
            super().remove()

    def close(self) -> None:
        if self.processes.is_main:
            super().close()


def _send(state: TrainingState | None) -> TrainingState | None:
    """The first process's state, on all of them."""
    text = to_bytes((state.step, state.values, _shapes(state)) if state else None)
    length = torch.tensor(len(text))
    dist.broadcast(length, src=0)
    header = torch.frombuffer(bytearray(text.ljust(int(length))[: int(length)]), dtype=torch.uint8)
    dist.broadcast(header, src=0)
    if (found := from_bytes(header)) is None:
        return None
    step, values, shapes = found
    tensors = {}
    for name, (shape, dtype) in shapes.items():
        tensor = state.tensors[name] if state else torch.empty(shape, dtype=getattr(torch, dtype))
        if tensor.numel():
            dist.broadcast(tensor, src=0)
        tensors[name] = tensor
    return TrainingState(step, tensors, values)


def _shapes(state: TrainingState) -> dict[str, tuple[list[int], str]]:
    return {name: (list(t.shape), dtype_name(t.dtype)) for name, t in state.tensors.items()}
