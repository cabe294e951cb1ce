"""Rollouts: completions sampled from the policy, and their log-probabilities under a model.

Shapes: B completions (rows), M tokens of all completions.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minimind.compute.precision import DType, autocast
from minimind.compute.processes import Processes
from minimind.datasets.batches import Counts, PackedBatch, Step, divide
from minimind.model.transformer import PackedTokens, Transformer
from minimind.objectives.loss import token_logprobs
from minimind.objectives.policy import k3
from minimind.rewards.reward import Values


class Rollout(NamedTuple):
    """Sampled completions, an entry a row; the rows of a prompt follow one another."""

    prompts: list[list[int]]  # ids
    completions: list[list[int]]  # ids, up to and including the end token if there is one
    finished: list[bool]  # whether there is one
    logprobs: list[list[float]]  # of the completions' tokens, at the sampling temperature

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions."""
        return sum(map(len, self.completions))


def pack_completions(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    extras: Mapping[str, Tensor],
    weight: float = 1.0,
) -> PackedBatch:
    """Prompts and their completions laid end to end; the completions' tokens are trained on.

    extras: values of rows [B, ..] or of completion tokens [M, ..].
    """
    prompt_lengths = np.array([len(prompt) for prompt in prompts])
    lengths = prompt_lengths + [len(completion) for completion in completions]
    boundaries = np.append(0, np.cumsum(lengths))
    ids = np.concatenate([[*p, *c] for p, c in zip(prompts, completions, strict=True)])
    row_of_token = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(ids)) - boundaries[row_of_token]
    trained = np.flatnonzero(positions >= prompt_lengths[row_of_token])
    assert prompt_lengths.min() > 0, "a row's first token cannot be predicted"
    return PackedBatch(
        tokens=PackedTokens(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            boundaries=torch.from_numpy(boundaries.astype(np.int32)),
            longest=int(lengths.max()),
        ),
        predict_at=torch.from_numpy(trained - 1),
        targets=torch.from_numpy(ids[trained]),
        is_tag=torch.zeros(len(trained), dtype=torch.bool),
        row_of_target=torch.from_numpy(row_of_token[trained]),
        counts=Counts(tokens=len(trained), rows=len(lengths), samples=len(lengths)),
        rows=np.arange(len(lengths)),
        extras=dict(extras),
        weight=weight,
    )


def completion_logprobs(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    temperature: float,
    dtype: DType,
    rows_at_a_time: int,
) -> list[Tensor]:
    """Log-probabilities of completions under `model`: a float32 tensor a row, on the CPU."""
    device = model.model.embed_tokens.weight.device
    scored: list[Tensor] = []
    for start in range(0, len(prompts), rows_at_a_time):
        span = slice(start, start + rows_at_a_time)
        batch = pack_completions(prompts[span], completions[span], {}).to(device)
        with torch.no_grad(), autocast(device, dtype):
            logits = model(batch.tokens, batch.predict_at).raw_logits
        logprobs = token_logprobs(logits, batch.targets, temperature).cpu()
        scored += logprobs.split([len(completion) for completion in completions[span]])
    return scored


def pack_step(
    rollout: Rollout,
    advantages: Values,
    reference_logprobs: list[Tensor],
    beta: float,
    has_experts: bool,
    rows_at_a_time: int,
    processes: Processes,
) -> Step:
    """A process's micro-batches of a step, with all that the loss compares the policy with.

    beta, has_experts: of the loss and the policy; with either, rows without advantage count too.
    """
    rows = np.arange(len(rollout.completions))
    if not beta and not has_experts and advantages.any():
        rows = np.flatnonzero(advantages)  # the others have no gradient, and need not be computed
    micro_batches = []
    for part, weight in divide(rows, rows_at_a_time, processes.rank, processes.world):
        extras = {
            "sampled": torch.tensor([value for row in part for value in rollout.logprobs[row]]),
            "reference": torch.cat([reference_logprobs[row] for row in part]),
            "advantages": torch.from_numpy(advantages[part].astype(np.float32)),
        }
        # Rounding in 16 bits makes decoding choose other experts than training does, so there the
        # first update's own log-probabilities are the old ones.
        if not has_experts:
            extras["old"] = extras["sampled"]
        micro_batches.append(
            pack_completions(
                [rollout.prompts[row] for row in part],
                [rollout.completions[row] for row in part],
                extras,
                weight,
            )
        )
    num_rows = len(rollout.completions)
    return Step(micro_batches, Counts(rollout.num_tokens, num_rows, num_rows))


def sampling_difference(
    step: Step, logprobs: Sequence[Tensor], processes: Processes
) -> dict[str, float]:
    """How far log-probabilities are off those recorded in decoding, by the same weights.

    Absolute, mean and largest over the step's tokens, named as in TRL. Rounding alone makes them.

    logprobs: of each micro-batch's targets, [M] on the CPU, in the first update of a rollout.
    """
    own = [
        (now - batch.extras["sampled"]).abs()
        for batch, now in zip(step.micro_batches, logprobs, strict=True)
        if batch.weight
    ]
    differences = torch.cat([part for parts in processes.gather(own) for part in parts])
    return {
        "sampling_logp_difference_mean": float(differences.mean()),
        "sampling_logp_difference_max": float(differences.max()),
    }


def statistics(
    parts: dict[str, Values], rollout: Rollout, reference_logprobs: list[Tensor]
) -> dict[str, float]:
    """What a rollout looks like, as means over its completions or tokens."""
    logprobs = torch.tensor([value for row in rollout.logprobs for value in row])
    return {
        **{f"reward_{name}": float(values.mean()) for name, values in parts.items()},
        "kl": float(k3(logprobs, torch.cat(reference_logprobs)).mean()),
        # The mean of -log p over drawn tokens estimates the entropy of drawing one.
        "entropy": -float(logprobs.mean()),
        "completion_length": rollout.num_tokens / len(rollout.completions),
        "unfinished": 1 - sum(rollout.finished) / len(rollout.finished),
    }
