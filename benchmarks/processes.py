"""What only a process of its own can tell: its peak memory, and how long it takes to start."""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.table import ratio_rows

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


def start_rows(root: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds until a training command has read its arguments: all that it imports."""
    commands = {"ours": [sys.executable, "-m", "stages.sft", "--help"]}
    if "trl" in arguments.peers.split(","):
        commands["trl"] = [sys.executable, "-c", "from trl import SFTTrainer"]
    if arguments.minimind:
        script = arguments.minimind / "trainer/train_full_sft.py"
        commands["minimind"] = [sys.executable, str(script), "--help"]
    rows = _timed("start", commands, root, arguments.rounds)
    if subprocess.run(["dvc", "status", "-q"], cwd=root, capture_output=True).returncode == 0:
        # DVC itself is what it is compared with: nothing of ours runs.
        commands = {"ours": ["dvc", "repro"], "dvc": ["dvc", "--version"]}
        rows += _timed("no-op of the graph", commands, root, arguments.rounds)
    return rows


def _timed(work: str, commands: dict[str, list[str]], root: Path, rounds: int) -> Any:
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, cwd=root, capture_output=True, check=True)
            rates[name].append(1 / (time.perf_counter() - started))
    return [
        {**row, "ours": round(1 / row["ours"], 2), "theirs": round(1 / row["theirs"], 2)}
        | {"unit": "s"}
        for row in ratio_rows(work, rates)
    ]


def _main(peer: str, threads: str, size: str, clone: str) -> None:
    """Print this process's peak memory in MiB after a few steps."""
    import torch

    from benchmarks.bench import FULL, ROOT, SHORT, prepare
    from benchmarks.material import Material

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
