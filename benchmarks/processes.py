"""What only a process of its own can tell: its peak memory, and how long it takes to start."""

import argparse
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.table import ratio_rows
from benchmarks.tiny_project import ROOT, copy_project, dvc

MEMORY_WORK = "sft"
MEMORY_STEPS = 2


def memory_rows(peers: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of a few steps of fine-tuning, each peer in a fresh process."""
    rates = {}
    for peer in peers:
        command = [sys.executable, "-m", "benchmarks.processes", peer, str(arguments.threads)]
        command += ["short" if arguments.short else "full", str(arguments.minimind or "")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        if lines := done.stdout.split():  # none of a peer that does not fine-tune
            rates[peer] = [1 / float(lines[-1])]  # as a rate: less is better
    return [
        {**row, "ours": round(1 / rates["ours"][0]), "theirs": round(1 / rates[row["peer"]][0])}
        | {"unit": "MiB"}
        for row in ratio_rows("memory", rates)
    ]


def start_rows(
    root: Path, arguments: argparse.Namespace, alone: dict[str, Any]
) -> list[dict[str, Any]]:
    """Seconds until a training command has read its arguments: all that it imports.

    Where the graph is up to date also what it costs to find that out, against a graph of as many
    stages, parameters, dependencies and outputs that do nothing. Seconds without a peer go into
    `alone`.
    """
    commands = {"ours": [sys.executable, "-m", "stages.sft", "--help"]}
    if "trl" in arguments.peers.split(","):
        commands["trl"] = [sys.executable, "-c", "from trl import SFTTrainer"]
    if arguments.minimind:
        script = arguments.minimind / "trainer/train_full_sft.py"
        commands["minimind"] = [sys.executable, str(script), "--help"]
    rows = _timed("start", {name: (command, root) for name, command in commands.items()}, arguments)
    alone["seconds_to_start_without_a_model"] = {
        stage: _seconds([sys.executable, "-m", f"stages.{stage}", "--help"], root)
        for stage in ("mini_world", "tokenizer", "encode", "report")
    }
    with tempfile.TemporaryDirectory() as folder:
        alone["seconds_of_a_whole_stage_of_one_step"] = _one_step_seconds(Path(folder))
    is_up_to_date = subprocess.run(["dvc", "status", "-q"], cwd=root, capture_output=True)
    if is_up_to_date.returncode == 0:
        with tempfile.TemporaryDirectory() as folder:
            bare = _bare_graph(Path(folder), root)
            repros = {"ours": (["dvc", "repro"], root), "dvc": (["dvc", "repro"], bare)}
            rows += _timed("no-op of the graph", repros, arguments)
    return rows


def _one_step_seconds(folder: Path) -> float:
    """A tiny project's pretraining of one step, from the command's start to its outputs."""
    project = copy_project(folder)
    dvc(project, "repro", "-q", "encode@pretrain")
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    params["pretrain"] |= {"max_steps": 1, "validation_share": 0.0}
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    graph = yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))
    command = shlex.split(graph["stages"]["pretrain"]["cmd"])
    return _seconds([sys.executable, *command[1:]], project)


def _bare_graph(folder: Path, root: Path) -> Path:
    """A graph of as many stages, parameters, dependencies and outputs as the project's.

    DVC reads the file of parameters anew for each stage that names some, so that it has them, too.
    """
    lock = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"].values()
    params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    stages: dict[str, Any] = {}
    for i, stage in enumerate(lock):
        deps = [f"dep{j}" for j in range(len(stage.get("deps", [])))]
        outs = [f"out{i}.{j}" for j in range(len(stage.get("outs", [])))]
        for name in deps:
            (folder / name).write_text(name)
        stages[f"stage{i}"] = {
            "cmd": " && ".join(f"echo {name} > {name}" for name in outs),
            "params": [key for keys in stage.get("params", {}).values() for key in keys],
            "deps": deps,
            "outs": outs,
        }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    for command in ("git init -q", "dvc init -q", "dvc repro -q"):
        subprocess.run(command.split(), cwd=folder, capture_output=True, check=True)
    return folder


def _seconds(command: list[str], folder: Path) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
    return round(time.perf_counter() - started, 2)


def _timed(
    work: str, commands: dict[str, tuple[list[str], Path]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of commands that were run in turn, each in its folder."""
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, (command, folder) in commands.items():
            rates[name].append(1 / _seconds(command, folder))
    return [
        {**row, "ours": round(1 / row["ours"], 2), "theirs": round(1 / row["theirs"], 2)}
        | {"unit": "s"}
        for row in ratio_rows(work, rates)
    ]


def _main(peer: str, threads: str, size: str, clone: str) -> None:
    """Print this process's peak memory in MiB after a few steps."""
    import torch

    from benchmarks.material import Material
    from benchmarks.prepare import FULL, SHORT, prepare

    torch.set_num_threads(int(threads))
    with tempfile.TemporaryDirectory() as folder:
        material = Material(ROOT, Path(folder), SHORT if size == "short" else FULL)
        step = prepare(peer, material, MEMORY_WORK, Path(clone) if clone else None)
        if step is None:
            return
        for _ in range(MEMORY_STEPS):
            step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak / 1024 / (1024 if sys.platform == "darwin" else 1))


if __name__ == "__main__":
    _main(*sys.argv[1:])
