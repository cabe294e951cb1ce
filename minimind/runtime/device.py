"""Where tensors live and how many threads work on them."""

import torch

from minimind.errors import UserError
from minimind.runtime.settings import RuntimeSettings


def prepare_device(settings: RuntimeSettings) -> torch.device:
    """The device asked for, or the best there is; sets threads and matmul precision."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision(settings.matmul_precision)
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if settings.device == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available[settings.device]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise UserError(f"MINIMIND_DEVICE is {settings.device!r}; this machine has: {there}.")
    return torch.device(settings.device)
