"""One execution of a training stage: device, signals, resume checkpoints, provenance and record."""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minimind.compute.cluster import place_in_cluster
from minimind.compute.device import prepare_device
from minimind.compute.launch import is_worker, launch, other_machines
from minimind.compute.matmuls import matmuls_in_float32
from minimind.compute.processes import Processes, join_processes, leave_processes
from minimind.compute.settings import RuntimeSettings, load_settings
from minimind.errors import Stopped, UserError
from minimind.lineage.dvc_files import md5_of_file
from minimind.lineage.dvc_process import is_elsewhere
from minimind.lineage.provenance import Provenance
from minimind.lineage.records import Records
from minimind.lineage.resume import (
    CHECKPOINT_FORMAT,
    ResumeCheckpoint,
    ResumeStore,
    forget_recorded,
)
from minimind.lineage.shared_resume import SharedStore
from minimind.params import Section
from minimind.terminal.elsewhere import run_elsewhere
from minimind.terminal.progress import Progress, clock
from minimind.terminal.signals import StopRequest
from minimind.terminal.trackers import Trackers, start_trackers

# Times what saving took the last time, before the next one: it costs 1 % of training at most.
SAVE_SPACING = 100
RECORDED_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "dvc")


@dataclass
class Run:
    """What a training loop asks of its surroundings."""

    stage: str
    settings: RuntimeSettings
    device: torch.device
    stop: StopRequest
    store: ResumeStore | None = None  # None: nothing is saved to go on from
    processes: Processes = field(default_factory=Processes)
    seed: int | None = None  # for people; what is drawn has it from its own section
    trackers: Trackers | None = None
    record: dict[str, Any] = field(default_factory=dict)
    last_record: dict[str, Any] = field(default_factory=dict)  # of the stage's run before

    @classmethod
    def alone(cls) -> "Run":
        """Of a library call, outside of any graph: nothing is saved, no signal is listened to."""
        settings = load_settings()
        return cls("fit", settings, prepare_device(settings), StopRequest(listening=False))

    def announce(self, parameters: int, steps: int, tokens: int | None, dtype: str) -> None:
        """What will be trained, and on what, in a line.

        parameters, steps, tokens: how many; tokens None where nobody knows beforehand.
        """
        self.record["parameters"] = parameters
        counts = {"parameters": parameters, "steps": steps, "tokens": tokens}
        said = [] if self.seed is None else [f"seed {self.seed}"]
        said += [f"{count:,} {name}" for name, count in counts.items() if count is not None]
        world = self.processes.world
        said.append(f"{dtype} on {self.device.type}" + f" in {world} processes" * (world > 1))
        if seconds := self._expected_seconds(counts):
            said.append(f"about {clock(seconds)}, as the last time")
        self.say(", ".join(said))

    def _expected_seconds(self, counts: Mapping[str, int | None]) -> float | None:
        """By the speed of the stage's run before, if that was computed alike."""
        before, unit = self.last_record, "steps" if counts["tokens"] is None else "tokens"
        kind = {"parameters": counts["parameters"], **self.computed_with()}
        if any(before.get(name) != value for name, value in kind.items()) or not before.get(unit):
            return None
        return (counts[unit] or 0) * before["training_seconds"] / before[unit]

    def progress(self, num_steps: int, first_step: int, tokens_left: int | None = None) -> Progress:
        silent, log_seconds = not self.processes.is_main, self.settings.log_seconds
        return Progress(self.stage, num_steps, first_step, tokens_left, log_seconds, silent)

    def log(self, row: Mapping[str, float]) -> None:
        """A row of the history, for those who track it."""
        if self.trackers is not None:
            values = {f"{self.stage}/{k}": v for k, v in row.items() if k != "step"}
            self.trackers.log(values, int(row["step"]))

    def say(self, message: str) -> None:
        if self.processes.is_main:
            print(f"{self.stage}: {message}", file=sys.stderr, flush=True)

    def computed_with(self) -> dict[str, Any]:
        """Whatever may change the last bits of a result, and is not tracked."""
        return {
            "device": self.device.type,
            "processes": self.processes.world,
            "shard": self.settings.shard and self.processes.world > 1,
            "threads": torch.get_num_threads(),
            "compile": self.settings.compile,
            "matmul_precision": torch.get_float32_matmul_precision(),
            "cpu_matmuls_in_float32": matmuls_in_float32(),
            "torch": torch.__version__,
            "processor": torch.backends.cpu.get_cpu_capability(),
        }

    def is_save_due(self, last_save: float, save_seconds: float) -> bool:
        """Whether to save a state: last_save is when, save_seconds how long it took."""
        between = self.settings.save_seconds
        if between:  # 0 asks for every step, whatever that costs
            between = max(between, SAVE_SPACING * save_seconds)
        return time.monotonic() - last_save >= between

    def agree(self, is_save_due: bool) -> tuple[bool, bool]:
        """Whether to stop here, and whether to save: for all processes what one of them wants."""
        signal, due = self.processes.largest(self.stop.signal, is_save_due)
        self.stop.signal = self.stop.signal or signal  # a signal that another process got
        return signal != 0, bool(due)

    def raise_if_stopped(self, where: str) -> None:
        """For stages of one process; many have to :meth:`agree` first."""
        if self.stop.requested:
            raise self.stopped(where)

    def stopped(self, where: str) -> Stopped:
        return Stopped(
            f"asked to stop; resume checkpoint saved {where}. Run the same command again to go on.",
            self.stop.exit_code,
        )


@dataclass(kw_only=True)
class StageRun(Run):
    """The run of a stage in the graph: what it is made from is pinned until it is recorded."""

    store: ResumeStore
    provenance: Provenance
    records: Records
    metrics_md5: str = ""  # of the metrics file, once the outputs are written
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def saving(self, metrics: Path) -> Iterator[None]:
        """Around the writing of outputs: what made them must be what the stage started with.

        Of many processes one writes; the others wait for it here, and end. By the file `metrics` a
        later run knows that DVC recorded this one.
        """
        if not self.processes.is_main:
            self.processes.wait()
            leave_processes()
            raise SystemExit(0)
        self.provenance.check()
        yield
        self.provenance.check()
        self.raise_if_stopped("at the last step")
        self.metrics_md5 = md5_of_file(metrics)
        self.store.finish({"folder": str(Path.cwd()), "metrics_md5": self.metrics_md5})
        self.processes.wait()

    def seal(self) -> None:
        """The last act of a run that has written its outputs: its record, and a last check.

        Raises:
            UserError: what it was made from was edited; DVC then records nothing.
        """
        record = {
            "seconds": round(time.monotonic() - self.started, 2),
            **self.record,
            **self.computed_with(),
            "host": platform.node(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in RECORDED_PACKAGES},
            "metrics_md5": self.metrics_md5,
        }
        # By DVC's name, if it has one: the graph in tools/ has another sft.
        self.provenance.seal(self.records, self.records.stage or self.stage, record)


def newest_checkpoint(run: Run) -> ResumeCheckpoint | None:
    """The newest one that is whole, to go on from; those that are damaged are named."""
    state, damaged = run.store.load() if run.store is not None else (None, [])
    for line in damaged:
        run.say(line)
    return state


@contextmanager
def start_run(
    stage: str,
    params: Path,
    sections: Mapping[str, Section],
    inputs: Sequence[Path],
    code: str | None = None,
    saves_states: bool = True,
    many_processes: bool = False,
) -> Iterator[StageRun]:
    """Begin a stage: pin what it depends on, find its states, listen to signals.

    sections, inputs: of the params file, by name, and files and folders, that decide the result.
    code: the module in stages/, if it is not called as the stage.
    saves_states: whether the stage looks at `run.stop` and saves what it has, or stops at once.
    many_processes: whether the stage divides its work among processes, where there are some.
    """
    settings = load_settings()
    if not many_processes:
        _go_elsewhere(stage, settings)
        if (place := place_in_cluster()) and place.rank:
            raise SystemExit(0)  # the first of them does the work
    stop = StopRequest(at_once=not saves_states)
    device = prepare_device(settings)
    processes = join_processes(device)
    if processes.world > 1 and not many_processes:
        raise UserError(f"the stage {stage} runs in one process; start it without torchrun.")
    records = Records(settings.root, settings.dvc_stage)
    if processes.is_main:
        records.refuse_false_lock()
    provenance = Provenance(code or stage, inputs, params, sections, bool(settings.dvc_stage))
    identity = {
        "checkpoint_format": CHECKPOINT_FORMAT,
        "stage": stage,
        "params": {name: section.model_dump(mode="json") for name, section in sections.items()},
        **provenance.identity(),
    }
    text = json.dumps(identity, sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    if len({*processes.gather(fingerprint)}) > 1:
        raise UserError("the machines have not the same code, parameters and inputs.")
    states = settings.root / ".resume" / stage / fingerprint
    if processes.is_main:
        forget_recorded(settings.root / ".resume", wanted=states)
    told: set[str] = set()

    def wait(holder: str) -> None:
        if stop.requested:
            raise Stopped("stopped while waiting. Run the same command again.", stop.exit_code)
        if holder not in told:
            line = f"{stage}: waiting for {holder}, which runs the same, to go on from what it has"
            print(line, file=sys.stderr, flush=True)
        told.add(holder)

    check, many = provenance.check_inputs, processes.world > 1
    store = SharedStore(states, check, processes) if many else ResumeStore(states, check, wait)
    run = StageRun(
        stage,
        settings,
        device,
        stop,
        store=store,
        processes=processes,
        seed=next((s.seed for s in sections.values() if hasattr(s, "seed")), None),
        last_record=records.last(records.stage or stage),
        provenance=provenance,
        records=records,
    )
    if processes.is_main:
        run.trackers = start_trackers(settings, stage, fingerprint, sections, run.say)
    try:
        try:
            yield run
            if not settings.dvc_stage:
                store.remove()  # nothing will record the outputs, so there is nothing to wait for
            leave_processes()
        finally:
            store.close()
            if run.trackers is not None:
                run.trackers.close()
        if run.metrics_md5:
            run.seal()
        if settings.dvc_stage:
            run.raise_if_stopped("at the last step")
    finally:
        stop.restore()


def start_training(
    stage: str,
    params: Path,
    sections: Mapping[str, Section],
    inputs: Sequence[Path],
    code: str | None = None,
) -> AbstractContextManager[StageRun]:
    """As :func:`start_run`, in as many processes as are asked for.

    The first one then only starts the others under torchrun, waits for them, and exits.
    """
    settings = load_settings()
    _go_elsewhere(stage, settings)
    num_processes = settings.processes
    if place := place_in_cluster():
        if "processes" not in settings.model_fields_set:
            num_processes = place.num_gpus
        os.environ.update(place.torchruns_variables(num_processes))
    if (num_processes > 1 or other_machines()) and not is_worker():
        raise SystemExit(launch(stage, num_processes))
    return start_run(stage, params, sections, inputs, code, many_processes=True)


def _go_elsewhere(stage: str, settings: RuntimeSettings) -> None:
    """Where a launcher is asked for, let it run this stage, and exit with its exit code."""
    if settings.launcher and not is_elsewhere():
        name = settings.dvc_stage.rpartition(":")[2] or stage
        raise SystemExit(run_elsewhere(name, settings))
