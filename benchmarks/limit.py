"""The processor's limit: the fastest product of two square matrices that we can measure."""

import time
from collections.abc import Callable

import torch

from minimind.model.transformer import ModelConfig

SIZES = (1024, 2048)


def matmul_rate(
    dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter, repeats: int = 5
) -> float:
    """Best floating-point operations a second of a matrix product in this number format."""
    best = 0.0
    for size in SIZES:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        for _ in range(repeats):
            started = clock()
            torch.mm(a, b)
            best = max(best, 2 * size**3 / (clock() - started))
    return best


def training_operations(config: ModelConfig, num_tokens: int, num_trained: int) -> float:
    """Operations of the matmuls of a training step, those of attention left out.

    Two for each weight and token forward, twice as many backward; the head at trained tokens.
    """
    heads = config.num_heads + config.num_kv_heads  # queries and output; keys and values
    attention = 2 * config.hidden_size * heads * config.head_size
    feed_forward = 3 * config.hidden_size * config.intermediate_size
    inside = config.num_layers * (attention + feed_forward)
    head = config.hidden_size * config.vocab_size
    return 6.0 * (inside * num_tokens + head * num_trained)
