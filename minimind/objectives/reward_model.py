"""The Bradley-Terry loss of a reward model (arXiv:2203.02155, eq. 1)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from minimind.datasets.batches import PackedBatch
from minimind.objectives.loss import Loss


@dataclass(frozen=True)
class PairwiseReward:
    """−log σ(r_chosen − r_rejected), mean over pairs. Rows alternate: chosen, rejected."""

    def __call__(self, model: nn.Module, batch: PackedBatch, progress: float) -> Loss:
        rewards = model(batch.tokens)
        margins = rewards[0::2] - rewards[1::2]
        losses = -F.logsigmoid(margins)
        return Loss.mean(losses, "samples", "reward", accuracy=margins > 0, margin=margins)
