"""The reward model: a transformer that scores a whole conversation."""

import torch
from torch import Tensor, nn

from minimind.model.transformer import PackedTokens, Transformer


class RewardModel(nn.Module):
    """A language model's layers, and one score read at the last token of each sample."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer
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
