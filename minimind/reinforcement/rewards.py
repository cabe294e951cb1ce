"""Rewards of completions: parts that are weighted and added up.

A part with weight 0 is not computed. Every part has known bounds, so that the whole can be
scaled to [0, 1] where a method needs that.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from pydantic import Field, model_validator

from minimind.chat.tokenizer import TAGS
from minimind.errors import UserError
from minimind.params import Section
from minimind.reinforcement.advantages import Values
from minimind.tasks.problem import Problem

COMPLETE_REWARD, TAG_REWARD = 0.5, 0.25
_COMPLETE = re.compile(
    r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL
)


class Sample(NamedTuple):
    """A completion to be judged."""

    problem: Problem
    completion: str  # tags included, control tokens not
    ids: list[int]  # of the completion
    finished: bool  # whether it ended by itself


class BatchReward(Protocol):
    """Rewards of many samples at once, such as a reward model's."""

    def __call__(self, samples: Sequence[Sample]) -> Sequence[float]: ...


CustomReward = Callable[[str, str, str | None], float]


class RewardsConfig(Section):
    """Weights of the parts, 0 leaving a part out, and what the parts need to know."""

    format: float = Field(0.2, ge=0)
    answer: float = Field(1.0, ge=0)
    length: float = Field(0.0, ge=0)
    repetition: float = Field(0.0, ge=0)
    reward_model: float = Field(0.0, ge=0)
    custom: float = Field(0.0, ge=0)
    free_length: int = Field(48, ge=0)  # tokens that cost nothing
    repetition_ngram: int = Field(8, gt=0)  # tokens of what counts as a repetition
    reward_model_clip: float = Field(3.0, gt=0)  # scores are clipped to +- this

    @model_validator(mode="after")
    def _some_part_counts(self) -> "RewardsConfig":
        if not self.weights():
            raise ValueError("at least one weight must be above 0")
        return self

    def weights(self) -> dict[str, float]:
        """Parts with a weight above 0."""
        weights = {
            "format": self.format,
            "answer": self.answer,
            "length": self.length,
            "repetition": self.repetition,
            "reward_model": self.reward_model,
            "custom": self.custom,
        }
        return {name: weight for name, weight in weights.items() if weight}


class Rewards:
    """Scores samples by the parts that have a weight."""

    def __init__(
        self,
        config: RewardsConfig,
        max_new_tokens: int,
        reward_model: BatchReward | None = None,
        custom: CustomReward | None = None,
    ) -> None:
        self.config, self.max_new_tokens = config, max_new_tokens
        self.reward_model, self.custom = reward_model, custom
        self.weights = config.weights()

    def parts(self, samples: Sequence[Sample]) -> dict[str, Values]:
        """Each part of each sample, unweighted: float64 [B] by the part's name."""
        return {
            name: np.asarray(getattr(self, f"_{name}")(samples), dtype=np.float64)
            for name in self.weights
        }

    def total(self, parts: dict[str, Values]) -> Values:
        """The weighted sum of parts [B]."""
        return np.sum([weight * parts[name] for name, weight in self.weights.items()], axis=0)

    def scaled(self, totals: Values) -> Values:
        """Totals [B] from their least to their greatest possible value, as 0 to 1."""
        clip = self.config.reward_model_clip
        bounds = {
            "format": (0.0, COMPLETE_REWARD + len(TAGS) * TAG_REWARD),
            "answer": (0.0, 1.0),
            "length": (-1.0, 0.0),
            "repetition": (-1.0, 0.0),
            "reward_model": (-clip, clip),
            "custom": (-1.0, 1.0),
        }
        low = sum(weight * bounds[name][0] for name, weight in self.weights.items())
        high = sum(weight * bounds[name][1] for name, weight in self.weights.items())
        return np.clip((totals - low) / (high - low), 0.0, 1.0)

    def _format(self, samples: Sequence[Sample]) -> list[float]:
        return [format_reward(sample.completion) for sample in samples]

    def _answer(self, samples: Sequence[Sample]) -> list[float]:
        return [float(sample.problem.score(sample.completion).correct) for sample in samples]

    def _length(self, samples: Sequence[Sample]) -> list[float]:
        free, most = self.config.free_length, self.max_new_tokens
        return [length_penalty(len(s.ids), s.finished, free, most) for s in samples]

    def _repetition(self, samples: Sequence[Sample]) -> list[float]:
        return [repetition_penalty(s.ids, self.config.repetition_ngram) for s in samples]

    def _reward_model(self, samples: Sequence[Sample]) -> Values:
        assert self.reward_model is not None
        clip = self.config.reward_model_clip
        return np.clip(self.reward_model(samples), -clip, clip)

    def _custom(self, samples: Sequence[Sample]) -> list[float]:
        assert self.custom is not None
        values = []
        for sample in samples:
            problem = sample.problem
            value = self.custom(problem.prompt, sample.completion, problem.answer)
            if not isinstance(value, int | float) or not -1 <= value <= 1:  # NaN is not, either
                raise UserError(
                    f"the custom reward is {value!r} for the prompt {problem.prompt[:60]!r}; "
                    "it must be a number from -1 to 1."
                )
            values.append(float(value))
        return values


def format_reward(completion: str) -> float:
    """0.5 for ``<think>..</think> <answer>..</answer>`` and nothing else, 0.25 for each tag that
    stands exactly once; newlines inside and between the pairs are fine.
    """
    complete = COMPLETE_REWARD if _COMPLETE.fullmatch(completion) else 0.0
    return complete + TAG_REWARD * sum(completion.count(tag) == 1 for tag in TAGS)


def length_penalty(num_tokens: int, finished: bool, free_length: int, max_new_tokens: int) -> float:
    """0 up to `free_length` tokens, then linearly down to -1 at `max_new_tokens`.

    A completion that does not end costs 1 (arXiv:2503.14476, eq. 13).
    """
    if not finished or num_tokens >= max_new_tokens:
        return -1.0
    return -max(0, num_tokens - free_length) / max(1, max_new_tokens - free_length)


def repetition_penalty(ids: Sequence[int], ngram: int) -> float:
    """Minus the share of n-grams of tokens that have stood in the completion before."""
    ngrams = [tuple(ids[start : start + ngram]) for start in range(len(ids) - ngram + 1)]
    return -(1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0


def load_custom_reward(file: Path) -> CustomReward:
    """The function ``score(prompt, completion, answer)`` of a Python file of this project.

    Raises:
        UserError: the file is missing or outside of the project's folder, fails when it is
            imported, or has no such function.
    """
    root = Path.cwd().resolve()
    if file.suffix != ".py" or not file.resolve().is_relative_to(root):
        raise UserError(
            f"{file} must be a .py file inside of {root}, so that its content is tracked."
        )
    if not file.is_file():
        raise UserError(f"{file} is missing; write it, with a function score, or correct the path.")
    spec = importlib.util.spec_from_file_location("minimind_custom_reward", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(f"{file} cannot be imported: {type(error).__name__}: {error}.") from error
    score = getattr(module, "score", None)
    if not callable(score):
        raise UserError(f"{file} has no function score(prompt, completion, answer); define it.")
    return _checked(score, file)


def _checked(score: CustomReward, file: Path) -> CustomReward:
    def checked(prompt: str, completion: str, answer: str | None) -> float:
        try:
            return score(prompt, completion, answer)
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            raise UserError(
                f"{file}: score failed on the prompt {prompt[:60]!r}: "
                f"{type(error).__name__}: {error}."
            ) from error

    return checked


def require_finite(parts: dict[str, Values]) -> None:
    """Raises UserError where a part is NaN or infinite: a reward model may be broken."""
    for name, values in parts.items():
        if not all(map(math.isfinite, values)):
            raise UserError(f"the reward {name} is not finite; look at what computes it.")
