"""A price of saying the same again."""

from collections.abc import Sequence

from pydantic import Field

from minimind.rewards.reward import Given, Reward, Sample


class Repetition(Reward):
    """Minus the share of n-grams of tokens that have stood in the completion before."""

    repetition_ngram: int = Field(8, gt=0)  # tokens of what counts as a repetition

    def bounds(self) -> tuple[float, float]:
        return -1.0, 0.0

    def score(self, samples: Sequence[Sample], given: Given) -> list[float]:
        return [self._price(sample.ids) for sample in samples]

    def _price(self, ids: Sequence[int]) -> float:
        n = self.repetition_ngram
        ngrams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
        return -(1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0


REWARD = Repetition
