"""White-box distillation: learn a teacher's whole distribution, not only the tokens of the data.

Shapes: M trained tokens, V vocabulary, K the teacher's likeliest tokens. Of a distribution we
keep K + 1 buckets: those tokens, each on its own, and all the others together. With K = V there
are no others, and the buckets are the distribution.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.datasets.batches import PackedBatch
from minimind.objectives.chunked import chunked
from minimind.objectives.loss import Loss, Term, token_logprobs, with_aux_loss

# Extras of a batch, one row a trained token.
TEACHER_IDS = "teacher_ids"  # [M, K], the teacher's likeliest tokens
TEACHER_LOGPROBS = "teacher_logprobs"  # [M, K + 1], or [M, V] when K = V


def bucket_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of tokens `ids` [M, K] and of all others together: float32 [M, K + 1].

    The softmax is that of logits [M, V] / temperature. With K = V the result is [M, V].
    """
    buckets = logits.gather(1, ids) / temperature
    if ids.shape[1] < logits.shape[1]:
        # log(1 - sum of the K) would be lost to rounding where the K hold nearly everything.
        others = logits.scatter(1, ids, -math.inf).div_(temperature)
        buckets = torch.cat((buckets, others.logsumexp(1, keepdim=True)), dim=1)
    return buckets.log_softmax(1)


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) of log-probabilities [M, B] over the same buckets: [M].

    A lower bound of that over the whole vocabulary (the log-sum inequality).
    """
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


@dataclass(frozen=True)
class Distill:
    """alpha · CE + (1 - alpha) · T² · KL(teacher ‖ student), mean per trained token.

    Both distributions of the divergence are taken at the temperature T (arXiv:1503.02531, sec. 2);
    T² keeps its gradient's size. `teacher` runs beside the student, over the whole vocabulary;
    without it, `batch.extras` hold the teacher's buckets. With alpha = 1 this is fine-tuning
    without a teacher: it is not looked at in training, only measured against in validation.
    """

    alpha: float
    temperature: float
    teacher: nn.Module | None

    def __call__(self, model: nn.Module, batch: PackedBatch, progress: float) -> Loss:
        output = model(batch.tokens, batch.predict_at)
        if self.alpha == 1 and model.training:
            cross_entropy = -token_logprobs(output.raw_logits, batch.targets).sum()
            loss, metrics = cross_entropy, {}
        else:
            cross_entropies, divergences = chunked(
                self._cross_entropies_and_divergences,
                output.raw_logits,
                batch.targets,
                *self._teacher(batch),
            )
            cross_entropy, divergence = cross_entropies.sum(), divergences.sum()
            weight = (1 - self.alpha) * self.temperature**2
            loss = self.alpha * cross_entropy + weight * divergence
            metrics = {"kl": Term(divergence.detach(), "tokens")}
        metrics = {"ce": Term(cross_entropy.detach(), "tokens"), **metrics}
        # The auxiliary loss of experts is added unscaled: it is not part of what alpha weighs.
        return with_aux_loss(Loss({"distill": Term(loss, "tokens")}, metrics), output)

    def _teacher(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """The teacher's logits [M, V], or ids [M, K] and log-probabilities of its buckets."""
        if self.teacher is None:
            return batch.extras[TEACHER_IDS], batch.extras[TEACHER_LOGPROBS]
        with torch.no_grad():
            logits: Tensor = self.teacher(batch.tokens, batch.predict_at).raw_logits
        return (logits,)

    def _cross_entropies_and_divergences(
        self, logits: Tensor, targets: Tensor, *teacher: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of each trained token: [M], [M]."""
        logits = logits.float()
        cross_entropies = F.cross_entropy(logits, targets, reduction="none")
        if self.teacher is None:
            ids, logprobs = teacher
            # Stored in 16 bits; normalised again, so that no rounding looks like divergence.
            expected = logprobs.float().log_softmax(1)
            student = bucket_logprobs(logits, ids.long(), self.temperature)
        else:
            expected = (teacher[0].float() / self.temperature).log_softmax(1)
            student = (logits / self.temperature).log_softmax(1)
        return cross_entropies, kl_divergence(expected, student)
