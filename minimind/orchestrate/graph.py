"""The graph of stages as DVC has it, by name, and what earlier runs tell of each stage."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import networkx as nx
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.reproduce import collect_stages, get_active_graph

from minimind.errors import UserError
from minimind.lineage.paths import refuse_pipes
from minimind.lineage.records import record_name


def load_graph(repo: Repo, targets: Iterable[str] = ()) -> nx.DiGraph:
    """The targets and all that they need, as `dvc repro` has it; without targets, dvc.yaml.

    Nodes are names, as `encode@sft` or `data/mine.jsonl.dvc`, and hold DVC's own object as `stage`;
    an edge leads from a stage to one that depends on it.

    Raises:
        DvcException: the graph is wrong.
        UserError: there is no such target, or a pipe among files.
    """
    depends = get_active_graph(repo.index.graph)  # frozen stages need nothing
    try:
        wanted = collect_stages(repo, list(targets) or ["dvc.yaml"])
    except DvcException as error:
        raise UserError(f"{error}; `dvc dag` has the names of all stages.") from None
    needed = {stage for end in wanted for stage in (end, *nx.descendants(depends, end))}
    refuse_pipes(needed)
    graph = nx.DiGraph()
    graph.add_nodes_from((stage.addressing, {"stage": stage}) for stage in needed)
    graph.add_edges_from((b.addressing, a.addressing) for a, b in depends.subgraph(needed).edges)
    return graph


def past_runs(graph: nx.DiGraph, runs: Path, key: str) -> dict[str, float]:
    """A number in the records of past runs, by stage: `seconds`, or `peak_memory_mib`."""
    found = {}
    for name in graph:
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads((runs / record_name(name)).read_text(encoding="utf-8"))
            found[name] = float(record[key])
    return found


def longest_paths(graph: nx.DiGraph, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds from the start of each stage to the end of the last one that depends on it."""
    longest: dict[str, float] = {}
    for name in reversed(list(nx.topological_sort(graph))):
        after = (longest[dependent] for dependent in graph.successors(name))
        longest[name] = seconds[name] + max(after, default=0.0)
    return longest
