"""What a policy acts in: prompts to answer, and rewards for the answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from minimind.chat.tokenizer import ChatTokenizer
from minimind.compute.processes import Processes
from minimind.model.transformer import Transformer
from minimind.reinforcement.advantages import Values
from minimind.reinforcement.draws import Indices
from minimind.reinforcement.rewards import Rewards, Sample, require_finite
from minimind.reinforcement.rollout import Rollout, SamplingConfig, sample
from minimind.tasks.problem import Problem

T = TypeVar("T")


@dataclass(frozen=True)
class Environment:
    """Prompts, the sampling of completions, and what these earn.

    Processes divide prompts among themselves; what each has made is then known to all.
    """

    problems: Sequence[Problem]
    prompts: Sequence[list[int]]  # the ids of each, with the header of the assistant's turn
    tokenizer: ChatTokenizer
    sampling: SamplingConfig
    rewards: Rewards
    processes: Processes = field(default_factory=Processes)

    def rollout(
        self, model: Transformer, indices: Indices, num_samples: int, first_key: int
    ) -> Rollout:
        """`num_samples` completions of each of these prompts; row i draws with `first_key + i`.

        Those keys are all there is to the noise: no state is carried from step to step, so there
        is none to lose, and the number of processes changes nothing.
        """
        own = self.processes.share(range(len(indices)))
        keys = [first_key + i * num_samples + k for i in own for k in range(num_samples)]
        ids = [self.prompts[indices[i]] for i in own]
        model.eval()
        rollout = sample(model, ids, num_samples, self.sampling, keys)
        model.train()
        rows = self._of_all_prompts(list(zip(*rollout, strict=True)), num_samples)
        return Rollout(*map(list, zip(*rows, strict=True)))

    def score(self, indices: Indices, rollout: Rollout) -> dict[str, Values]:
        """Unweighted reward parts of a rollout of these prompts: [B] by the part's name."""
        num_samples = len(rollout.completions) // len(indices)
        samples = []
        for i in self.processes.share(range(len(indices))):
            problem = self.problems[indices[i]]
            for row in range(i * num_samples, (i + 1) * num_samples):
                ids, finished = rollout.completions[row], rollout.finished[row]
                text = self.tokenizer.decode(ids)
                samples.append(Sample(problem, text, ids, finished))
        parts = self.rewards.parts(samples)
        require_finite(parts)
        return {
            name: np.array(self._of_all_prompts(values.tolist(), num_samples))
            for name, values in parts.items()
        }

    def _of_all_prompts(self, rows: list[T], num_samples: int) -> list[T]:
        """From what each process has for the rows of its prompts, that of all prompts' rows."""
        groups = [rows[i : i + num_samples] for i in range(0, len(rows), num_samples)]
        return [row for group in self.processes.in_order(groups) for row in group]
