"""The language model: a decoder-only transformer, read from top to bottom.

Module and parameter names are those of Hugging Face's Llama, so that a state dict is a
checkpoint without any conversion. Shapes: T tokens of all samples laid end to end, D hidden
size, H query heads, K key/value heads, E head size, F feed-forward width, V vocabulary,
M positions whose next token is scored.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from minimind.model.attention import packed_attention
from minimind.params import Section

# attend(layer index, query [.., H, E], key [.., K, E], value [.., K, E]) -> [.., H, E]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class ModelShape(Section):
    """The `model` section: chosen once, in pretraining, and carried inside the checkpoint."""

    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    max_positions: int = Field(gt=0)
    rope_theta: float = Field(gt=0)
    norm_eps: float = Field(gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelShape":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"hidden_size / num_heads is {self.head_size}; it must be even")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        return self

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def intermediate_size(self) -> int:
        """Feed-forward width F: 8/3 of the hidden size, rounded up to a multiple of 64."""
        return 64 * math.ceil(int(8 * self.hidden_size / 3) / 64)


class ModelConfig(ModelShape):
    """A whole model's shape: the vocabulary's size is the tokenizer's."""

    vocab_size: int = Field(gt=0)


class PackedTokens(NamedTuple):
    """N samples laid end to end, without padding."""

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], from 0 in each sample
    boundaries: Tensor  # int32 [N+1], cumulative starts
    longest: int  # tokens of the longest sample


class Output(NamedTuple):
    """What the model says of the positions asked for."""

    logits: Tensor  # float32 [M, V]


class RMSNorm(nn.Module):
    """Root mean square layer normalization in float32 (arXiv:1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864, eq. 34), pairs (i, i + E/2) as in Llama.

    x: [.., heads, E]; cos, sin: [.., 1, E], already gathered at the tokens' positions.
    """
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; who sees whom is `attend`'s business."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size = layer, config.head_size
        query_size = config.num_heads * config.head_size
        kv_size = config.num_kv_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        query = self.q_proj(x).unflatten(-1, (-1, self.head_size))
        key = self.k_proj(x).unflatten(-1, (-1, self.head_size))
        value = self.v_proj(x).unflatten(-1, (-1, self.head_size))
        out = attend(self.layer, rotate(query, cos, sin), rotate(key, cos, sin), value)
        return self.o_proj(out.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU feed-forward (arXiv:2002.05202, eq. 6)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.recompute_layers = False  # gradient checkpointing: less memory, a third more work
        exponents = torch.arange(0, config.head_size, 2).float() / config.head_size
        self.register_buffer("frequencies", config.rope_theta**-exponents, persistent=False)
        self.frequencies: Tensor

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [.., D] of tokens [..] at positions [..]."""
        x = self.embed_tokens(ids)
        angles = positions[..., None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            if self.recompute_layers and self.training:
                x = recompute_in_backward(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend)
        return self.norm(x)


class Transformer(nn.Module):
    """Decoder with a head that shares the embedding's weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)

    def initialize(self, seed: int) -> None:
        """Normal weights of deviation 0.02, norms at one; the same for a seed everywhere."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.ones_(parameter)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every vocabulary entry as the next token: [.., D] -> float32 [.., V]."""
        return F.linear(hidden, self.model.embed_tokens.weight).float()

    def hidden(self, tokens: PackedTokens) -> Tensor:
        """Hidden states [T, D] of packed samples."""
        attend = partial(_attend_packed, boundaries=tokens.boundaries, longest=tokens.longest)
        return self.model(tokens.ids, tokens.positions, attend)

    def forward(self, tokens: PackedTokens, predict_at: Tensor) -> Output:
        """Logits of the tokens that follow the positions `predict_at` (int64 [M], into T).

        The head runs at these positions alone: nothing is computed that no loss looks at.
        """
        return Output(self.logits(self.hidden(tokens)[predict_at]))


def _attend_packed(
    layer: int, query: Tensor, key: Tensor, value: Tensor, *, boundaries: Tensor, longest: int
) -> Tensor:
    return packed_attention(query, key, value, boundaries, longest)
