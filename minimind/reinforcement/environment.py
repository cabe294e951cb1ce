"""What a policy acts in: prompts to answer, and rewards for the answers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from minimind.chat.tokenizer import ChatTokenizer
from minimind.compute.device import limit_matmul_cache
from minimind.compute.processes import Processes
from minimind.model.generate import Sampling, generate
from minimind.model.transformer import Transformer
from minimind.reinforcement.config import ReinforcementConfig
from minimind.reinforcement.draws import Indices
from minimind.reinforcement.rollout import Rollout, completion_logprobs
from minimind.rewards.custom import load_custom_reward
from minimind.rewards.reward import Given, Sample, Values
from minimind.rewards.reward_model import load_reward_model
from minimind.rewards.weighted import Rewards
from minimind.tasks.problem import Problem, encode_prompts, read_problems
from minimind.terminal.signals import StopRequest
from minimind.training.run import Run

T = TypeVar("T")


@dataclass(frozen=True)
class Environment:
    """Prompts, the sampling of completions, and what these earn.

    Processes divide prompts among themselves; what each has made is then known to all.
    """

    problems: Sequence[Problem]
    prompts: Sequence[list[int]]  # the ids of each, with the header of the assistant's turn
    tokenizer: ChatTokenizer
    config: ReinforcementConfig
    rewards: Rewards
    processes: Processes = field(default_factory=Processes)
    stop: StopRequest = field(default_factory=lambda: StopRequest(listening=False))

    @classmethod
    def open(
        cls,
        config: ReinforcementConfig,
        model: Transformer,
        tokenizer: ChatTokenizer,
        prompts: Path,
        run: Run,
    ) -> "Environment":
        """With prompts from a file, and those rewards that have a weight.

        Raises:
            UserError: prompts, reward model or custom reward cannot be used.
        """
        limit_matmul_cache()  # every rollout has other numbers of rows and tokens
        weights = config.rewards.weights()
        problems = read_problems(prompts, needs_answers="answer" in weights, say=run.say)
        encoded = encode_prompts(problems, tokenizer, model.config.max_positions)
        reward_model = custom = None
        if "reward_model" in weights:
            source = config.reward_model, config.hub_reward_model, config.trust_remote_code
            reward_model = load_reward_model(*source, run.device)
        if "custom" in weights:
            custom = load_custom_reward(config.custom_reward)
        rewards = Rewards(config.rewards, Given(config.max_new_tokens, reward_model, custom))
        longest = max(map(len, encoded))
        for line in config.without_effect(len(encoded), longest, model.config.max_positions):
            run.say(line)
        return cls(problems, encoded, tokenizer, config, rewards, run.processes, run.stop)

    def rollout(
        self,
        model: Transformer,
        indices: Indices,
        num_samples: int,
        first_key: int | None = None,
    ) -> Rollout:
        """`num_samples` completions of each of these prompts; row i draws with `first_key + i`.

        Those keys are all there is to the noise: no state is carried from step to step, so there
        is none to lose, and the number of processes changes nothing. Without them the likeliest
        token is taken each time.
        """
        own = self.processes.share(range(len(indices)))
        prompts = [self.prompts[indices[i]] for i in own]
        config = self.config
        sampling = None
        if first_key is not None:
            keys = [first_key + i * num_samples + k for i in own for k in range(num_samples)]
            sampling = Sampling(config.temperature, config.top_p, config.seed, keys)
        model.eval()
        with self._giving_up():
            completions = generate(
                model,
                prompts,
                max_new_tokens=config.max_new_tokens,
                end_id=self.tokenizer.end_id,
                dtype=config.dtype,
                sampling=sampling,
                num_samples_per_prompt=num_samples,
                with_logprobs=True,
            )
        model.train()
        assert completions.logprobs is not None
        repeated = [prompt for prompt in prompts for _ in range(num_samples)]
        own_rows = zip(
            repeated, completions.ids, completions.finished, completions.logprobs, strict=True
        )
        rows = self._of_all_prompts(list(own_rows), num_samples)
        return Rollout(*map(list, zip(*rows, strict=True)))

    def logprobs(
        self,
        model: Transformer,
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
        rows_at_a_time: int,
    ) -> list[Tensor]:
        """Log-probabilities of completions as training computes them, each process its share."""
        share, config = self.processes.share, self.config
        rows = share(prompts), share(completions)
        with self._giving_up():
            own = completion_logprobs(
                model, *rows, config.temperature, config.dtype, rows_at_a_time
            )
        return self.processes.in_order(own)

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
        return {
            name: np.array(self._of_all_prompts(values.tolist(), num_samples))
            for name, values in self.rewards.parts(samples).items()
        }

    def _giving_up(self) -> AbstractContextManager[None]:
        """Of many processes the others would wait for one that gives up."""
        return nullcontext() if self.processes.world > 1 else self.stop.giving_up()

    def _of_all_prompts(self, rows: list[T], num_samples: int) -> list[T]:
        """From what each process has for the rows of its prompts, that of all prompts' rows."""
        groups = [rows[i : i + num_samples] for i in range(0, len(rows), num_samples)]
        return [row for group in self.processes.in_order(groups) for row in group]
