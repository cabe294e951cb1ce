"""The stages that are killed: a tiny project with the whole graph, and what one sees of a run."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.tiny_project import copy_project, dvc
from benchmarks.warm import StageProcess

STEPS = {
    "max_steps": 20,
    "eval_interval": 3,
    "log_interval": 2,
    "warmup_steps": 2,
    "batch_size": 4,
}
SAMPLED = {"max_new_tokens": 6, "batch_size": 8}
POLICY = {"max_steps": 10, "batch_size": 4, "max_new_tokens": 6}
STUDENT = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
NUMBERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("pretrain", "sft", "dpo", "reason", "reward"), STEPS),
    "lora": STEPS | {"rank": 2},
    "distill": STEPS,
    "grpo": POLICY | {"num_generations": 2},
    "spo": POLICY,
    "rejection_sampling": SAMPLED | {"num_prompts": 24, "num_samples": 2},
    "thinking": SAMPLED | {"num_prompts": 40},
    "teacher_outputs": {"batch_size": 16, "top_k": 8},
    "evaluate": SAMPLED,
}
STARTING_FROM_SFT = (
    "grpo",
    "spo",
    "rejection_sampling",
    "thinking",
)  # so that a short run builds less
NOTHING_TO_RESUME = (
    *("code", "check", "mini_world", "tokenizer", "encode", "reference"),
    *("merge", "export", "evaluate", "report"),
)
# What a person, a terminal that closes, systemd, docker and Slurm send, and what else can end it.
SIGNALS = (
    *("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"),
    *("SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"),
    *("SIGPWR", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGSTKFLT", "SIGRTMIN", "SIGRTMAX"),
)
CLOCK_TICK = 0.01  # seconds that a file may seem older than it is


@dataclass
class Stage:
    """A stage of the tiny project as DVC sees it, and what it wrote when left in peace."""

    name: str
    command: str
    outputs: list[str]
    whole: dict[str, str] = field(default_factory=dict)  # digest by path
    seconds: float = 0.0

    @property
    def kind(self) -> str:
        return self.name.split("@")[0]


@dataclass
class Tally:
    """What happened to one kind of stage."""

    runs: int = 0
    kills: int = 0
    resumes: int = 0  # runs that went on from a state
    equal: int = 0  # runs whose outputs were those of an uninterrupted one
    losses: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    means: Counter[str] = field(default_factory=Counter)

    def lose(self, what: str) -> None:
        self.losses += 1
        print(f"LOSS: {what}", flush=True)


def build_project(directory: Path, kinds: list[str]) -> dict[str, Stage]:
    """The whole graph with tiny numbers, all outputs in place; the stages in their order.

    kinds: those that matter; others are not run unless these need them. Nothing means all.
    """
    copy_project(directory)
    params = yaml.safe_load((directory / "params.yaml").read_text(encoding="utf-8"))
    for section, values in NUMBERS.items():
        params[section] |= values
    params["distill"]["student"] |= STUDENT
    for section in STARTING_FROM_SFT:
        params[section]["init"] = "models/sft"
    (directory / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    stages = {entry[0]: Stage(*entry) for entry in list_stages(directory, kinds)}
    for number, stage in enumerate(stages.values()):
        if stage.kind == "export":  # its receipt is of what dvc.lock has
            dvc(directory, "commit", "-f", "-q", *[*stages][:number])
        started = time.monotonic()
        process = start(directory, stage)
        assert process.finish() == 0, f"{stage.name}: {process.printed()}"
        stage.seconds = time.monotonic() - started
        stage.whole = digests(directory, stage)
    return stages


def list_stages(directory: Path, kinds: list[str]) -> list[tuple[str, str, list[str]]]:
    """Name, command and outputs of each stage, those first that others need."""
    code = """
import json, networkx, os, sys
from dvc.repo import Repo
graph = Repo(".").index.graph
own = [stage for stage in graph if stage.path_in_repo == "dvc.yaml"]  # not of tools/ and lm-eval/
chosen = [s for s in own if not sys.argv[1:] or s.addressing.split("@")[0] in sys.argv[1:]]
needed = set(chosen).union(*(networkx.descendants(graph, stage) for stage in chosen))
stages = [stage for stage in networkx.dfs_postorder_nodes(graph) if stage in needed]
outputs = [[os.path.relpath(output.fs_path) for output in stage.outs] for stage in stages]
commands = [stage.cmd if isinstance(stage.cmd, str) else stage.cmd[-1] for stage in stages]
print(json.dumps([*zip((stage.addressing for stage in stages), commands, outputs)]))
"""
    printed = subprocess.run(
        [sys.executable, "-c", code, *kinds],
        cwd=directory,
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(entry) for entry in json.loads(printed.stdout.splitlines()[-1])]


def start(
    project: Path, stage: Stage, writes_before_full: int | None = None, under_dvc: bool = True
) -> StageProcess:
    """Run a stage's command as DVC does, or as a person would."""
    # Code of the project, not of this process, is to run.
    assert not any(name.split(".")[0] in ("minimind", "stages") for name in sys.modules)
    for output in stage.outputs:  # DVC removes them before it runs a stage
        remove(project / output)
    environment = {
        "MINIMIND_SAVE_SECONDS": "0",
        "MINIMIND_THREADS": "1",
        "DVC_ROOT": str(project),
        "DVC_STAGE": stage.name if under_dvc else "",
    }
    log = project.parent / "stage.log"
    return StageProcess(project, stage.command, log, environment, writes_before_full)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def digests(project: Path, stage: Stage) -> dict[str, str]:
    files = []
    for output in stage.outputs:
        path = project / output
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {
        str(file.relative_to(project)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def newest_checkpoint(project: Path) -> int | None:
    """The step of the newest complete state."""
    return max(
        (int(p.name.split("-")[1]) for p in project.glob(".resume/*/*/checkpoint-*")), default=None
    )


def phase_on_disk(project: Path, stage: Stage, started: float) -> str:
    """How far a stage's process has come, from what it wrote.

    started: its first second, as `time.time` counts them; what is older is another's.
    """

    def is_its_own(path: Path) -> bool:
        try:
            return path.stat().st_mtime >= started - CLOCK_TICK
        except FileNotFoundError:
            return False

    def any_of(pattern: str) -> bool:
        return any(is_its_own(path) for path in project.glob(pattern))

    outputs = [project / output for output in stage.outputs]
    if any(is_its_own(path) or is_its_own(Path(f"{path}.partial")) for path in outputs):
        return "final save"
    if any_of(".resume/*/*/finished.json"):
        return "final save"
    if any_of(".resume/*/*/partial-0*"):
        return "state write"
    is_at_work = any_of(".resume/*/*/since")  # it has its lease
    has_begun = stage.kind in NOTHING_TO_RESUME or newest_checkpoint(project) is not None
    return "step" if is_at_work and has_begun else "start"
