"""The language of a completion: that of its prompt, Chinese or one in Latin letters."""

import re
from collections.abc import Sequence

from minimind.chat.tokenizer import TAGS
from minimind.rewards.reward import Given, Reward, Sample

_TAG = re.compile("|".join(map(re.escape, TAGS)))
# A Chinese character says about as much as a word.
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_WORD = re.compile(r"[A-Za-zÀ-ɏ]+")


class Language(Reward):
    """The share of the completion's words that are of the prompt's language.

    Reasoning models mix languages unless that is rewarded (DeepSeek-R1, arXiv:2501.12948,
    section 2.3.2). 1 where the prompt or the completion has no words.
    """

    def score(self, samples: Sequence[Sample], given: Given) -> list[float]:
        return [_share(sample.problem.prompt, sample.completion) for sample in samples]


def _share(prompt: str, completion: str) -> float:
    chinese, words = _count(prompt)
    said = _count(_TAG.sub(" ", completion))
    if chinese == words or not sum(said):
        return 1.0
    return said[0 if chinese > words else 1] / sum(said)


def _count(text: str) -> tuple[int, int]:
    return len(_CHINESE.findall(text)), len(_WORD.findall(text))


REWARD = Language
