"""Sampled completions of prompts, in a loop that a kill does not send back to its beginning."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import Field, PositiveInt

from minimind.chat.tokenizer import ChatTokenizer
from minimind.compute.precision import DType
from minimind.errors import UserError
from minimind.lineage.resume import ResumeCheckpoint
from minimind.model.generate import Sampling, generate
from minimind.model.transformer import Transformer
from minimind.params import Section, Seed
from minimind.tasks.problem import Problem, encode_prompts
from minimind.training.run import StageRun


class CompletionConfig(Section):
    """Which prompts are completed, and how; keys of every section that samples."""

    num_prompts: PositiveInt  # the first ones of the file
    temperature: float = Field(gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: PositiveInt
    batch_size: PositiveInt = 64  # completions at a time
    seed: Seed = 1
    dtype: DType = "bfloat16"


class Completion(NamedTuple):
    """What was said to a prompt."""

    text: str  # tags included, control tokens not
    finished: bool  # whether it came to an end by itself


Source = Callable[[Sequence[Problem]], list[list[Completion]]]
"""Completes prompts; every prompt equally often."""


@dataclass(frozen=True)
class Checkpoint:
    """A model of ours as a source.

    A completion's noise depends on the seed, its prompt's number and its own alone.
    """

    model: Transformer
    tokenizer: ChatTokenizer
    config: CompletionConfig
    num_samples: int  # completions of each prompt

    def __call__(self, prompts: Sequence[Problem]) -> list[list[Completion]]:
        """Raises UserError where a prompt fills the model's positions."""
        size, config = self.num_samples, self.config
        keys = [prompt.number * size + sample for prompt in prompts for sample in range(size)]
        sampled = generate(
            self.model,
            encode_prompts(prompts, self.tokenizer, self.model.config.max_positions),
            max_new_tokens=config.max_new_tokens,
            end_id=self.tokenizer.end_id,
            dtype=config.dtype,
            sampling=Sampling(config.temperature, config.top_p, config.seed, keys),
            num_samples_per_prompt=size,
        )
        texts = map(self.tokenizer.decode, sampled.ids)
        completions = list(map(Completion, texts, sampled.finished))
        return [completions[i : i + size] for i in range(0, len(completions), size)]


def complete_all(
    source: Source, prompts: Sequence[Problem], prompts_at_a_time: int, run: StageRun
) -> list[tuple[Problem, list[Completion]]]:
    """Every prompt with its completions, in their order.

    Picks up what a run of the same kind had completed before it was killed.

    Raises:
        Stopped: a signal came; what there is is saved.
        UserError: the source cannot go on; what there is is saved too.
    """
    state, damaged = run.store.load()
    for line in damaged:
        run.say(line)
    saved = state.values["completions"] if state else []
    completions = [[Completion(*completion) for completion in row] for row in saved]
    if completions:
        run.say(f"going on after {len(completions)} of {len(prompts)} prompts")
    last_save = last_line = time.monotonic()

    def save() -> None:
        nonlocal last_save
        run.store.save(ResumeCheckpoint(len(completions), {}, {"completions": completions}))
        last_save = time.monotonic()

    while len(completions) < len(prompts):
        batch = prompts[len(completions) : len(completions) + prompts_at_a_time]
        try:
            completions += source(batch)
        except UserError:
            save()
            raise
        if time.monotonic() - last_line >= run.settings.log_seconds:
            run.say(f"{len(completions)} of {len(prompts)} prompts")
            last_line = time.monotonic()
        if run.stop.requested or time.monotonic() - last_save >= run.settings.save_seconds:
            save()
            run.raise_if_stopped(f"after {len(completions)} of {len(prompts)} prompts")
    save()
    return list(zip(prompts, completions, strict=True))
