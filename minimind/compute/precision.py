"""The number format of the computation; weights and updates stay in float32."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

from minimind.compute.matmuls import prepare_matmuls

DType = Literal["float32", "bfloat16", "float16"]


def autocast(device: torch.device, dtype: DType) -> AbstractContextManager[None]:
    """Compute in `dtype` where that is safe (PyTorch's automatic mixed precision)."""
    prepare_matmuls(getattr(torch, dtype))
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
