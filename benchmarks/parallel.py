"""`minimind repro` beside `dvc repro`: the whole chain, its time against what it cannot be under.

    python -m benchmarks.parallel                       # two cores: 45 minutes a round
    python -m benchmarks.parallel --tiny lora reward    # to try it: the targets alone, tiny numbers

Every run is of a clone of the last commit, with an empty cache. In each round the ways take turns:
`dvc repro` with all threads, with one thread, `minimind repro`. The first two tell how long each
stage takes, and with that what no schedule can be faster than. The record has medians of rounds.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

import networkx as nx
import psutil
import yaml
from dvc.repo import Repo

from benchmarks.tiny_project import ROOT, copy_project
from minimind.orchestrate.graph import load_graph

RESULTS = ROOT / "benchmarks" / "results" / "parallel.json"


class Run(NamedTuple):
    """One run of the chain."""

    seconds: float
    stages: dict[str, float]  # seconds; empty where several ran at a time
    outputs: dict[str, str]  # MD5 by path


def bound(
    graph: nx.DiGraph, one: Mapping[str, float], every: Mapping[str, float], threads: int
) -> float:
    """Seconds that no schedule of the stages can be under.

    A stage takes `one` seconds with one thread and `every` with all, which makes better use of
    fewer threads. Any path to a stage `w` takes its time; only what does not need `w` can run
    beside it, and beside its beginning, up to `v`, only what does not need `v` either. Where
    something does, the path has a thread less. The rest and what needs `w` take all threads.
    """
    paths: dict[str, list[str]] = {}  # the longest that ends with a stage
    for name in nx.topological_sort(graph):
        before = max(
            (paths[needed] for needed in graph.predecessors(name)),
            key=lambda path: sum(one[stage] for stage in path),
            default=[],
        )
        paths[name] = [*before, name]
    return max(
        _bound(graph, path, split, one, every, threads)
        for path in paths.values()
        for split in range(len(path))
    )


def _bound(
    graph: nx.DiGraph,
    path: list[str],
    split: int,
    one: Mapping[str, float],
    every: Mapping[str, float],
    threads: int,
) -> float:
    def work(names: set[str]) -> float:
        return sum(one[name] for name in names)

    after = nx.descendants(graph, path[-1])
    late = (nx.descendants(graph, path[split]) - after).difference(path)
    anytime = set(graph) - after - late - set(path)
    alone, fast = work(set(path)), sum(every[name] for name in path)
    beside = min(work(late), (threads - 1) * work(set(path[split + 1 :])))
    beside += min(work(anytime), (threads - 1) * alone - beside)
    rest = work(late | anytime) - beside
    # `beside` fills the other threads for beside / (threads - 1) seconds of the path with one.
    slower = beside / max(1, threads - 1) * (1 - fast / alone)
    return fast + slower + (rest + work(after)) / threads


def run_chain(project: Path, command: list[str], threads: int) -> Run:
    """Run the chain in a project where nothing has run."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MINIMIND_", "PYTHON"))
    }
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept["OMP_NUM_THREADS"] = str(threads)
    begun, stages, name = time.monotonic(), {}, ""
    since, lines = begun, []
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=project,
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.startswith(("Running stage '", "Stage '", "Use `dvc push`")):
            now = time.monotonic()
            if name:
                stages[name] = now - since
            since, name = now, line.split("'")[1] if "'" in line else ""
    if process.wait():
        raise RuntimeError(f"{command} in {project}:\n{''.join(lines[-20:])}")
    seconds = time.monotonic() - begun
    lock = yaml.safe_load((project / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    outputs = {out["path"]: out["md5"] for entry in lock.values() for out in entry.get("outs", [])}
    return Run(seconds, stages, outputs)


def clone(directory: Path, tiny: bool) -> Path:
    """The last commit, without what its stages have written to folders that git does not know."""
    if tiny:
        return copy_project(directory)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(directory)], check=True)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", help="stages; all by default")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--tiny", action="store_true", help="the numbers of preset tiny")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    threads, targets = options.jobs, options.targets
    ways = {
        "serial": (["dvc", "repro", *targets], threads),
        "one thread": (["dvc", "repro", *targets], 1),
        "parallel": (["minimind.cli.main", "repro", "-j", str(options.jobs), *targets], threads),
    }
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for way in list(ways)[:: (-1) ** number]:
                project = clone(Path(folder, f"{way}-{number}".replace(" ", "-")), options.tiny)
                runs[way].append(run_chain(project, *ways[way]))
                print(f"{way}: {runs[way][-1].seconds:.1f} s", flush=True)
        here = Path.cwd()
        os.chdir(project)
        graph = load_graph(Repo(), targets)
        os.chdir(here)
    one, every = (
        {name: max(0.01, median(run.stages[name] for run in runs[way])) for name in graph}
        for way in ("one thread", "serial")
    )
    seconds = {way: median(run.seconds for run in done) for way, done in runs.items()}
    limit = bound(graph, one, every, threads)
    first = runs["serial"][0].outputs
    record = {
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "jobs": options.jobs,
        "rounds": options.rounds,
        "load": round(psutil.getloadavg()[0], 1),
        "seconds": {way: round(value, 1) for way, value in seconds.items()},
        "ratio": round(seconds["parallel"] / seconds["serial"], 3),
        "bound": round(limit / seconds["serial"], 3),
        "over_bound": round(seconds["parallel"] / limit, 3),
        "same_bytes": all(run.outputs == first for done in runs.values() for run in done),
        "stages": {n: {"one": round(one[n], 1), "all": round(every[n], 1)} for n in sorted(graph)},
    }
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in record.items() if k != "stages"}, indent=2))


if __name__ == "__main__":
    main()
