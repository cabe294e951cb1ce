"""Causal attention over samples laid end to end, each token seeing its own sample only.

Shapes: T tokens of all samples together, H query heads, K key/value heads (grouped-query
attention, arXiv:2305.13245), E values a head, N samples.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# On CPU a flash call for each sample is several times faster than one call with a block mask, and
# 16-bit flash backward so slow that q, k and v are cast to float32. The query heads that share a
# key/value head are the call's batch: keys and values serve all of them without being repeated. The
# custom operator keeps the loop out of torch.compile's sight.
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
    outs = [
        F.scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None],
            key[start:end].transpose(0, 1)[None],
            value[start:end].transpose(0, 1)[None],
            is_causal=True,
            enable_gqa=True,
        )[0].transpose(0, 1)
        for start, end in pairwise(boundaries.tolist())
        if end > start
    ]
    return torch.cat(outs)


def _by_sample(tensors: tuple[Tensor, ...], boundaries: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [.., .., T, ..] in float32, cut into samples; the empty ones are left out."""
    lengths = [length for length in boundaries.diff().tolist() if length]
    return zip(*(tensor.float().split(lengths, dim=2) for tensor in tensors), strict=True)


def _query_heads(tensor: Tensor, kv_heads: int) -> Tensor:
    """[T, H, ..] as [H / K, K, T, ..]."""
    return tensor.unflatten(1, (kv_heads, -1)).transpose(0, 2)


def _kv_heads(tensor: Tensor, repeats: int) -> Tensor:
    """[T, K, E] as [H / K, K, T, E], the same memory for every query head it serves."""
    return tensor.float().transpose(0, 1).expand(repeats, -1, -1, -1)


@torch.library.custom_op("minimind::packed_attention", mutates_args=())
def _cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention output [T, H, E] and log-sum-exp of the scores [T, H], sample by sample."""
    kv_heads = key.shape[1]
    repeats = query.shape[1] // kv_heads
    inputs = (_query_heads(query, kv_heads), _kv_heads(key, repeats), _kv_heads(value, repeats))
    results = (_flash_forward(*sample, 0.0, True) for sample in _by_sample(inputs, boundaries))
    outs, sums = zip(*results, strict=True)
    out, logsumexp = (torch.cat(parts, 2).transpose(0, 2).flatten(1, 2) for parts in (outs, sums))
    return out.to(query.dtype).contiguous(), logsumexp.contiguous()


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
    kv_heads = key.shape[1]
    repeats = query.shape[1] // kv_heads
    inputs = (
        _query_heads(grad_out, kv_heads),
        _query_heads(query, kv_heads),
        _kv_heads(key, repeats),
        _kv_heads(value, repeats),
        _query_heads(out, kv_heads),
        _query_heads(logsumexp, kv_heads),
    )
    results = (_flash_backward(*sample, 0.0, True) for sample in _by_sample(inputs, boundaries))
    grad_query, grad_key, grad_value = (torch.cat(g, 2) for g in zip(*results, strict=True))
    return (
        grad_query.transpose(0, 2).flatten(1, 2).to(query.dtype).contiguous(),
        # A key/value head served several query heads: its gradient is their sum.
        grad_key.sum(0).transpose(0, 1).to(query.dtype).contiguous(),
        grad_value.sum(0).transpose(0, 1).to(query.dtype).contiguous(),
    )


@_cpu_attention_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, boundaries = inputs
    ctx.save_for_backward(query, key, value, *output, boundaries)


def _backward(ctx, grad_out, _grad_logsumexp):  # type: ignore[no-untyped-def]
    grads = _cpu_attention_backward(grad_out.contiguous(), *ctx.saved_tensors)
    return (*grads, None)


_cpu_attention.register_autograd(_backward, setup_context=_save_for_backward)
