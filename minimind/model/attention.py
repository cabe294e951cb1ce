"""Causal attention over samples laid end to end, each token seeing its own sample only.

Shapes: T tokens of all samples together, H query heads, K key/value heads (grouped-query
attention, arXiv:2305.13245), E values a head, N samples.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# A call per sample and no padding: on CPU a flash call for each sample is several times faster
# than one call with a block mask, and 16-bit flash backward is so slow there that q, k and v
# are cast to float32 inside. The custom operator keeps the loop out of torch.compile's sight.
_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def packed_attention(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, boundaries: Tensor, longest: int
) -> Tensor:
    """Causal softmax attention inside each sample; returns [T, H, E] in the query's type.

    boundaries: int32 [N+1] cumulative starts; equal neighbours (empty samples) are allowed.
    longest: tokens of the longest sample.
    """
    if query_THE.device.type == "cpu":
        out, _ = _cpu_attention(
            query_THE.contiguous(), key_TKE.contiguous(), value_TKE.contiguous(), boundaries
        )
        return out
    if query_THE.device.type == "cuda" and query_THE.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            query_THE,
            key_TKE,
            value_TKE,
            boundaries,
            boundaries,
            longest,
            longest,
            window_size=(-1, 0),  # causal
            enable_gqa=query_THE.shape[1] != key_TKE.shape[1],
        )
        assert isinstance(out, Tensor)
        return out
    return _attention_per_sample(query_THE, key_TKE, value_TKE, boundaries)


def _attention_per_sample(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor) -> Tensor:
    """The same by PyTorch's public call alone: MPS, and float32 on CUDA."""
    starts = boundaries.tolist()
    outs = [
        F.scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None],
            key[start:end].transpose(0, 1)[None],
            value[start:end].transpose(0, 1)[None],
            is_causal=True,
            enable_gqa=True,
        )[0].transpose(0, 1)
        for start, end in pairwise(starts)
        if end > start
    ]
    return torch.cat(outs)


def _heads_first(tensor: Tensor, start: int, end: int, repeats: int = 1) -> Tensor:
    """Rows start..end of [T, heads, E] as [1, heads * repeats, n, E]."""
    rows = tensor[start:end].transpose(0, 1)
    if repeats > 1:
        rows = rows.repeat_interleave(repeats, 0)
    return rows[None]


@torch.library.custom_op("minimind::packed_attention", mutates_args=())
def _cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention output [T, H, E] and log-sum-exp of the scores [T, H], sample by sample."""
    dtype = query.dtype
    query, key, value = query.float(), key.float(), value.float()
    repeats = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    logsumexp = query.new_empty(query.shape[:2])
    starts = boundaries.tolist()
    for start, end in pairwise(starts):
        if end == start:
            continue
        sample_out, sample_logsumexp = _flash_forward(
            _heads_first(query, start, end),
            _heads_first(key, start, end, repeats),
            _heads_first(value, start, end, repeats),
            0.0,
            True,
        )
        out[start:end] = sample_out[0].transpose(0, 1)
        logsumexp[start:end] = sample_logsumexp[0].transpose(0, 1)
    return out.to(dtype), logsumexp


@_cpu_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("minimind::packed_attention_backward", mutates_args=())
def _cpu_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    boundaries: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query [T, H, E], key and value [T, K, E]."""
    dtype = query.dtype
    grad_out, query, out = grad_out.float(), query.float(), out.float()
    key, value = key.float(), value.float()
    kv_heads = key.shape[1]
    repeats = query.shape[1] // kv_heads
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    starts = boundaries.tolist()
    for start, end in pairwise(starts):
        if end == start:
            continue
        grads = _flash_backward(
            _heads_first(grad_out, start, end),
            _heads_first(query, start, end),
            _heads_first(key, start, end, repeats),
            _heads_first(value, start, end, repeats),
            _heads_first(out, start, end),
            _heads_first(logsumexp, start, end),
            0.0,
            True,
        )
        grad_query[start:end] = grads[0][0].transpose(0, 1)
        # A key/value head served `repeats` query heads: its gradient is their sum.
        for target, grad in ((grad_key, grads[1]), (grad_value, grads[2])):
            grouped = grad[0].unflatten(0, (kv_heads, repeats)).sum(1)
            target[start:end] = grouped.transpose(0, 1)
    return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype)


@_cpu_attention_backward.register_fake
def _(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    boundaries: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, boundaries = inputs
    ctx.save_for_backward(query, key, value, *output, boundaries)


def _backward(ctx, grad_out, _grad_logsumexp):  # type: ignore[no-untyped-def]
    grads = _cpu_attention_backward(grad_out.contiguous(), *ctx.saved_tensors)
    return (*grads, None)


_cpu_attention.register_autograd(_backward, setup_context=_save_for_backward)
