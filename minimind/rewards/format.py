"""The form of a completion: thought and answer inside their tags."""

from collections.abc import Sequence

from minimind.chat.answers import thought_of
from minimind.chat.tokenizer import TAGS
from minimind.rewards.reward import Given, Reward, Sample

COMPLETE_REWARD, TAG_REWARD = 0.5, 0.25


class Format(Reward):
    """0.5 for a complete thought and answer (as evaluation counts them), 0.25 for each tag that
    stands exactly once.
    """

    default_weight = 0.2

    def bounds(self) -> tuple[float, float]:
        return 0.0, COMPLETE_REWARD + len(TAGS) * TAG_REWARD

    def score(self, samples: Sequence[Sample], given: Given) -> list[float]:
        return [_form(sample.completion) for sample in samples]


def _form(completion: str) -> float:
    complete = COMPLETE_REWARD if thought_of(completion) is not None else 0.0
    return complete + TAG_REWARD * sum(completion.count(tag) == 1 for tag in TAGS)


REWARD = Format
