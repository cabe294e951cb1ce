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


def _heads_first(tensor: Tensor, repeats: int = 1) -> Tensor:
    """[T, heads, ..] as contiguous float32 [1, heads * repeats, T, ..]."""
    return tensor.float().transpose(0, 1).repeat_interleave(repeats, 0)[None]


@torch.library.custom_op("minimind::packed_attention", mutates_args=())
def _cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention output [T, H, E] and log-sum-exp of the scores [T, H], sample by sample."""
    repeats = query.shape[1] // key.shape[1]
    queries, keys, values = (
        _heads_first(query),
        _heads_first(key, repeats),
        _heads_first(value, repeats),
    )
    out = torch.empty_like(queries)
    logsumexp = out.new_empty(out.shape[:3])
    for start, end in pairwise(boundaries.tolist()):
        if end > start:
            own = slice(start, end)
            out[:, :, own], logsumexp[:, :, own] = _flash_forward(
                queries[:, :, own], keys[:, :, own], values[:, :, own], 0.0, True
            )
    return out[0].transpose(0, 1).to(query.dtype).contiguous(), logsumexp[0].T.contiguous()


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
    grad_outs, queries, outs = _heads_first(grad_out), _heads_first(query), _heads_first(out)
    keys, values = _heads_first(key, repeats), _heads_first(value, repeats)
    sums = _heads_first(logsumexp)
    grads = [torch.empty_like(queries) for _ in range(3)]  # of query, key and value
    for start, end in pairwise(boundaries.tolist()):
        if end > start:
            own = slice(start, end)
            parts = (grad_outs, queries, keys, values, outs, sums)
            of_sample = _flash_backward(*(part[:, :, own] for part in parts), 0.0, True)
            for grad, sample_grad in zip(grads, of_sample, strict=True):
                grad[:, :, own] = sample_grad
    grad_query, grad_key, grad_value = (grad[0].transpose(0, 1) for grad in grads)
    # A key/value head served `repeats` query heads: its gradient is their sum.
    grad_key, grad_value = (
        grad.unflatten(1, (kv_heads, repeats)).sum(2) for grad in (grad_key, grad_value)
    )
    return tuple(grad.to(query.dtype).contiguous() for grad in (grad_query, grad_key, grad_value))  # type: ignore[return-value]


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
