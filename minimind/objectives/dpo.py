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
    return _reduced(*_row_sums(model(batch.tokens, batch.predict_at), batch), reduction)


def _row_sums(output: Output, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Of each row's trained tokens, the sum of log-probabilities and their number: [N], [N]."""
    logprobs = token_logprobs(output.scores, batch.targets)
    sums = logprobs.new_zeros(batch.counts.rows).index_add(0, batch.row_of_target, logprobs)
    return sums, batch.row_of_target.bincount(minlength=batch.counts.rows)


def _reduced(sums: Tensor, lengths: Tensor, reduction: Reduction) -> Tensor:
    return sums if reduction == "sum" else sums / lengths


@dataclass(frozen=True)
class Dpo:
    """−log σ(β · [(log π(c) − log π(r)) − (log π_ref(c) − log π_ref(r))]), eq. 7, mean over pairs.

    Rows alternate: chosen, rejected. `batch.extras["reference"]` holds log π_ref of each row,
    float32 [N], computed beforehand in the policy's precision; so training holds one model.

    DPO compares; it is content with a chosen answer that grows less likely, as long as the
    rejected one does so faster. With `nll_weight` above 0 the loss also has a term of its own for
    the chosen answer, −log π(c) / |c| (arXiv:2404.19733, eq. 2; alpha there), which keeps it.
    """

    beta: float
    reduction: Reduction
    nll_weight: float

    def __call__(self, model: nn.Module, batch: PackedBatch, progress: float) -> Loss:
        output = model(batch.tokens, batch.predict_at)
        sums, lengths = _row_sums(output, batch)
        logprobs = _reduced(sums, lengths, self.reduction)
        rewards = self.beta * (logprobs - batch.extras["reference"])
        chosen, rejected = rewards[0::2], rewards[1::2]
        margins = chosen - rejected
        terms = {"dpo": Term(-F.logsigmoid(margins).sum(), "samples")}
        if self.nll_weight > 0:
            nll = -(sums / lengths)[0::2].sum()
            terms["nll"] = Term(self.nll_weight * nll, "samples")
        loss = Loss(
            terms=terms,
            metrics={
                "accuracy": Term((margins.detach() > 0).float().sum(), "samples"),
                "margin": Term(margins.detach().sum(), "samples"),
                "chosen_reward": Term(chosen.detach().sum(), "samples"),
                "rejected_reward": Term(rejected.detach().sum(), "samples"),
            },
        )
        return with_balance(loss, output)
