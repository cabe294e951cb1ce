"""The project's own code, as its stages call it, in bfloat16."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import torch

from benchmarks.material import END, Material
from benchmarks.paced import Paced
from benchmarks.peers import Step
from minimind.compute.matmuls import choose_matmuls
from minimind.compute.precision import autocast
from minimind.compute.processes import Processes
from minimind.compute.settings import RuntimeSettings
from minimind.compute.sharding import shard
from minimind.datasets.batches import Extra, in_order
from minimind.model.generate import Sampling, generate
from minimind.model.transformer import Layer, Transformer
from minimind.objectives.distill import TEACHER_IDS, TEACHER_LOGPROBS, Distill, bucket_logprobs
from minimind.objectives.dpo import Dpo
from minimind.objectives.loss import Objective
from minimind.objectives.next_token import NextToken
from minimind.objectives.preference import row_logprobs
from minimind.params import with_shared
from minimind.reinforcement.draws import Indices
from minimind.reinforcement.environment import Environment
from minimind.reinforcement.group_relative import GroupRelative, GrpoConfig
from minimind.reinforcement.loop import reinforce
from minimind.rewards.reward import Given
from minimind.rewards.weighted import Rewards
from minimind.tasks.problem import Problem
from minimind.training.optimizer import Optimizer, OptimizerConfig
from minimind.training.step import take_step

CPU = torch.device("cpu")
torch.utils.deterministic.fill_uninitialized_memory = False


def prepare(material: Material, work: str, compile: bool = False) -> Step:
    step = _prepare(material, work, compile)

    def with_matmuls_as_in_stages() -> int:
        choose_matmuls("auto")
        try:
            return step()
        finally:
            choose_matmuls("native")  # others are measured in this process, too

    return with_matmuls_as_in_stages


def _prepare(material: Material, work: str, compile: bool) -> Step:
    if work == "rollouts":
        return _rollouts(material, material.model())
    if work == "rollouts that end":
        return _rollouts(material, material.ending_model(material.sizes.new_tokens // 3))
    if work == "grpo step":
        return _grpo(material, compile)
    return _supervised(material, work, compile)


@dataclass
class BareRun:
    """What the loops ask of a run, without signals, states and provenance."""

    settings: RuntimeSettings
    device: torch.device = CPU
    processes: Processes = field(default_factory=Processes)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def store(self) -> "BareRun":
        return self

    def load(self) -> tuple[None, list[str]]:
        return None, []

    def save(self, _state: object) -> None: ...

    def say(self, _line: str) -> None: ...

    def log(self, _row: object) -> None: ...

    def update(self, *_values: object) -> None: ...

    def close(self) -> None: ...

    def progress(self, *_values: object) -> "BareRun":
        return self

    def computed_with(self) -> dict[str, Any]:
        return {}

    def is_save_due(self, *_values: object) -> bool:
        return False

    def agree(self, _due: bool) -> tuple[bool, bool]:
        return False, False


def bare_run(compile: bool) -> Any:
    return BareRun(RuntimeSettings(compile=compile))


def _supervised(material: Material, work: str, compile: bool) -> Step:
    objective, extras = _objective(material, work)
    section = with_shared(material.params[work], material.params, OptimizerConfig)
    config = OptimizerConfig(**{key: section[key] for key in OptimizerConfig.model_fields})
    run = bare_run(compile)
    trained, forward = shard(material.model(), Layer, run.device, run.processes, run.settings)
    optimizer = Optimizer(trained, config, CPU)
    batches = replace(material.batches(work), extras=extras)
    numbers = count()

    def step() -> int:
        batch = batches.step(next(numbers) % batches.num_steps, rank=0, world=1)
        torch.use_deterministic_algorithms(compile, warn_only=True)  # as prepare_device does
        take_step(forward, objective, optimizer, batch, 0.0, 1.0, run)
        torch.use_deterministic_algorithms(False)
        return batch.totals.tokens

    return step


def _objective(material: Material, work: str) -> tuple[Objective, dict[str, Extra]]:
    section = material.params[work]
    if work == "dpo":
        objective = Dpo(section["beta"], section["reduction"], section["nll_weight"])
        return objective, _reference(material, section)
    if work == "distill":
        temperature = material.params["teacher_outputs"]["temperature"]
        return Distill(section["alpha"], temperature, None), _teacher_outputs(material, temperature)
    return NextToken(section.get("tag_weight", 1.0), section.get("final_tag_weight", 1.0)), {}


def _reference(material: Material, section: dict[str, Any]) -> dict[str, Extra]:
    """What the reference stage writes: of each row, once."""
    model, data = material.model().eval(), material.dataset("dpo")
    with torch.no_grad(), autocast(CPU, "bfloat16"):
        parts = [
            row_logprobs(model, batch, section["reduction"])
            for batch in in_order(data, np.arange(data.num_samples), 8, {})
        ]
    return {"reference": Extra(torch.cat(parts).numpy(), per="rows")}


def _teacher_outputs(material: Material, temperature: float) -> dict[str, Extra]:
    """What the teacher_outputs stage writes: the likeliest tokens at each trained one."""
    teacher, data = material.teacher().eval(), material.dataset("distill")
    top_k = material.params["teacher_outputs"]["top_k"]
    ids, logprobs = [], []
    with torch.no_grad(), autocast(CPU, "bfloat16"):
        for batch in in_order(data, np.arange(data.num_samples), 16, {}):
            logits = teacher(batch.tokens, batch.predict_at).logits
            ids.append(logits.topk(top_k).indices)
            logprobs.append(bucket_logprobs(logits, ids[-1], temperature))
    return {
        TEACHER_IDS: Extra(torch.cat(ids).numpy().astype(np.uint16), per="tokens"),
        TEACHER_LOGPROBS: Extra(torch.cat(logprobs).numpy().astype(np.float16), per="tokens"),
    }


def _rollouts(material: Material, model: Transformer) -> Step:
    model.eval()
    sizes, seeds = material.sizes, count()

    def step() -> int:
        num_rows = sizes.num_prompts * sizes.num_samples
        completions = generate(
            model,
            material.prompts,
            max_new_tokens=sizes.new_tokens,
            end_id=END,
            dtype="bfloat16",
            sampling=Sampling(temperature=1.0, top_p=1.0, seed=next(seeds), keys=range(num_rows)),
            num_samples_per_prompt=sizes.num_samples,
        )
        return sum(map(len, completions.ids))

    return step


class _Words:
    """In place of a tokenizer, for rewards: a token's text is its number."""

    end_id = END

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class _PacedGrpo(GroupRelative):
    """GRPO that waits before it draws a step's prompts."""

    wait: Callable[[], None]

    def draw(self, step: int) -> Indices:
        self.wait()
        return super().draw(step)


def _grpo(material: Material, compile: bool) -> Step:
    sizes = material.sizes
    section = with_shared(material.params["grpo"], material.params, GrpoConfig)
    rewards = dict.fromkeys(("format", "answer", "length", "repetition", "reward_model"), 0.0)
    config = GrpoConfig(
        **section
        | {
            "batch_size": sizes.grpo_prompts,
            "accumulation_steps": 1,
            "max_steps": 10**6,
            "epochs": 1e6,
            "max_new_tokens": sizes.grpo_tokens,
            "num_generations": sizes.num_samples,
            "seed": material.seed,
            "log_interval": 10**6,
            "rewards": section["rewards"] | rewards | {"custom": 1.0},
        }
    )
    prompts = material.prompts
    problems = [Problem.of(_Words().decode(ids)) for ids in prompts]
    drawn = [0]

    def reward(_prompt: str, completion: str, _answer: str | None) -> float:
        drawn[0] += len(completion.split())
        return text_reward(completion)

    rewards_of = Rewards(config.rewards, Given(sizes.grpo_tokens, custom=reward))
    environment = Environment(problems, prompts, _Words(), config, rewards_of)  # type: ignore[arg-type]
    algorithm = _PacedGrpo(config, len(prompts))

    def loop(wait: Callable[[], None]) -> None:
        algorithm.wait = wait
        reinforce(material.model(), environment, algorithm, config, bare_run(compile))

    paced = Paced(loop)

    def step() -> int:
        drawn[0] = 0
        paced.step()
        return drawn[0]

    return step


def text_reward(text: str) -> float:
    """A reward that completions of random tokens differ in, from -1 to 1."""
    return sum(map(ord, text)) % 101 / 50 - 1
