"""The language model: a decoder-only transformer, read from top to bottom.

Module and parameter names are those of the Hugging Face model that computes the same, which
`ModelShape.model_type` names, so that a state dict is a checkpoint without any conversion. Shapes:
T tokens of all samples laid end to end, D hidden size, H query heads, K key/value heads, E head
size, F feed-forward width, V vocabulary, M positions whose next token is scored.
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


class Yarn(Section):
    """Rotary positions beyond those that a model was trained on (YaRN, arXiv:2309.00071).

    The other defaults are MiniMind's, whose factor is 16.
    """

    factor: float = Field(1.0, ge=1)  # 1: positions as they are
    original_max_positions: int = Field(2048, gt=0)  # that the model was trained on
    beta_fast: float = Field(32.0, gt=0)  # pairs that turn so often within them stay as they are
    beta_slow: float = Field(1.0, gt=0)  # pairs that turn so rarely are slowed by the factor
    attention_factor: float = Field(1.0, gt=0)  # of queries and keys


class ModelShape(Section):
    """The `model` section: chosen once, in pretraining, and carried inside the checkpoint."""

    hidden_size: int = Field(gt=0, le=2**16)
    num_layers: int = Field(gt=0, le=2**10)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_size: int = Field(0, ge=0, le=2**16, validate_default=True)  # 0: hidden_size / num_heads
    # Width F of a feed-forward network or expert; 0: 8/3 of D, up to a multiple of 64.
    intermediate_size: int = Field(0, ge=0, le=2**20, validate_default=True)
    max_positions: int = Field(1024, gt=0)
    rope_theta: float = Field(1e6, gt=0)
    yarn: Yarn = Yarn()
    norm_eps: float = Field(1e-5, gt=0)
    qk_norm: bool = False  # queries and keys are normalized head by head, as in Qwen3
    qkv_bias: bool = False  # as in Qwen2
    tie_embeddings: bool = True  # the head has the embedding's weights
    num_experts: int = Field(0, ge=0)  # 0: one feed-forward network for all tokens of a layer
    # The following are read only where there are experts, and are 0 elsewhere.
    num_experts_per_token: int = Field(2, ge=0, validate_default=True)
    # Beside those that are chosen, for every token.
    num_shared_experts: int = Field(1, ge=0, validate_default=True)
    # Weight of the auxiliary loss in each loss.
    router_aux_loss_coef: float = Field(0.1, ge=0, validate_default=True)

    @model_validator(mode="after")
    def _fits(self) -> "ModelShape":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}"
            )
        if self.head_size % 2:
            raise ValueError(
                f"head_size, or hidden_size / num_heads, is {self.head_size}; it must be even"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.num_experts and not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"num_experts_per_token {self.num_experts_per_token} must be from 1 to "
                f"num_experts {self.num_experts}"
            )
        if self.qk_norm and (self.qkv_bias or self.num_shared_experts):
            raise ValueError("with qk_norm, qkv_bias must be false and num_shared_experts 0")
        if self.qkv_bias and self.num_experts:
            raise ValueError("with qkv_bias, num_experts must be 0")
        return self

    @field_validator("head_size", "intermediate_size")
    @classmethod
    def _of_the_other_sizes(cls, value: int, info: ValidationInfo) -> int:
        if value or not {"hidden_size", "num_heads"} <= info.data.keys():
            return value
        hidden_size = info.data["hidden_size"]
        if info.field_name == "head_size":
            return int(hidden_size // info.data["num_heads"])
        return 64 * math.ceil(int(8 * hidden_size / 3) / 64)

    @field_validator("num_experts_per_token", "num_shared_experts", "router_aux_loss_coef")
    @classmethod
    def _unread_without_experts(cls, value: float, info: ValidationInfo) -> float:
        """Dense models of equal shape have equal configurations, whatever else is written."""
        return value if info.data.get("num_experts") else type(value)(0)

    @property
    def model_type(self) -> str:
        """The Hugging Face model that computes the same: its name in config.json."""
        if self.qk_norm:
            return "qwen3_moe" if self.num_experts else "qwen3"
        return "ernie4_5_moe" if self.num_experts else "qwen2" if self.qkv_bias else "llama"

    @property
    def interleaved_rotary(self) -> bool:
        """Which values a rotation pairs: as the Hugging Face model of the same weights does."""
        return self.model_type == "ernie4_5_moe"


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


def rotary_frequencies(config: ModelShape) -> Tensor:
    """How far a position turns each pair of a head's values: float32 [E/2], in radians.

    With YaRN those that turn slowly are slowed down (section 3.2, "NTK-by-parts").
    """
    size, yarn = config.head_size, config.yarn
    exponents = torch.arange(0, size, 2).float() / size
    frequencies = config.rope_theta**-exponents
    if yarn.factor == 1:
        return frequencies

    def pair(turns: float) -> float:
        """Which pair turns so often within the original positions."""
        wavelength = yarn.original_max_positions / (turns * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair(yarn.beta_fast)), 0)
    high = min(math.ceil(pair(yarn.beta_slow)), size - 1)
    slowed = ((torch.arange(size // 2) - low) / ((high - low) or 0.001)).clamp(0, 1)
    return frequencies * (1 - slowed + slowed / yarn.factor)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; who sees whom is `attend`'s business."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size = layer, config.head_size
        self.interleaved, self.max_positions = config.interleaved_rotary, config.max_positions
        query_size = config.num_heads * config.head_size
        kv_size = config.num_kv_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        norm: Callable[[], nn.Module] = nn.Identity
        if config.qk_norm:
            norm = partial(RMSNorm, config.head_size, config.norm_eps)
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        query = self.q_proj(x).unflatten(-1, (-1, self.head_size))
        key = self.k_proj(x).unflatten(-1, (-1, self.head_size))
        value = self.v_proj(x).unflatten(-1, (-1, self.head_size))
        query = rotate(self.q_norm(query), cos, sin, self.interleaved)
        key = rotate(self.k_norm(key), cos, sin, self.interleaved)
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
        self.attention_factor = config.yarn.attention_factor if config.yarn.factor > 1 else 1.0
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)
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
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
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
    """Decoder, and a head that shares the embedding's weights or has its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        sizes = config.hidden_size, config.vocab_size
        self.lm_head = None if config.tie_embeddings else nn.Linear(*sizes, bias=False)

    def initialize(self, seed: int) -> None:
        """Normal weights of deviation 0.02, norms at one, biases at zero, everywhere the same."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.constant_(parameter, float(not name.endswith("bias")))

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def head(self) -> Tensor:
        """[V, D]; the product with a hidden state scores every vocabulary entry."""
        return (self.lm_head or self.model.embed_tokens).weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every vocabulary entry as the next token: [.., D] -> float32 [.., V]."""
        return F.linear(hidden, self.head).float()

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
        filled_logits = F.linear(hidden[filled_predict_at], self.head)
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
