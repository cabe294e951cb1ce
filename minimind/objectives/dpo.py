"""Direct preference optimization (arXiv:2305.18290)."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from minimind.datasets.batches import PackedBatch
from minimind.model.transformer import Output
from minimind.objectives.loss import Loss, Term, token_logprobs, with_balance

Reduction = Literal["sum", "mean"]


def row_logprobs(model: nn.Module, batch: PackedBatch, reduction: Reduction) -> Tensor:
    """Log-probability of each row's trained tokens, summed or averaged over them: float32 [N]."""
    return _row_logprobs(model(batch.tokens, batch.predict_at), batch, reduction)


def _row_logprobs(output: Output, batch: PackedBatch, reduction: Reduction) -> Tensor:
    logprobs = token_logprobs(output.logits, batch.targets)
    sums = logprobs.new_zeros(batch.counts.rows).index_add(0, batch.row_of_target, logprobs)
    if reduction == "sum":
        return sums
    return sums / batch.row_of_target.bincount(minlength=batch.counts.rows)


@dataclass(frozen=True)
class Dpo:
    """−log σ(β · [(log π(c) − log π(r)) − (log π_ref(c) − log π_ref(r))]), eq. 7, mean over pairs.

    Rows alternate: chosen, rejected. `batch.extras["reference"]` holds log π_ref of each row,
    float32 [N], computed beforehand in the policy's precision; so training holds one model.
    """

    beta: float
    reduction: Reduction

    def __call__(self, model: nn.Module, batch: PackedBatch, progress: float) -> Loss:
        output = model(batch.tokens, batch.predict_at)
        logprobs = _row_logprobs(output, batch, self.reduction)
        rewards = self.beta * (logprobs - batch.extras["reference"])
        chosen, rejected = rewards[0::2], rewards[1::2]
        margins = chosen - rejected
        loss = Loss(
            terms={"dpo": Term(-F.logsigmoid(margins).sum(), "samples")},
            metrics={
                "accuracy": Term((margins.detach() > 0).float().sum(), "samples"),
                "margin": Term(margins.detach().sum(), "samples"),
                "chosen_reward": Term(chosen.detach().sum(), "samples"),
                "rejected_reward": Term(rejected.detach().sum(), "samples"),
            },
        )
        return with_balance(loss, output)
