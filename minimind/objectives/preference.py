"""What preference losses have in common: log-probabilities of the two answers of a pair.

Rows alternate: chosen, rejected.
"""

from typing import Literal

from torch import Tensor, nn

from minimind.datasets.batches import PackedBatch
from minimind.model.transformer import Output
from minimind.objectives.loss import Term, token_logprobs

Reduction = Literal["sum", "mean"]


def row_logprobs(model: nn.Module, batch: PackedBatch, reduction: Reduction) -> Tensor:
    """Log-probability of each row's trained tokens, summed or averaged over them: float32 [N]."""
    return reduced(*row_sums(model(batch.tokens, batch.predict_at), batch), reduction)


def row_sums(output: Output, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Of each row's trained tokens, the sum of log-probabilities and their number: [N], [N]."""
    logprobs = token_logprobs(output.raw_logits, batch.targets)
    sums = logprobs.new_zeros(batch.counts.rows).index_add(0, batch.row_of_target, logprobs)
    return sums, batch.row_of_target.bincount(minlength=batch.counts.rows)


def reduced(sums: Tensor, lengths: Tensor, reduction: Reduction) -> Tensor:
    return sums if reduction == "sum" else sums / lengths


def pair_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Term]:
    """Of the rewards that a loss sees in the two answers [N / 2]: which is higher, by how much."""
    margins = (chosen - rejected).detach()
    return {
        "accuracy": Term((margins > 0).float().sum(), "samples"),
        "margin": Term(margins.sum(), "samples"),
        "chosen_reward": Term(chosen.detach().sum(), "samples"),
        "rejected_reward": Term(rejected.detach().sum(), "samples"),
    }
