"""Prompts for reinforcement, encoded, and which of them a step takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.epochs import num_steps, steps_per_epoch
from minimind.datasets.formats import parse_prompt, read_rows
from minimind.errors import UserError

Indices = NDArray[np.int64]


class Prompt(NamedTuple):
    """A question, and the answer that a verifier knows."""

    text: str
    answer: str | None
    ids: list[int]  # the question as a user's turn, and the header of the assistant's
    place: str  # file and line, for messages


def load_prompts(
    source: Path, tokenizer: ChatTokenizer, max_positions: int, needs_answers: bool
) -> list[Prompt]:
    """Read and encode rows of ``{"prompt", "answer"}``.

    Raises:
        UserError: a row cannot be read, lacks an answer that the rewards need, or fills the
            model's positions.
    """
    prompts = []
    for row in read_rows(source, parse_prompt):
        text, answer = row.value
        if answer is None and needs_answers:
            raise UserError(
                f"{row.place}: answer is missing; add it, or set the weight rewards.answer to 0."
            )
        ids = tokenizer.encode_prompt([{"role": "user", "content": text}])
        if len(ids) >= max_positions:
            raise UserError(
                f"{row.place}: the prompt has {len(ids)} tokens, but the model has only "
                f"{max_positions} positions for prompt and completion; shorten it."
            )
        prompts.append(Prompt(text, answer, ids, str(row.place)))
    return prompts


@dataclass(frozen=True)
class Draws:
    """Which prompts a step takes: a pure function of seed, step and, if given, weights."""

    num_prompts: int
    prompts_per_step: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.num_prompts, self.prompts_per_step)

    def num_steps(self, epochs: float, max_steps: int) -> int:
        """Steps of so many epochs, at most `max_steps` unless that is 0."""
        return num_steps(epochs, self.num_prompts, self.prompts_per_step, max_steps)

    def in_turn(self, step: int) -> Indices:
        """Every prompt once an epoch, in an order of the epoch's own; its last step is smaller."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.num_prompts)
        start = position * self.prompts_per_step
        return order[start : start + self.prompts_per_step]

    def by_weight(self, step: int, weights: Sequence[float] | NDArray[np.float64]) -> Indices:
        """Different prompts, each drawn with a chance in proportion to its weight."""
        shares = np.asarray(weights, dtype=np.float64)
        generator = np.random.default_rng([self.seed, 2, step])
        size = min(self.prompts_per_step, self.num_prompts)
        return generator.choice(
            self.num_prompts, size=size, replace=False, p=shares / shares.sum()
        ).astype(np.int64)
