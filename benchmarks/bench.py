"""How fast this is, beside others that do the same work: `make bench`.

    python -m benchmarks.bench --minimind ../minimind     # all works; an hour on two cores
    python -m benchmarks.bench --short --works sft,rollouts
    python -m benchmarks.bench --works sft --profile      # where our own time goes

Each work has a process of its own. Every round lets each peer do one step of it, one after the
other, with the same number of threads; a ratio is taken within a round. Peers: `trl` and `hf`
(TRL's trainers and Hugging Face's generate, in the best settings found), `padded` (a plain float32
loop), and `minimind` (MiniMind's own scripts, given the folder of a clone). Ours runs in bfloat16;
compiled it has rows of its own. Writes benchmarks/results/bench.json.
"""

import argparse
import gc
import multiprocessing
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.limit import matmul_rate, training_operations
from benchmarks.material import SUPERVISED, Material
from benchmarks.peers import Step, ours
from benchmarks.prepare import FULL, SHORT, prepare
from benchmarks.processes import memory_rows, start_rows
from benchmarks.table import SETTINGS, as_text, quartiles, ratio_rows, save
from minimind.compute.compiling import can_compile

ROOT = Path(__file__).parents[1]
WORKS = (*SUPERVISED, "grpo step", "rollouts", "rollouts that end", "memory", "start")
PEERS = ("ours", "ours compiled", "trl", "hf", "padded", "minimind")
# The processor's time says more than the wall's where others use the same cores; but only of one
# thread, since those that wait for each other count as working.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 1  # steps of each peer before the first round


def main() -> None:
    arguments = _parse()
    rows: list[dict[str, Any]] = []
    alone: dict[str, Any] = {}  # figures without a peer
    for work in arguments.works.split(","):
        # A foreign loop keeps its model and optimizer until its process ends.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            more_rows, more_alone = process.submit(_do, work, arguments).result()
        if arguments.profile:
            continue
        rows += more_rows
        alone |= more_alone
        save(arguments.output, rows, _setting(arguments, alone))  # what there is, so far
    if arguments.profile:
        return
    print("\n" + as_text(rows))
    for name, value in alone.items():
        print(f"{name}: {value}")


def _do(work: str, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a work, and figures without a peer; with --profile none."""
    torch.set_num_threads(arguments.threads)
    alone: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        material = Material(ROOT, Path(folder), SHORT if arguments.short else FULL)
        if arguments.profile:
            _profile(ours.prepare(material, work), work)
            return [], alone
        return _measure(material, work, arguments, alone), alone


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="small steps, few rounds: minutes")
    parser.add_argument("--works", default=",".join(WORKS), help="of: %(default)s")
    parser.add_argument("--peers", default="ours,trl,hf,padded,minimind")
    parser.add_argument("--minimind", type=Path, help="the folder of a clone of MiniMind")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="ours compiled, too"
    )
    parser.add_argument("--rounds", type=int, help="default: 7, short: 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: with one thread")
    parser.add_argument("--profile", action="store_true", help="only show where our time goes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/bench.json")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (3 if arguments.short else 7)
    if arguments.compile and not can_compile():
        _say("ours is not compiled: PyTorch cannot do so from a path with spaces")
        arguments.compile = False
    if arguments.clock == "cpu" and arguments.threads > 1:
        parser.error("--clock cpu is for --threads 1: waiting threads would count as working.")
    if unknown := set(arguments.works.split(",")) - set(WORKS):
        parser.error(f"unknown works {sorted(unknown)}; there are: {', '.join(WORKS)}.")
    return arguments


def _measure(
    material: Material, work: str, arguments: argparse.Namespace, alone: dict[str, Any]
) -> list[dict[str, Any]]:
    peers = arguments.peers.split(",")
    if work == "memory":
        return memory_rows(peers, arguments)
    if work == "start":
        return start_rows(ROOT, arguments, alone)
    steps = {}
    for peer in [*peers, *["ours compiled"] * arguments.compile]:
        step = prepare(peer, material, work, arguments.minimind)
        if step is not None:
            _say(f"{work}: {peer} warms up")
            for _ in range(WARM_UP):
                step()
            steps[peer] = step
    rates: dict[str, list[float]] = {peer: [] for peer in steps}
    shares: list[float] = []
    for number in range(arguments.rounds):
        for peer, step in steps.items():
            gc.collect()
            started = CLOCKS[arguments.clock]()
            tokens = step()
            rates[peer].append(tokens / (CLOCKS[arguments.clock]() - started))
        if work == "pretrain":  # at the better of our settings
            rate = matmul_rate(torch.bfloat16, CLOCKS[arguments.clock])
            operations = training_operations(material.config, 1, 1)
            shares.append(
                max(rates[name][-1] for name in SETTINGS if name in rates) * operations / rate
            )
            alone["matmul_gflops_bfloat16"] = round(rate / 1e9)
        shown = ", ".join(f"{peer} {peer_rates[-1]:,.0f}" for peer, peer_rates in rates.items())
        _say(f"{work}: round {number + 1} of {arguments.rounds}, tokens/s: {shown}")
    if shares:
        low, high = quartiles(shares)
        alone["share_of_matmul_limit"] = [round(low, 3), round(high, 3)]
    settings = [name for name in SETTINGS if name in rates]
    rows = [row for ours_name in settings for row in ratio_rows(work, rates, ours_name)]
    return [{**row, "unit": "tokens/s"} for row in rows]


def _profile(step: Step, work: str) -> None:
    from torch.profiler import profile

    step()
    with profile() as profiled:
        step()
    print(work)
    print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


def _setting(arguments: argparse.Namespace, alone: dict[str, Any]) -> dict[str, Any]:
    """What the numbers hold for."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "short": arguments.short,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "clock": arguments.clock,
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "trl", "numpy")},
        "alone": alone,
    }


def _processor() -> str:
    """The processor's name; Linux has it in a file."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(
            line.split(":", 1) for line in info.read_text().splitlines() if line.count(":")
        )
        values = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in values:
            family, model = values.get("cpu family", "?"), values.get("model", "?")
            return f"{values['model name']} (family {family}, model {model})"
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
