"""The reward model: a transformer that scores a whole conversation."""

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
        return self.score(self.transformer.hidden(tokens)[last])[:, 0].float()
