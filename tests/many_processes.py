"""What the processes of test_processes.py run: python -m tests.many_processes <cases.json>

A case is a run of a few steps in a folder of its own. The same function runs it in one process.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.batches import Extra
from minimind.datasets.encoded import EncodedDataset
from minimind.errors import Stopped
from minimind.model.checkpoint import load_model
from minimind.model.reward import RewardModel
from minimind.objectives.dpo import Dpo
from minimind.objectives.next_token import NextToken
from minimind.objectives.reward_model import PairwiseReward
from minimind.params import load_section
from minimind.reinforcement.environment import Environment
from minimind.reinforcement.group_relative import GroupRelative
from minimind.reinforcement.loop import reinforce
from minimind.reinforcement.single_stream import SingleStream
from minimind.reinforcement.watched import Watched
from minimind.terminal.command import stage_app
from minimind.training import run as run_module
from minimind.training.fit import FitConfig, fit
from minimind.training.run import Run, start_training
from minimind.training.session import History
from stages.grpo import GrpoConfig
from stages.spo import SpoConfig
from tests.tiny import tiny_model

OBJECTIVES = {
    "sft": NextToken(10.0, 5.0),
    "dpo": Dpo(0.1, "sum", 0.1),
    "reward": PairwiseReward(),
}
app = stage_app("many")


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case in its folder; what it led to, as this process sees it."""
    os.chdir(case["folder"])
    os.environ["MINIMIND_SHARD"] = str(case.get("shard", 0))
    params, kind = Path("params.yaml"), case["kind"]
    sections = {"grpo": GrpoConfig, "spo": SpoConfig}
    config = load_section(params, "section", sections.get(kind, FitConfig))
    inputs = [Path("models")] if kind in sections else [Path("data")]
    try:
        with start_training(kind, params, {"section": config}, inputs) as run:
            stop_at = case.get("stop_at", 0)
            if isinstance(config, FitConfig):
                history, model = _fit(kind, config, run, stop_at, case.get("experts", 0))
            else:
                history, model = _reinforce(config, run)
    except Stopped as stopped:
        return {"stopped": str(stopped), "exit_code": stopped.exit_code}
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return {
        "history": history.rows,
        "validation": history.validation,
        "tokens": history.tokens,
        "resumes": history.resumes,
        "weights": digest.hexdigest(),
    }


def _fit(
    kind: str, config: FitConfig, run: Run, stop_at: int, num_experts: int
) -> tuple[History, nn.Module]:
    dataset = EncodedDataset.open(Path("data"))
    model: nn.Module = tiny_model(seed=2, num_experts=num_experts)
    extras = {}
    if kind == "reward":
        model = RewardModel(model)  # type: ignore[arg-type]
    if kind == "dpo":
        values = np.random.default_rng(0).normal(-20, 3, dataset.rows).astype(np.float32)
        extras = {"reference": Extra(values, per="rows")}
    is_last = run.processes.rank == run.processes.world - 1
    steps_seen: set[float] = set()

    def objective(model: nn.Module, batch: Any, progress: float) -> Any:
        """The kind's own; one process alone gets a signal in the step `stop_at`."""
        if model.training:
            steps_seen.add(progress)
            if is_last and len(steps_seen) == stop_at and not run.stop.requested:
                signal.raise_signal(signal.SIGTERM)
        return OBJECTIVES[kind](model, batch, progress)

    return fit(model, objective, dataset, config, run, extras), model


def _reinforce(config: GrpoConfig | SpoConfig, run: Run) -> tuple[History, nn.Module]:
    start = Path("models/start")
    model = load_model(start)
    config = config.model_copy(update={"custom_reward": Path("custom.py")})
    prompts = Path("prompts.jsonl")
    environment = Environment.open(config, model, ChatTokenizer.load(start), prompts, run)
    kind: Any = GroupRelative if isinstance(config, GrpoConfig) else SingleStream
    algorithm = kind(config, len(environment.prompts))
    return reinforce(model, environment, algorithm, config, run, Watched(environment)), model


@app.command()
def main(cases: Path) -> None:
    """Run all cases, one after the other; each process writes <cases>.<rank>."""
    run_module.leave_processes = lambda: None  # type: ignore[assignment]  # they meet again
    torch.set_num_threads(1)
    results = {}
    for name, case in json.loads(cases.read_text()).items():
        results[name] = run_case(case)
        print(f"{name} done", file=sys.stderr)
    rank = os.environ["RANK"]
    cases.with_suffix(f".{rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    app()
