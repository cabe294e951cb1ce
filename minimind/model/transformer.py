"""The language model: a decoder-only transformer, read from top to bottom.

Module and parameter names are those of Hugging Face's Llama, and with experts those of its
Ernie 4.5 MoE, so that a state dict is a checkpoint without any conversion. Shapes: T tokens of
all samples laid end to end, D hidden size, H query heads, K key/value heads, E head size,
F feed-forward width, V vocabulary, M positions whose next token is scored.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from minimind.model.attention import packed_attention
from minimind.model.moe import FeedForward, MixtureOfExperts, Routing, aux_loss_and_load
from minimind.params import Section

# Products of T tokens take T up to the next multiple of this: see `_filled`.
FILL = 32

# attend(layer index, query [.., H, E], key [.., K, E], value [.., K, E]) -> [.., H, E]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class ModelShape(Section):
    """The `model` section: chosen once, in pretraining, and carried inside the checkpoint."""

    hidden_size: int = Field(gt=0, le=2**16)
    num_layers: int = Field(gt=0, le=2**10)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    max_positions: int = Field(1024, gt=0)
    rope_theta: float = Field(1e6, gt=0)
    norm_eps: float = Field(1e-5, gt=0)
    num_experts: int = Field(0, ge=0)  # 0: one feed-forward network for all tokens of a layer
    # The following are read only where there are experts, and are 0 elsewhere.
    num_experts_per_token: int = Field(2, ge=0)
    num_shared_experts: int = Field(1, ge=0)  # beside those that are chosen, for every token
    router_aux_loss_coef: float = Field(0.1, ge=0)  # weight of the auxiliary loss in each loss

    @model_validator(mode="after")
    def _fits(self) -> "ModelShape":
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
        if self.num_experts and not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"num_experts_per_token {self.num_experts_per_token} must be from 1 to "
                f"num_experts {self.num_experts}"
            )
        return self

    @field_validator("num_experts_per_token", "num_shared_experts", "router_aux_loss_coef")
    @classmethod
    def _unread_without_experts(cls, value: float, info: ValidationInfo) -> float:
        """Dense models of equal shape have equal configurations, whatever else is written."""
        return value if info.data.get("num_experts") else type(value)(0)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def interleaved_rotary(self) -> bool:
        """Which values a rotation pairs: as the Hugging Face model of the same weights does."""
        return self.num_experts > 0

    @property
    def intermediate_size(self) -> int:
        """Width F of a feed-forward network or expert: 8/3 of D, up to a multiple of 64."""
        return 64 * math.ceil(int(8 * self.hidden_size / 3) / 64)


class ModelConfig(ModelShape):
    """A whole model's shape: the vocabulary's size is the tokenizer's."""

    vocab_size: int = Field(gt=0, le=2**24)


class PackedTokens(NamedTuple):
    """N samples laid end to end, without padding."""

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], from 0 in each sample
    boundaries: Tensor  # int32 [N+1], cumulative starts
    longest: int  # tokens of the longest sample


class Output(NamedTuple):
    """What the model says of the positions asked for."""

    raw_logits: Tensor  # [M, V], in the type of the computation
    # With experts only, both summed over the samples, whatever positions were asked for:
    aux_loss: Tensor | None = None  # float32 scalar, the auxiliary loss of all layers, weighted
    expert_load: Tensor | None = None  # float32 [layers, experts], shares of a sample's choices

    @property
    def logits(self) -> Tensor:
        """In float32, for all that is not a matter of rows alone."""
        return self.raw_logits.float()


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864, eq. 34).

    Values i and i + E/2 are a pair, as in Llama, or 2i and 2i + 1 if interleaved, as in Ernie.
    x: [.., heads, E]; cos, sin: [.., 1, E], already gathered at the tokens' positions.
    """
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; who sees whom is `attend`'s business."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size = layer, config.head_size
        self.interleaved, self.max_positions = config.interleaved_rotary, config.max_positions
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
        query = rotate(query, cos, sin, self.interleaved)
        key = rotate(key, cos, sin, self.interleaved)
        out = attend(self.layer, query, key, value)
        return self.o_proj(out.flatten(-2))


class Layer(nn.Module):
    """Pre-norm residual block: attention, then feed-forward or experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        sizes = config.hidden_size, config.intermediate_size
        experts = config.num_experts, config.num_experts_per_token, config.num_shared_experts
        self.mlp = MixtureOfExperts(*sizes, *experts) if config.num_experts else FeedForward(*sizes)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, FeedForward):
            return x + self.mlp(normed), None
        out, routing = self.mlp(normed)
        return x + out, routing


class Decoder(nn.Module):
    """Embedding, layers and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.interleaved, self.max_positions = config.interleaved_rotary, config.max_positions
        self.recompute_layers = False  # gradient checkpointing: less memory, a third more work
        exponents = torch.arange(0, config.head_size, 2).float() / config.head_size
        self.register_buffer("frequencies", config.rope_theta**-exponents, persistent=False)
        self.frequencies: Tensor

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [.., D] of tokens [..] at positions [..]."""
        return self.hidden_and_routings(ids, positions, attend)[0]

    def hidden_and_routings(
        self, ids: Tensor, positions: Tensor, attend: Attend
    ) -> tuple[Tensor, list[Routing]]:
        """Hidden states, and how each layer routed the tokens: [] without experts."""
        x = self.embed_tokens(ids)
        angles = positions[..., None, None].float() * self.frequencies
        if self.interleaved:
            angles = angles.repeat_interleave(2, dim=-1)
        else:
            angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        routings = []
        for layer in self.layers:
            if self.recompute_layers and self.training:
                x, routing = recompute_in_backward(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x, routing = layer(x, cos, sin, attend)
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings


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
        return self._filled_hidden_and_routings(tokens)[0][: len(tokens.ids)]

    def _filled_hidden_and_routings(self, tokens: PackedTokens) -> tuple[Tensor, list[Routing]]:
        filled = _filled(tokens)
        attend = partial(_attend_packed, boundaries=filled.boundaries, longest=filled.longest)
        return self.model.hidden_and_routings(filled.ids, filled.positions, attend)

    def forward(self, tokens: PackedTokens, predict_at: Tensor) -> Output:
        """Logits of the tokens that follow the positions `predict_at` (int64 [M], into T).

        The head runs at these positions alone: nothing is computed that no loss looks at.
        """
        hidden, routings = self._filled_hidden_and_routings(tokens)
        filled_predict_at = F.pad(predict_at, (0, _missing(len(predict_at))))
        filled_logits = F.linear(hidden[filled_predict_at], self.model.embed_tokens.weight)
        logits = filled_logits[: len(predict_at)].clone()  # fully_shard wants no views
        if not routings:
            return Output(logits)
        routings = [Routing(*(each[: len(tokens.ids)] for each in r)) for r in routings]
        aux_loss, load = aux_loss_and_load(routings, tokens.boundaries)
        return Output(logits, self.config.router_aux_loss_coef * aux_loss, load)


def _filled(tokens: PackedTokens) -> PackedTokens:
    """The same samples, and behind them one of zeros up to a multiple of FILL tokens.

    Libraries prepare a matmul anew for each size that they have not met lately
    (docs/decisions/0008-products-come-in-few-sizes.md).
    """
    num_tokens = len(tokens.ids)
    missing = _missing(num_tokens)
    if not missing:
        return tokens
    return PackedTokens(
        ids=F.pad(tokens.ids, (0, missing)),
        positions=F.pad(tokens.positions, (0, missing)),
        boundaries=F.pad(tokens.boundaries, (0, 1), value=num_tokens + missing),
        longest=max(tokens.longest, missing),
    )


def _missing(number: int) -> int:
    """How many more make a multiple of FILL. Compiled code is for all sizes and needs none."""
    return 0 if torch.compiler.is_compiling() else -number % FILL


def _attend_packed(
    layer: int, query: Tensor, key: Tensor, value: Tensor, *, boundaries: Tensor, longest: int
) -> Tensor:
    return packed_attention(query, key, value, boundaries, longest)
