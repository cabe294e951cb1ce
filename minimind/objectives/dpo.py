"""Direct preference optimization (arXiv:2305.18290)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from minimind.datasets.batches import PackedBatch
from minimind.objectives.loss import Loss, Term, with_aux_loss
from minimind.objectives.preference import Reduction, pair_metrics, reduced, row_sums


@dataclass(frozen=True)
class Dpo:
    """−log σ(β · [(log π(c) − log π(r)) − (log π_ref(c) − log π_ref(r))]), eq. 7, mean over pairs.

    Rows alternate: chosen, rejected. `batch.extras["reference"]` holds log π_ref of each row,
    float32 [N], computed beforehand in the policy's precision; so training holds one model.

    DPO alone may let both answers grow less likely. `nll_weight` (arXiv:2404.19733, eq. 2; alpha
    there) adds −log π(c) / |c|, which keeps the chosen one.
    """

    beta: float
    reduction: Reduction
    nll_weight: float

    def __call__(self, model: nn.Module, batch: PackedBatch, progress: float) -> Loss:
        output = model(batch.tokens, batch.predict_at)
        sums, lengths = row_sums(output, batch)
        logprobs = reduced(sums, lengths, self.reduction)
        rewards = self.beta * (logprobs - batch.extras["reference"])
        chosen, rejected = rewards[0::2], rewards[1::2]
        terms = {"dpo": Term(-F.logsigmoid(chosen - rejected).sum(), "samples")}
        if self.nll_weight > 0:
            nll = -(sums / lengths)[0::2].sum()
            terms["nll"] = Term(self.nll_weight * nll, "samples")
        return with_aux_loss(Loss(terms, pair_metrics(chosen, rejected)), output)
