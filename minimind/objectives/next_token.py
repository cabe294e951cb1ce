"""Next-token prediction: pretraining, fine-tuning and, with weighted tags, reasoning."""

from dataclasses import dataclass

import torch
from torch import nn

from minimind.datasets.batches import PackedBatch
from minimind.objectives.loss import Loss, token_logprobs, with_aux_loss


@dataclass(frozen=True)
class NextToken:
    """Σ w_t · (−log p(y_t)) / Σ m_t over trained tokens.

    The mask m_t is 1 on trained tokens; the weight w_t equals it but on the tokens of think and
    answer tags, where it goes linearly from `tag_weight` to `final_tag_weight`. The denominator
    is the mask, not the weights, as in MiniMind's reasoning distillation.
    """

    tag_weight: float = 1.0
    final_tag_weight: float = 1.0

    def __call__(self, model: nn.Module, batch: PackedBatch, progress: float) -> Loss:
        output = model(batch.tokens, batch.predict_at)
        losses = -token_logprobs(output.raw_logits, batch.targets)
        tag_weight = self.tag_weight + progress * (self.final_tag_weight - self.tag_weight)
        weights = torch.where(batch.is_tag, tag_weight, 1.0)
        return with_aux_loss(
            Loss.mean(losses * weights, "tokens", "next_token", nll=losses), output
        )
