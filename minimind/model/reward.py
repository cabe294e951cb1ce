"""The reward model: a transformer that scores a whole conversation."""

import torch
from torch import Tensor, nn

from minimind.model.transformer import ModelConfig, PackedTokens, Transformer


class RewardModel(nn.Module):
    """A language model's layers, and one score read at the last token of each sample."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer
        transformer.lm_head = None  # its place is the score's
        self.score = nn.Linear(transformer.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)  # all conversations alike: the loss starts at ln 2

    def forward(self, tokens: PackedTokens) -> Tensor:
        """Score of each packed sample: float32 [N]."""
        last = tokens.boundaries[1:].long() - 1
        hidden = self.transformer.hidden(tokens)[last]
        # In float32 whatever the rest is computed in: near 4, bfloat16 has steps of 0.03, and
        # conversations that differ in a digit would tie.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.float())[:, 0]


def dense_part(mixture: Transformer, seed: int) -> Transformer:
    """A dense model that starts as what a mixture of experts computes for every token.

    Stock transformers has no classifier of every mixture, but of dense models. Attention, norms
    and embedding come along, and the shared expert where there is one; without it, or with a wider
    one, feed-forward networks start anew from `seed`.
    """
    config = ModelConfig(**(mixture.config.model_dump() | {"num_experts": 0}))
    dense = Transformer(config)
    dense.initialize(seed)
    wanted = dense.state_dict()
    weights = {}
    for name, weight in mixture.state_dict().items():
        if mixture.config.interleaved_rotary and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _halves_paired(weight, config.head_size)
        name = name.replace("mlp.shared_experts.", "mlp.")
        if name in wanted and weight.shape == wanted[name].shape:
            weights[name] = weight
    dense.load_state_dict(wanted | weights)
    return dense


def _halves_paired(projection: Tensor, head_size: int) -> Tensor:
    """Rows in the order of a dense model, whose rotation pairs i with i + E/2, not 2i with 2i + 1.

    Queries and keys in the same other order have the same products. [heads * E, D], both.
    """
    pairs = projection.unflatten(0, (-1, head_size // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)
