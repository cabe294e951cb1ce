"""Which stages to start now, and with how many threads: no processes, no files, no clock."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import networkx as nx

from minimind.orchestrate.graph import longest_paths

# These read code, parameters and data, and find within a minute what is wrong with them: so they
# run before anything is trained.
CHECKING = ("code", "check", "mini_world", "tokenizer", "encode")
# A stage leaves threads to others only if they have so much to do, as a part of its own time. With
# twice the threads a stage is about 1.4 times as fast: one that takes 1 and one that takes w are
# over after (1 + w) / 1.4 one after another, after 1 side by side.
WORTH_SHARING = 0.4


@dataclass(frozen=True)
class Machine:
    """What the running stages divide among them."""

    jobs: int  # stages at most
    threads: int  # not fewer than jobs
    memory_mib: float = float("inf")
    divides_threads: bool = True  # False where each stage has a GPU, and as many threads as others


@dataclass
class Schedule:
    """The state of a run: a stage is waiting, running, done or failed."""

    graph: nx.DiGraph
    machine: Machine
    seconds: Mapping[str, float]  # of past runs, for all stages
    memory_mib: Mapping[str, float]  # likewise
    keep_going: bool = False  # with what does not need a stage that failed
    running: dict[str, int] = field(default_factory=dict)  # threads, by stage
    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        order = list(nx.topological_sort(self.graph))
        self.checking: set[str] = set()
        for name in order:
            is_source = self.graph.in_degree(name) == 0 and name.endswith(".dvc")
            if (is_source or name.rpartition(":")[2].partition("@")[0] in CHECKING) and all(
                needed in self.checking for needed in self.graph.predecessors(name)
            ):
                self.checking.add(name)
        self._after = {name: nx.descendants(self.graph, name) for name in order}
        self._longest = longest_paths(self.graph, self.seconds)

    def ready(self) -> list[str]:
        """Stages that may start, the one with the longest path behind it first."""
        if self.failed and not self.keep_going:
            return []
        over = self.done | self.failed
        names = [
            name
            for name in self.graph
            if name not in over and name not in self.running
            if all(needed in self.done for needed in self.graph.predecessors(name))
        ]
        lost = set().union(*(self._after[name] for name in self.failed))
        if self.checking - over - lost:
            names = [name for name in names if name in self.checking]
        return sorted(names, key=lambda name: (-self._longest[name], name))

    def start(self) -> dict[str, int]:
        """Threads of each stage to be started now; they are running from here on."""
        started: dict[str, int] = {}
        ready = self.ready()
        while ready and self._has_room():
            name = next((name for name in ready if self._fits(name)), None)
            if name is None:
                break
            ready.remove(name)
            started[name] = self.running[name] = self._threads(name, len(ready))
        return started

    def _has_room(self) -> bool:
        threads = sum(self.running.values())
        return len(self.running) < self.machine.jobs and threads < self.machine.threads

    def _fits(self, name: str) -> bool:
        in_use = sum(self.memory_mib[other] for other in self.running)
        return not self.running or in_use + self.memory_mib[name] <= self.machine.memory_mib

    def _threads(self, name: str, num_ready: int) -> int:
        """num_ready: stages that could start beside this one."""
        machine = self.machine
        if not machine.divides_threads:
            return machine.threads // machine.jobs
        free = machine.threads - sum(self.running.values())
        elsewhere = self.graph.nodes - self.done - self.failed - self._after[name] - {name}
        work = sum(self.seconds[other] for other in elsewhere if other not in self.running)
        kept_busy = int(work / (WORTH_SHARING * self.seconds[name]))
        beside = min(num_ready, machine.jobs - len(self.running) - 1, kept_busy)
        return max(1, free // (1 + beside))
