"""A price of length."""

from collections.abc import Sequence

from pydantic import Field

from minimind.rewards.reward import Given, Reward, Sample


class Length(Reward):
    """0 up to `free_length` tokens, then linearly down to -1 at `max_new_tokens`.

    A completion that does not end costs 1 (arXiv:2503.14476, eq. 13).
    """

    free_length: int = Field(48, ge=0)  # tokens that cost nothing

    def bounds(self) -> tuple[float, float]:
        return -1.0, 0.0

    def score(self, samples: Sequence[Sample], given: Given) -> list[float]:
        return [self._price(len(s.ids), s.finished, given.max_new_tokens) for s in samples]

    def _price(self, num_tokens: int, finished: bool, most: int) -> float:
        if not finished or num_tokens >= most:
            return -1.0
        return -max(0, num_tokens - self.free_length) / max(1, most - self.free_length)


REWARD = Length
