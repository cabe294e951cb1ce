"""How long planned stages take, and what memory and disk: by past runs, or by estimates."""

import heapq
import platform
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import networkx as nx
import torch

from minimind.lineage.dvc_files import stages_as_written
from minimind.lineage.records import record_of
from minimind.orchestrate.estimate import MIB, TRAINED, Estimate, Estimates
from minimind.orchestrate.graph import longest_paths, past_runs

# FLOP/s of 16-bit matmuls, by the makers' data sheets, without sparsity.
DEVICES = {
    "t4": 65e12,
    "rtx3090": 71e12,
    "l4": 121e12,
    "rtx4090": 165e12,
    "a100": 312e12,
    "h100": 989e12,
}
DEVICES["cuda"] = DEVICES["rtx3090"]
REACHED = 0.35  # share of that which training is assumed to reach


@dataclass(frozen=True)
class Cost:
    """What a stage takes; None where nothing tells."""

    seconds: float | None = None
    memory: float | None = None  # bytes
    disk: float = 0.0
    estimate: Estimate | None = None


def recorded_params(graph: nx.DiGraph) -> dict[str, Any]:
    """What dvc.lock says of parameters, as a tree. To be asked before stages are planned."""
    tree: dict[str, Any] = {}
    for stage in nx.get_node_attributes(graph, "stage").values():
        for dep in stage.params:
            for key, value in (dep.hash_info.value or {}).items():
                *sections, last = key.split(".")
                place = tree
                for section in sections:
                    place = place.setdefault(section, {})
                place[last] = value
    return tree


def costs(
    graph: nx.DiGraph,
    stages: Collection[str],
    root: Path,
    now: Mapping[str, Any],
    then: Mapping[str, Any],
    device: str,
    flops: float | None,
) -> dict[str, Cost]:
    """What each of these stages takes.

    A past run counts with the ratio of the estimates with the parameters of now and of then.

    device: cpu, or a key of DEVICES. flops: FLOP/s that are reached, if they are known.
    """
    on_cpu = device == "cpu"
    seconds = past_runs(graph, root / "runs", "seconds")
    memory = past_runs(graph, root / "runs", "peak_memory_mib")
    before = _estimates(Estimates(root, then, then), seconds)
    after = _estimates(Estimates(root, now, then, on_cpu), stages)
    if not flops and not on_cpu:
        flops = DEVICES[device] * REACHED
    past_flops = [before[stage].flops / seconds[stage] for stage in before if seconds[stage]]

    def cost(stage: str) -> Cost:
        took, needed = seconds.get(stage), memory.get(stage)
        needed = needed and needed * MIB
        outs = graph.nodes[stage]["stage"].outs
        estimate, past = after.get(stage), before.get(stage)
        if estimate is None:
            return Cost(took, needed, float(sum(out.meta.size or 0 for out in outs)))
        if flops or not took or not past:
            took = estimate.flops / (flops or (median(past_flops) if past_flops else _cpu_flops()))
            took = took if on_cpu else max(took, estimate.least_seconds)
        else:
            took *= estimate.flops / past.flops
        ratio = estimate.peak / past.peak if past else 1.0
        needed = needed * ratio if on_cpu and needed and past else estimate.peak
        return Cost(took, needed, estimate.disk, estimate)

    return {stage: cost(stage) for stage in stages}


def shares_of_limit(graph: nx.DiGraph, root: Path, params: Mapping[str, Any]) -> dict[str, float]:
    """Of each stage that was trained on this machine's CPU: what it reached of the limit.

    Estimated operations in the time of its steps, over those of the fastest product of two large
    matrices, measured now with as many threads. Validation takes time, and no operations.
    """
    shares, limits = {}, dict[int, float]()
    lock = stages_as_written(root / "dvc.lock")
    for stage, estimate in _estimates(Estimates(root, params, params), graph).items():
        with suppress(OSError, ValueError, LookupError, TypeError):
            _, record = record_of(root, stage, lock[stage]) or (None, {})
            here = {"device": "cpu", "host": platform.node(), "processes": 1}
            if record.items() >= here.items():
                threads = record["threads"]
                limits[threads] = limits.get(threads) or _fastest_product(threads)
                shares[stage] = estimate.flops / record["training_seconds"] / limits[threads]
    return shares


def makespan(graph: nx.DiGraph, seconds: Mapping[str, float], jobs: int) -> float:
    """Seconds until all stages are done, `jobs` at a time, the longest remaining path first."""
    remaining = longest_paths(graph, dict(seconds))
    missing = dict(graph.in_degree())
    ready = [(-remaining[name], name) for name in graph if not missing[name]]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    clock = 0.0
    while ready or running:
        while ready and len(running) < jobs:
            name = heapq.heappop(ready)[1]
            heapq.heappush(running, (clock + seconds[name], name))
        clock, name = heapq.heappop(running)
        for dependent in graph.successors(name):
            missing[dependent] -= 1
            if not missing[dependent]:
                heapq.heappush(ready, (-remaining[dependent], dependent))
    return clock


def critical_path(graph: nx.DiGraph, seconds: Mapping[str, float]) -> list[str]:
    """The stages of the longest path, without those that take no time."""
    remaining = longest_paths(graph, dict(seconds))
    path, following = [], list(graph)
    while following:
        path.append(max(following, key=remaining.__getitem__))
        following = list(graph.successors(path[-1]))
    return [name for name in path if seconds[name]]


def _estimates(estimates: Estimates, stages: Iterable[str]) -> dict[str, Estimate]:
    """Of those stages that train, as far as parameters and files are as they must be."""
    found = {}
    for stage in stages:
        if stage in TRAINED:
            with suppress(LookupError, TypeError, ValueError, OSError):
                found[stage] = estimates.of(stage)
    return found


def _cpu_flops() -> float:
    """FLOP/s that training is assumed to reach here, by a short measurement."""
    return REACHED * _fastest_product(torch.get_num_threads())


def _fastest_product(threads: int) -> float:
    """FLOP/s of a product of two large matrices, in whichever number format is faster.

    By the time of the threads: others on the machine change it little.
    """
    before, speeds = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(1024, 1024, dtype=dtype)
        for _ in range(4):  # the first time it prepares
            start = time.process_time()
            matrix @ matrix
            speeds.append(2 * 1024**3 * threads / (time.process_time() - start))
    torch.set_num_threads(before)
    return max(speeds)
