"""What a policy says to the same few prompts while it trains."""

import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimind.model.transformer import Transformer
from minimind.reinforcement.environment import Environment

NUM_PROMPTS = 6
NUM_TIMES = 8  # evenly over the steps, beside the first look, which is before any


class Watched:
    """Its likeliest completions, and what they would earn.

    A part of the session: a resumed run still has those of before. Nothing is drawn for it, so the
    run is the same without.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        total = len(environment.prompts)
        count = min(NUM_PROMPTS, total)
        # Drawn: equal steps would miss what stands in turns, as languages may.
        self.indices = np.array(sorted(random.Random(0).sample(range(total), count)))
        self.rows: list[dict[str, Any]] = []

    def look(self, model: Transformer, step: int, num_steps: int) -> None:
        """Ask, if it is time: `step` steps are done."""
        times = {round(i * num_steps / NUM_TIMES) for i in range(NUM_TIMES + 1)}
        if step not in times or (self.rows and self.rows[-1]["step"] == step):
            return
        environment = self.environment
        rollout = environment.rollout(model, self.indices, num_samples=1)
        rewards = environment.rewards.total(environment.score(self.indices, rollout))
        for index, ids, reward in zip(self.indices, rollout.completions, rewards, strict=True):
            problem = environment.problems[index]
            self.rows.append(
                {
                    "step": step,
                    "prompt": problem.messages[-1]["content"],
                    "completion": environment.tokenizer.decode(ids),
                    "reward": round(float(reward), 4),
                }
            )

    def state_tensors(self) -> dict[str, Tensor]:
        text = json.dumps(self.rows).encode()
        return {"rows": torch.tensor([*text], dtype=torch.uint8)}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.rows = json.loads(bytes(tensors["rows"].tolist()))
