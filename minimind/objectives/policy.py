"""Policy gradient on sampled completions: GRPO's clipped surrogate and two relatives of it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minimind.datasets.batches import PackedBatch
from minimind.objectives.loss import Loss, Term, token_logprobs, with_aux_loss

LossType = Literal["grpo", "dr_grpo", "cispo"]


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) at each token: exp(d) - d - 1, d = log π_ref - log π.

    Unbiased for tokens drawn from the policy, and never negative (arXiv:2402.03300, eq. 4).
    """
    d = reference - logprobs
    return torch.expm1(d) - d


@dataclass(frozen=True)
class PolicyGradient:
    """Σ over tokens of surrogate + beta · KL; what the sum is divided by is the loss type's.

    - ``grpo`` (arXiv:2402.03300, eq. 3): −min(ratio · A, clip(ratio, 1 − ε, 1 + ε) · A), mean
      over each row's tokens, then over rows
    - ``dr_grpo`` (arXiv:2503.20783): the same sum, divided by `max_new_tokens` for every row, so
      that a long wrong completion is not let off lightly
    - ``cispo`` (arXiv:2506.13585, eq. 4): −min(ratio, 1 + ε) · A · log π with the weight held
      constant, so that every token keeps a gradient; mean over all tokens

    `batch.extras` hold log-probabilities ``old`` [M] of before the rollout's first update,
    ``reference`` [M] unless beta is 0, and ``advantages`` [N] of rows. All log-probabilities are
    at the sampling `temperature`. Without ``old`` the update is the first: the ratio is 1.
    """

    loss_type: LossType
    epsilon: float
    beta: float
    temperature: float
    max_new_tokens: int

    def __call__(self, model: nn.Module, batch: PackedBatch, progress: float) -> Loss:
        output = model(batch.tokens, batch.predict_at)
        logprobs = token_logprobs(output.raw_logits, batch.targets, self.temperature)
        advantages = batch.extras["advantages"][batch.row_of_target]
        ratio = torch.exp(logprobs - batch.extras.get("old", logprobs.detach()))
        losses, clipped = self._surrogate(logprobs, ratio, advantages)
        metrics = {"clip_share": Term(clipped.float().sum(), "tokens")}
        if self.beta:
            losses = losses + self.beta * k3(logprobs, batch.extras["reference"])
        terms = {"policy": self._reduce(losses, batch)}
        return with_aux_loss(Loss(terms, metrics, logprobs.detach()), output)

    def _surrogate(
        self, logprobs: Tensor, ratio: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of each token [M], and whether clipping changed it."""
        if self.loss_type == "cispo":
            weight = ratio.detach().clamp(max=1 + self.epsilon)
            return -weight * advantages * logprobs, ratio.detach() > 1 + self.epsilon
        plain = ratio * advantages
        bounded = ratio.clamp(1 - self.epsilon, 1 + self.epsilon) * advantages
        return -torch.minimum(plain, bounded), bounded.detach() < plain.detach()

    def _reduce(self, losses: Tensor, batch: PackedBatch) -> Term:
        if self.loss_type == "cispo":
            return Term(losses.sum(), "tokens")
        if self.loss_type == "dr_grpo":
            return Term(losses.sum() / self.max_new_tokens, "rows")
        lengths = batch.row_of_target.bincount(minlength=batch.counts.rows)
        return Term((losses / lengths[batch.row_of_target]).sum(), "rows")
