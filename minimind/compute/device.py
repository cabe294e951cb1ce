"""Where tensors live, and how many threads work on them."""

import os

import torch

from minimind.compute.launch import is_worker
from minimind.compute.matmuls import choose_matmuls
from minimind.compute.settings import RuntimeSettings
from minimind.errors import UserError


def prepare_device(settings: RuntimeSettings) -> torch.device:
    """The device asked for, or the best there is; sets threads and how matmuls are computed."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision(settings.matmul_precision)
    choose_matmuls(settings.cpu_matmuls)
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and not is_worker(),  # one process's alone
        "cpu": True,
    }
    name: str = settings.device
    if name == "auto":
        name = next(known for known in ("cuda", "mps", "cpu") if available[known])
    if not available[name]:
        there = ", ".join(known for known, is_there in available.items() if is_there)
        raise UserError(f"MINIMIND_DEVICE is {name!r}; this machine has: {there}.")
    # Equal runs, equal bytes: eager CPU code is so by itself, compiled code and CUDA are not.
    if name == "cuda" or settings.compile:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow
    if name == "cuda" and is_worker():
        return _own_gpu(int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def limit_matmul_cache() -> None:
    """For work whose matmuls hardly ever have a size again; to be called before the first one.

    On CPU oneDNN keeps what it prepared for the last 1,024 sizes, which may be megabytes each.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def _own_gpu(local_rank: int) -> torch.device:
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"there are more processes than GPUs ({torch.cuda.device_count()}); set "
            "MINIMIND_PROCESSES to the number of this machine's GPUs, or MINIMIND_DEVICE to cpu."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
