"""Stages of DVC's graph side by side, each in a process of `dvc repro --single-item`.

DVC reads and writes dvc.lock under the repository's lock, which it releases while a command runs;
so several processes share a workspace, and each tries the run cache first, as always.
"""

import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from dvc.exceptions import DvcException
from dvc.repo import Repo, lock_repo
from filelock import FileLock, Timeout

from minimind.compute.launch import other_machines
from minimind.compute.settings import load_settings
from minimind.errors import UserError
from minimind.lineage.records import refuse_false_entry
from minimind.lineage.repository import said_by_dvc
from minimind.orchestrate.display import Display
from minimind.orchestrate.graph import load_graph, past_runs
from minimind.orchestrate.machine import gpus, machine
from minimind.orchestrate.process import StageProcess
from minimind.orchestrate.scheduler import Schedule
from minimind.orchestrate.values import refuse_values
from minimind.terminal.signals import StopRequest

POLL_SECONDS = 0.1
UNKNOWN_MIB = 2048.0  # of a stage that has not run: what any takes in the built-in chain
BUSY_SECONDS = 1.0  # before DVC is asked again for what another of its processes uses


class Outcome(NamedTuple):
    """What became of a stage that DVC was started for."""

    stage: str
    how: str  # ran, from cache, unchanged, failed or stopped
    seconds: float


@dataclass
class Report:
    """What became of all."""

    outcomes: list[Outcome] = field(default_factory=list)
    num_unchanged: int = 0
    failures: list[str] = field(default_factory=list)  # a line for each
    exit_code: int = 0  # of a signal
    tracked: set[str] = field(default_factory=set)  # paths for git that may have changed


def reproduce(
    targets: Sequence[str] = (),
    jobs: int | None = None,
    force: bool = False,
    keep_going: bool = False,
) -> Report:
    """Run what is out of date of the targets and what they need, as `dvc repro` does.

    jobs: stages at a time; None for as many as the machine has GPUs, or physical cores.
    force: run all of them; keep_going: after a failure, with what does not depend on it.

    Raises:
        UserError: there is no such project or target, or its stages are run elsewhere already.
    """
    logging.getLogger("dvc").setLevel(logging.CRITICAL)  # its processes say it in their logs
    try:
        repo = Repo(_wait_for_lock=True)
        with FileLock(Path(repo.tmp_dir) / "minimind-repro.lock", timeout=0):
            return _Reproduction(repo, targets, jobs, force, keep_going).run()
    except Timeout:
        raise UserError(
            "another `minimind repro` runs in this project; wait for it to end, or stop it."
        ) from None
    except DvcException as error:
        raise said_by_dvc(error) from None


class _Reproduction:
    def __init__(
        self, repo: Repo, targets: Sequence[str], jobs: int | None, force: bool, keep_going: bool
    ) -> None:
        self.repo, self.force = repo, force
        self.root = Path(os.path.relpath(repo.root_dir))
        self.settings = load_settings()
        self.free_gpus = [] if self.settings.launcher else gpus(self.settings)
        with lock_repo(repo):
            graph = load_graph(repo, targets)
        self.stages: dict[str, Any] = dict(graph.nodes("stage"))
        seconds = past_runs(graph, self.root / "runs", "seconds")
        memory = past_runs(graph, self.root / "runs", "peak_memory_mib")
        typical, most = median(seconds.values() or [1.0]), max([UNKNOWN_MIB, *memory.values()])
        self.schedule = Schedule(
            graph,
            # Several machines meet in one stage at a time.
            machine(self.settings, 1 if other_machines() else jobs, len(self.free_gpus)),
            {name: max(0.1, seconds.get(name, typical)) for name in graph},
            {name: memory.get(name, most) for name in graph},
            keep_going,
        )
        # To be given to DVC, which looks again: stages that surely are out of date, or were seen to
        # be when all that they depend on was there.
        self.changed = {
            name
            for name, stage in self.stages.items()
            if force or not all(out.exists for out in stage.outs)
        }
        self.running: dict[str, StageProcess] = {}
        self.report = Report()

    def run(self) -> Report:
        stop = StopRequest()
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            # As in the background of a script: stages would inherit that, and never hear of a stop.
            signal.signal(signal.SIGINT, lambda *_: None)
        try:
            with Display() as display:
                self._run(display, stop)
        except KeyboardInterrupt:  # the second: the first one is a request
            for stage in self.running.values():
                stage.end(signal.SIGKILL)
        finally:
            for stage in self.running.values():
                stage.end()
            stop.restore()
        self.report.exit_code = stop.exit_code if stop.requested else 0
        return self.report

    def _run(self, display: Display, stop: StopRequest) -> None:
        has_said = False
        while True:
            if not stop.requested:
                self._skip_unchanged()
                if not self.running and not self.report.outcomes and self.schedule.ready():
                    refuse_values(self.root, self.stages.values())
                for name, threads in self.schedule.start().items():
                    self._start(name, threads)
                    display.started(self.running[name])
            elif not has_said and self.running:
                display.say("stopping: running stages save what they have; again: at once")
                has_said = True
            if not self.running:
                return
            time.sleep(POLL_SECONDS)
            over = len(self.schedule.done | self.schedule.failed)
            display.show(self.running.values(), over, len(self.stages))
            for stage in list(self.running.values()):
                if stop.requested:
                    stage.send(signal.SIGINT)
                if stage.process.poll() is not None:
                    self._end(stage, display, stop.requested)

    def _skip_unchanged(self) -> None:
        """Stages that may start and have not changed are done, and so may be those behind them."""
        if not (unknown := self._unknown()):
            return
        with lock_repo(self.repo):
            stages = {stage.addressing: stage for stage in self.repo.index.stages}
            while unknown:
                for name in unknown:
                    if _has_changed(stages[name]):
                        self.changed.add(name)
                    else:
                        self.schedule.done.add(name)
                        self.report.num_unchanged += 1
                unknown = self._unknown()

    def _unknown(self) -> list[str]:
        return [name for name in self.schedule.ready() if name not in self.changed]

    def _start(self, name: str, threads: int) -> None:
        each = str(max(1, threads // self.settings.processes))
        environment = {"OMP_NUM_THREADS": each, "RAYON_NUM_THREADS": each, "MINIMIND_THREADS": ""}
        if self.settings.launcher and name not in self.schedule.checking:
            environment = {}  # what there is to divide here is nothing to where it goes
        if self.settings.processes > 1 and not other_machines():
            environment["PET_STANDALONE"] = "1"  # torchrun's default port is one for all
        if self.free_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.free_gpus.pop(0)
        log = self.root / "runs" / "logs" / f"{name.replace('/', '-').replace('@', '-')}.log"
        self.running[name] = StageProcess(name, log, threads, environment, self.force)

    def _end(self, stage: StageProcess, display: Display, stopping: bool) -> None:
        if stage.met_another and not stopping:
            time.sleep(BUSY_SECONDS)
            stage.begin()
            return
        name, how, said = stage.stage, stage.outcome, stage.last_line()
        if how == "ran":
            try:
                with lock_repo(self.repo):
                    refuse_false_entry(self.root, name)
            except UserError as error:
                how, said = "failed", str(error)
        elif how == "failed" and stopping:
            how = "stopped"
        del self.running[name], self.schedule.running[name]
        if "CUDA_VISIBLE_DEVICES" in stage.environment:
            self.free_gpus.append(stage.environment["CUDA_VISIBLE_DEVICES"])
        if how in ("failed", "stopped"):
            self.schedule.failed.add(name)
        else:
            self.schedule.done.add(name)
            self.report.tracked |= self._tracked(self.stages[name])
        if how == "failed":
            self.report.failures.append(f"{name} failed: {said} ({stage.log})")
        outcome = Outcome(name, how, stage.seconds)
        self.report.outcomes.append(outcome)
        display.say(f"{name}: {how}, {outcome.seconds:.1f} s", how)

    def _tracked(self, stage: Any) -> set[str]:
        """Folders and files for git that running a stage may change, as seen from here."""
        file = Path(stage.relpath)
        paths = [out.fs_path for out in stage.outs if not out.use_cache]
        below = (Path(os.path.relpath(path, self.repo.root_dir)) for path in paths)
        tops = {str(self.root / path.parts[0]) for path in below}
        return {str(file if file.suffix == ".dvc" else file.with_name("dvc.lock")), *tops}


def _has_changed(stage: Any) -> bool:
    try:
        return stage.changed()
    except DvcException:  # in use by another process, or wrong: its own process waits, or says so
        return True
