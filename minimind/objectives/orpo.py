"""Odds ratio preference optimization (arXiv:2403.07691)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.datasets.batches import PackedBatch
from minimind.objectives.loss import Loss, Term, with_aux_loss
from minimind.objectives.preference import pair_metrics, row_sums


@dataclass(frozen=True)
class Orpo:
    """−log P(c) − λ · log σ(log odds(c) − log odds(r)), eq. 6 and 7, mean over pairs.

    P is the geometric mean of an answer's token probabilities, odds = P / (1 − P). There is no
    reference: the first term keeps the chosen answers likely. λ is `beta`.
    """

    beta: float

    def __call__(self, model: nn.Module, batch: PackedBatch, progress: float) -> Loss:
        output = model(batch.tokens, batch.predict_at)
        sums, lengths = row_sums(output, batch)
        logprobs = sums / lengths
        odds = log_odds(logprobs)
        chosen, rejected = odds[0::2], odds[1::2]
        terms = {
            "nll": Term(-logprobs[0::2].sum(), "samples"),
            "odds_ratio": Term(-self.beta * F.logsigmoid(chosen - rejected).sum(), "samples"),
        }
        return with_aux_loss(Loss(terms, pair_metrics(chosen, rejected)), output)


def log_odds(logprobs: Tensor) -> Tensor:
    """log(P / (1 − P)) of log P below 0, exact near both ends: float32 [N] -> [N]."""
    at_most = torch.finfo(logprobs.dtype).eps
    return logprobs - torch.log(-torch.expm1(logprobs.clamp(max=-at_most)))
