"""What there is to divide among stages: GPUs, or threads and memory."""

import os
import sys
from pathlib import Path

import psutil

from minimind.compute.settings import RuntimeSettings
from minimind.orchestrate.scheduler import Machine


def gpus(settings: RuntimeSettings) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each stage at a time; empty where stages run on the CPU."""
    has_none = sys.platform != "darwin" and not any(Path("/dev").glob("nvidia[0-9]*"))
    if settings.device == "cpu" or has_none:
        return []
    import torch  # slow to load, so not before there is a chance

    if torch.backends.mps.is_available():
        return ["0"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(1024)))).split(",")
    visible, each = visible[: torch.cuda.device_count()], settings.processes
    return [",".join(visible[i : i + each]) for i in range(0, len(visible) - each + 1, each)]


def machine(settings: RuntimeSettings, jobs: int | None, num_gpus: int) -> Machine:
    """jobs: stages at a time; None for as many as there are GPUs, or else physical cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = settings.threads or (int(asked) if asked.isdecimal() else 0) or _cores()
    jobs = min(jobs or 1024, num_gpus) if num_gpus else jobs or threads
    if settings.launcher:  # what trains does so elsewhere
        return Machine(jobs, max(threads, jobs), divides_threads=False)
    return Machine(jobs, max(threads, jobs), _free_memory() / 2**20, divides_threads=not num_gpus)


def _cores() -> int:
    """Physical ones that this process may use."""
    physical = psutil.cpu_count(logical=False) or 1
    return min(physical, len(os.sched_getaffinity(0))) if sys.platform == "linux" else physical


def _free_memory() -> int:
    """Bytes that programs may still take, a container's limit heard."""
    free = psutil.virtual_memory().available
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no such limit
        return free
