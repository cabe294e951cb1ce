"""Resume checkpoints of many processes that train one model: one has the disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minimind.compute.processes import Processes, dtype_name
from minimind.lineage.resume import ResumeCheckpoint, ResumeStore


class SharedStore(ResumeStore):
    """The checkpoints of many processes: one writes them, all of them read."""

    def __init__(self, directory: Path, check: Callable[[], None], processes: Processes) -> None:
        self.processes = processes
        if processes.is_main:
            super().__init__(directory, check)

    def save(self, checkpoint: ResumeCheckpoint) -> None:
        """As for one process, with tensors that are whole; returns when the checkpoint is there."""
        if self.processes.is_main:
            super().save(checkpoint)
        self.processes.wait()

    def load(self) -> tuple[ResumeCheckpoint | None, list[str]]:
        """What the writer reads, sent to all: they need not have its disk."""
        checkpoint, damaged = super().load() if self.processes.is_main else (None, [])
        return _send(checkpoint, self.processes), damaged

    def finish(self, record: dict[str, Any]) -> None:
        if self.processes.is_main:
            super().finish(record)

    def remove(self) -> None:
        if self.processes.is_main:
            super().remove()

    def close(self) -> None:
        if self.processes.is_main:
            super().close()


def _send(checkpoint: ResumeCheckpoint | None, processes: Processes) -> ResumeCheckpoint | None:
    """The first process's checkpoint, on all of them."""
    shapes = {
        name: (list(tensor.shape), dtype_name(tensor.dtype))
        for name, tensor in (checkpoint.tensors if checkpoint else {}).items()
    }
    known = (checkpoint.step, checkpoint.values, shapes) if checkpoint else None
    if (found := processes.gather(known)[0]) is None:
        return None
    step, values, shapes = found
    tensors = {}
    for name, (shape, dtype) in shapes.items():
        if checkpoint:
            tensor = checkpoint.tensors[name]
        else:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        if tensor.numel():
            dist.broadcast(tensor, src=0)
        tensors[name] = tensor
    return ResumeCheckpoint(step, tensors, values)
