"""What a workspace knows beside its results: stages and their times, data, running stages."""

import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import yaml
from markupsafe import Markup

from minimind.chat.tokenizer import CONTROL_TOKENS, ChatTokenizer
from minimind.datasets.encoded import EncodedDataset
from minimind.errors import UserError
from minimind.lineage.dvc_files import stages_as_written, value_at, variants
from minimind.lineage.lease import LEASE_SECONDS
from minimind.lineage.records import record_name, record_of
from minimind.params import read_params
from minimind.report.ancestry import git
from minimind.report.drawings import bars, graph_drawing
from minimind.report.page import language
from minimind.report.results import (
    History,
    Results,
    flat,
    of_same_problems,
    read_evaluations,
    read_history,
    read_metrics,
    read_record,
    read_watched,
)

ENCODED = Path("data/encoded")
EVERYWHERE = ("code", "check")  # what every stage depends on
MARKS = {"running": "▶", "stale": "○", "done": "✓"}
ROWS_SHOWN, ROWS_READ, BINS = 10, 500, 24
MASKS = ("", "trained", "tag")  # how the loss mask's values are shown
MOST_EXPERIMENTS, MOST_CHANGES = 20, 8


class Stage(NamedTuple):
    """A stage, and what is recorded of the run that dvc.lock is of, if it was here."""

    name: str
    desc: str
    state: str  # done, stale, running
    why: str
    record: dict[str, Any]


class DataCard(NamedTuple):
    """An encoded data set."""

    name: str
    source: str
    counts: dict[str, Any]  # metrics of its stage
    lengths: Markup
    chinese: float  # share of the rows that were looked at
    rows: list[list[tuple[str, str]]]  # texts, and how the loss mask has them


class Experiment(NamedTuple):
    """An experiment's differences from the workspace: names, values here and there."""

    name: str
    params: list[tuple[str, Any, Any]]
    metrics: list[tuple[str, float, float]]


def read_workspace(root: Path, live: dict[str, History]) -> Results:
    """What there is so far of the results of every stage.

    live: histories of stages that are training, as :func:`live_histories` gives them.
    """
    stages = stages_as_written(root / "dvc.yaml")
    names = variants_of(stages, "evaluate")
    made = [root / f"metrics/evaluate/{name}.json" for name in names]
    there = [p for p in made if p.is_file() and (root / f"predictions/{p.stem}.jsonl").is_file()]
    histories = {name: root / f"history/{name}.csv" for name in stages}
    params = read_params(root / "params.yaml")
    starts = {name: value_at(params, f"{name}.init") for name in stages}
    evaluated = read_evaluations(there, root / "predictions")
    return Results(
        evaluated,
        read_metrics([p for n in stages if (p := root / f"metrics/{n}.json").is_file()]),
        {n: read_history(p) for n, p in histories.items() if p.is_file()} | live,
        {name: Path(start).name for name, start in starts.items() if isinstance(start, str)},
        of_same_problems(read_record(root / "benchmarks/results/claims.json"), evaluated),
        read_watched(root / "history", list(stages)),
    )


def variants_of(stages: Mapping[str, Any], name: str) -> list[str]:
    """Those of a stage of dvc.yaml."""
    return [str(variant) for variant in stages.get(name, {}).get("foreach", ())]


def live_histories(root: Path) -> dict[str, History]:
    """Of each stage that is running, what its newest resume checkpoint has; [] without one."""
    found: dict[str, History] = {}
    for lease in sorted(root.glob(".resume/*/*.lease")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if time.time() - lease.stat().st_mtime > LEASE_SECONDS:
                continue
            stage = found.setdefault(lease.parent.name, [])
            newest = max(lease.with_suffix("").glob("checkpoint-*/values.json"))
            values = json.loads(newest.read_text(encoding="utf-8").split("\n")[1])
            stage += values["history"]["rows"]
    return found


def stages_with_runs(
    root: Path, verdicts: Mapping[str, tuple[str, str]], live: Collection[str]
) -> list[Stage]:
    """The stages of dvc.yaml in its order.

    verdicts: of each, what `minimind plan` says of it, and why.
    """
    found, lock = [], stages_as_written(root / "dvc.lock")
    for name, stage, _ in variants(stages_as_written(root / "dvc.yaml")):
        verdict, why = verdicts.get(name, ("unchanged", ""))
        is_live = record_name(name).removesuffix(".json") in live
        state = "running" if is_live else "done" if verdict == "unchanged" else "stale"
        _, contents = record_of(root, name, lock.get(name, {})) or (None, {})
        found.append(Stage(name, stage.get("desc", ""), state, why, contents))
    return found


def drawn_graph(stages: Sequence[Stage], edges: Iterable[tuple[str, str]]) -> Markup:
    """The stages, variants of one as one node, without what every stage depends on.

    edges: from a stage to one that depends on it.
    """
    groups: dict[str, list[Stage]] = {}
    for stage in stages:
        groups.setdefault(stage.name.partition("@")[0], []).append(stage)
    labels: dict[str, tuple[str, str, str]] = {}
    names: dict[str, str] = {}  # of nodes, by stage
    for name, group in groups.items():
        if name in EVERYWHERE:
            continue
        state = min((stage.state for stage in group), key=[*MARKS].index)
        seconds = sum(stage.record.get("seconds", 0) for stage in group)
        clock = f"{int(seconds) // 60}:{int(seconds) % 60:02d}" if seconds else ""
        label = f"{name} ×{len(group)}" if len(group) > 1 else group[0].name
        labels[label] = (f"{MARKS[state]} {clock}", state, f"#stage-{group[0].name}")
        names |= {stage.name: label for stage in group}
    pairs = {(names[a], names[b]) for a, b in edges if a in names and b in names}
    graph = nx.DiGraph(sorted(pair for pair in pairs if pair[0] != pair[1]))
    if nx.is_directed_acyclic_graph(graph):  # as it is, unless variants depend on one another
        graph = nx.transitive_reduction(graph)
    return graph_drawing(sorted(graph.edges), labels, "graph of stages · 流水线")


def data_cards(root: Path) -> list[DataCard]:
    """Of each data set that is encoded and here."""
    params = read_params(root / "params.yaml")
    cards = []
    for name in variants_of(stages_as_written(root / "dvc.yaml"), "encode"):
        with suppress(UserError, OSError):
            data = EncodedDataset.open(root / ENCODED / name)
            counts = read_metrics([root / f"metrics/encode/{name}.json"])["encode"]
            counts = {key.removeprefix(f"{name}."): value for key, value in counts.items()}
            lengths = np.diff(data.offsets)
            numbers, edges = np.histogram(lengths, BINS)
            tokenizer = ChatTokenizer.load(root / str(value_at(params, "encode.tokenizer")))
            if tokenizer.fingerprint != data.tokenizer:
                continue
            looked_at = np.linspace(0, data.rows - 1, min(ROWS_READ, data.rows)).astype(int)
            texts = [tokenizer.decode(data.row(i)[0]) for i in looked_at]
            chinese = sum(language(text) == "zh" for text in texts) / len(texts)
            chosen = looked_at[:: max(1, len(looked_at) // ROWS_SHOWN)][:ROWS_SHOWN]
            said = f"{lengths.min()}–{lengths.max()} tokens, median {int(np.median(lengths))}"
            rows = [_masked(tokenizer, *data.row(i)) for i in chosen]
            source = str(value_at(params, f"data.{name}"))
            drawing = bars([int(n) for n in numbers], [round(float(e)) for e in edges], said)
            cards.append(DataCard(name, source, counts, drawing, chinese, rows))
    return cards


def _masked(tokenizer: ChatTokenizer, ids: Any, mask: Any) -> list[tuple[str, str]]:
    """A row's text in parts, each with how the loss mask has it."""
    control = dict(
        zip((tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id), CONTROL_TOKENS, strict=True)
    )
    parts: list[tuple[str, str]] = []
    start = 0
    for end in range(1, len(ids) + 1):
        is_alone = int(ids[start]) in control
        if end == len(ids) or mask[end] != mask[start] or is_alone or int(ids[end]) in control:
            text = control.get(int(ids[start])) or tokenizer.decode(ids[start:end])
            parts.append((text, MASKS[mask[start]]))
            start = end
    return parts


def experiments(root: Path) -> Iterator[Experiment]:
    """The newest experiments in git, and how they differ from the workspace."""
    here = flat(read_params(root / "params.yaml"))
    files = sorted((root / "metrics/evaluate").glob("*.json"))
    names = [file.relative_to(root).as_posix() for file in files]
    measured = {name: _numbers((root / name).read_bytes()) for name in names}
    listed = git(root, "for-each-ref", "--sort=-creatordate", "--format=%(refname)", "refs/exps")
    refs = [ref for ref in listed.decode().split() if ref.count("/") == 4]  # baseline and name
    for ref in refs[:MOST_EXPERIMENTS]:
        with suppress(yaml.YAMLError, ValueError):
            there = flat(yaml.safe_load(git(root, "show", f"{ref}:./params.yaml")))
            params = [(k, here.get(k), v) for k, v in there.items() if v != here.get(k)]
            changes = [
                (key, old, new)
                for name in names
                for key, new in _numbers(git(root, "show", f"{ref}:./{name}")).items()
                if (old := measured[name].get(key, new)) != new
            ]
            changes.sort(key=lambda change: -abs(change[2] - change[1]))
            yield Experiment(ref.rpartition("/")[2], params, changes[:MOST_CHANGES])


def _numbers(text: bytes) -> dict[str, float]:
    """Shares of right answers, by checkpoint and measure."""
    leaves = flat(json.loads(text)) if text else {}
    return {k: v for k, v in leaves.items() if k.split(".")[-1].startswith(("exact", "choice"))}
