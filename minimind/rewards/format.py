"""The form of a completion: thought and answer inside their tags."""

import re
from collections.abc import Sequence

from minimind.chat.tokenizer import TAGS
from minimind.rewards.reward import Given, Reward, Sample

COMPLETE_REWARD, TAG_REWARD = 0.5, 0.25
_COMPLETE = re.compile(
    r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL
)


class Format(Reward):
    """0.5 for ``<think>..</think> <answer>..</answer>`` and nothing else, 0.25 for each tag that
    stands exactly once; newlines inside and between the pairs are fine.
    """

    default_weight = 0.2

    def bounds(self) -> tuple[float, float]:
        return 0.0, COMPLETE_REWARD + len(TAGS) * TAG_REWARD

    def score(self, samples: Sequence[Sample], given: Given) -> list[float]:
        return [_form(sample.completion) for sample in samples]


def _form(completion: str) -> float:
    complete = COMPLETE_REWARD if _COMPLETE.fullmatch(completion) else 0.0
    return complete + TAG_REWARD * sum(completion.count(tag) == 1 for tag in TAGS)


REWARD = Format
