"""The feed-forward network of a layer: one for all tokens, or a mixture of experts.

Shapes: T tokens of all samples laid end to end, N samples, D hidden size, F feed-forward width,
E experts, k experts a token, L layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """SwiGLU feed-forward (arXiv:2002.05202, eq. 6)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Routing(NamedTuple):
    """What a layer's router decided."""

    probabilities: Tensor  # float32 [T, E]
    chosen: Tensor  # int64 [T, k], the most probable experts


class MixtureOfExperts(nn.Module):
    """A few experts a token, chosen by a router, beside shared ones that see every token.

    Router: softmax over all experts, the k largest, their weights divided by their sum, which is
    the softmax over the chosen (arXiv:2401.04088, section 2.1). The shared expert has no gate
    (arXiv:2401.06066, eq. 9). Module names are those of Hugging Face's Ernie 4.5 MoE, and without
    shared experts of its Qwen3 MoE. With one expert a token its weight is 1: then the router
    learns from the auxiliary loss alone.
    """

    def __init__(
        self, hidden_size: int, width: int, num_experts: int, per_token: int, num_shared: int
    ) -> None:
        super().__init__()
        self.num_experts_per_token = per_token
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(hidden_size, width) for _ in range(num_experts))
        # Shared experts that see the same tokens are one, as wide as all of them together.
        self.shared_experts = FeedForward(hidden_size, num_shared * width) if num_shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Output [.., D] of tokens [.., D], and how they were routed."""
        tokens = x.flatten(0, -2)
        routing = self.route(tokens)
        out = self.mix(tokens, routing).view(x.shape)
        return out if self.shared_experts is None else out + self.shared_experts(x), routing

    def route(self, tokens: Tensor) -> Routing:
        """Choose experts, in float32 always: in 16 bits, rounding would choose others."""
        with torch.autocast(tokens.device.type, enabled=False):
            probabilities = self.gate(tokens.float()).softmax(-1)
        return Routing(probabilities, probabilities.topk(self.num_experts_per_token).indices)

    # Every batch gives the experts other numbers of tokens; a compiled graph would wait for them.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def mix(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of the chosen experts' outputs: [T, D] -> float32 [T, D].

        Each expert multiplies its own tokens alone, which sorting puts side by side. Copies are
        moved by permutations, so that no gradient is a sum whose order depends on threads.
        """
        weights = routing.probabilities.gather(-1, routing.chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        order = routing.chosen.flatten().argsort(stable=True)
        sizes = routing.chosen.flatten().bincount(minlength=len(self.experts))
        copies = tokens.repeat_interleave(self.num_experts_per_token, dim=0)[order]
        # An expert without tokens runs too: its gradients are then zero instead of missing.
        own = copies.split(sizes.tolist())
        outputs = torch.cat([run(x) for run, x in zip(self.experts, own, strict=True)])
        outputs = outputs[order.argsort()].unflatten(0, routing.chosen.shape)
        return (outputs * weights.unsqueeze(-1)).sum(-2)


def aux_loss_and_load(routings: Sequence[Routing], boundaries: Tensor) -> tuple[Tensor, Tensor]:
    """The auxiliary loss and the experts' load, both summed over samples.

    The loss of a sample of S tokens in a layer is Σ_e [count_e / (S·k/E)] · mean_s p_e, with
    count_e the tokens that chose expert e (arXiv:2412.19437, eq. 17-20): 1 where choices or
    probabilities are spread evenly, more where probable experts are crowded.

    routings: of each layer; boundaries: int32 [N+1], the samples' cumulative starts.
    Returns the loss summed over samples and layers, float32 scalar, and each expert's share of
    its layer's choices, summed over samples, float32 [L, E].
    """
    probabilities = torch.stack([routing.probabilities for routing in routings], 1)  # [T, L, E]
    chosen = torch.stack([routing.chosen for routing in routings], 1)  # [T, L, k]
    num_tokens, num_layers, num_experts = probabilities.shape
    choices = F.one_hot(chosen, num_experts).sum(-2).float() / chosen.shape[-1]  # [T, L, E]

    lengths = boundaries.diff()
    samples = torch.arange(len(lengths), device=lengths.device)
    sample_of_token = samples.repeat_interleave(lengths, output_size=num_tokens)
    zeros = probabilities.new_zeros(len(lengths), num_layers, num_experts)
    per_sample = lengths.clamp(min=1)[:, None, None]  # a sample without tokens adds nothing
    mean_probabilities = zeros.index_add(0, sample_of_token, probabilities) / per_sample
    shares = zeros.index_add(0, sample_of_token, choices) / per_sample
    return num_experts * (shares * mean_probabilities).sum(), shares.sum(0)
