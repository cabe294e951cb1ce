"""What a policy acts in: prompts to answer, and rewards for the answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from minimind.model.transformer import Transformer
from minimind.reinforcement.advantages import Values
from minimind.reinforcement.prompts import Indices, Prompt
from minimind.reinforcement.rewards import Rewards, Sample, require_finite
from minimind.reinforcement.rollout import Rollout, SamplingConfig, sample
from minimind.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Environment:
    """Prompts, the sampling of completions, and what these earn."""

    prompts: Sequence[Prompt]
    tokenizer: ChatTokenizer
    sampling: SamplingConfig
    rewards: Rewards

    def rollout(
        self, model: Transformer, indices: Indices, num_samples: int, first_key: int
    ) -> Rollout:
        """`num_samples` completions of each of these prompts."""
        model.eval()
        ids = [self.prompts[index].ids for index in indices]
        rollout = sample(model, ids, num_samples, self.sampling, first_key)
        model.train()
        return rollout

    def judge(self, indices: Indices, rollout: Rollout) -> dict[str, Values]:
        """Unweighted reward parts of a rollout of these prompts: [B] by the part's name."""
        num_samples = len(rollout.completions) // len(indices)
        prompts = [self.prompts[index] for index in indices for _ in range(num_samples)]
        samples = [
            Sample(prompt.text, self.tokenizer.decode(ids), prompt.answer, ids, finished)
            for prompt, ids, finished in zip(
                prompts, rollout.completions, rollout.finished, strict=True
            )
        ]
        parts = self.rewards.parts(samples)
        require_finite(parts)
        return parts
