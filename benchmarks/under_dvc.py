"""Kills of `dvc repro`, of its stages and of experiments: whole processes, none of them warm."""

import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil
import yaml

from benchmarks.tiny_project import dvc, git
from benchmarks.victims import (
    SIGNALS,
    Stage,
    Tally,
    digests,
    newest_checkpoint,
    phase_on_disk,
)

# Who is struck. With dvc alone, the stage has to notice it and to end by itself.
STRUCK = ("dvc and stage", "dvc", "stage")  # the first is the whole process group, as by Ctrl-C
ORPHAN_SECONDS = 60  # to save and to end, on a busy machine
PR_SET_CHILD_SUBREAPER = 36
SETTINGS = {"MINIMIND_SAVE_SECONDS": "0", "MINIMIND_THREADS": "1"}


def become_reaper() -> None:
    """Orphans of a killed dvc become children of this process, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def record(project: Path, stages: Iterable[str]) -> None:
    """Let DVC record the outputs of stages, which lie there, and git what DVC has recorded."""
    dvc(project, "commit", "-f", "-q", *stages)
    git(project, "add", "-A")
    git(project, "commit", "-qm", "run")


def kill_under_dvc(
    project: Path, stage: Stage, num_kills: int, rng: random.Random, tally: Tally
) -> None:
    """Kill `dvc repro` of one stage over and over, then let it end."""
    tally.runs += 1
    shutil.rmtree(project / ".resume", ignore_errors=True)
    forget_recorded(project, stage)
    command = ("repro", "-s", stage.name)
    history = []
    for _ in range(num_kills):
        before = newest_checkpoint(project)
        moment = rng.choice(["start", "step", "commit"])
        struck = rng.choice(STRUCK[: 2 if moment == "commit" else 3])
        blow = f"{struck}, {rng.choice(SIGNALS)}"
        process, log = start_dvc(project, *command)
        hit = strike(project, stage, process, blow, moment, rng, tally)
        note_resumed(stage, before, log.read_text(encoding="utf-8"), False, tally)
        if not hit or process.returncode == 0:
            forget_recorded(project, stage)  # it was faster
            continue
        history.append(f"{blow} in {hit}")
        tally.kills += 1
        tally.phases[hit] += 1
        tally.means[f"under DVC: {blow}"] += 1
        remove_torn_locks(project)
        restore_torn_lock(project, stage)
    before = newest_checkpoint(project)
    process, log = start_dvc(project, *command)
    code, printed = process.wait(), log.read_text(encoding="utf-8")
    note_resumed(stage, before, printed, True, tally)
    status = dvc(project, "status", stage.name)
    if code == 0 and "up to date" in status and digests(project, stage) == stage.whole:
        tally.equal += 1
    else:
        tally.lose(f"{stage.name} under DVC: exit {code} after {history}:\n{printed}\n{status}")


def forget_recorded(project: Path, stage: Stage) -> None:
    """Have DVC run the stage again, its inputs being what they were."""
    shutil.rmtree(project / ".dvc" / "cache" / "runs", ignore_errors=True)
    path = project / "dvc.lock"
    lock = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in (stage.name, "report"):  # which names the metrics of others as recorded
        lock["stages"].pop(name, None)
    path.write_text(yaml.safe_dump(lock, sort_keys=False))


def start_dvc(project: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Start dvc as the leader of a process group; returns it and the file that it prints to."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = project.parent / "dvc.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=project,
            env=os.environ | SETTINGS | {"PATH": path, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, log


def stage_below(process: subprocess.Popen[bytes]) -> psutil.Process | None:
    """The process of the stage that dvc is running."""
    try:
        for child in psutil.Process(process.pid).children(recursive=True):
            if any(part.startswith("stages.") for part in child.cmdline()):
                return child
    except psutil.Error:
        pass
    return None


def strike(
    project: Path,
    stage: Stage,
    process: subprocess.Popen[bytes],
    blow: str,
    moment: str,
    rng: random.Random,
    tally: Tally,
) -> str:
    """Wait for the moment and kill; returns the phase that was hit, or nothing if all was over."""
    running, phase = None, "start"
    wait, since = rng.uniform(0, {"start": 2.5, "step": 0.2, "commit": 0.3}[moment]), 0.0
    while process.poll() is None:
        running = running or stage_below(process)
        is_over = running is not None and not is_alive(running)
        if running is None:
            phase = "start"
        elif is_over:
            phase = "commit"
        else:
            phase = phase_on_disk(project, stage, running.create_time())
        has_come = {
            "start": running is not None,
            "step": is_over or phase != "start",
            "commit": is_over,
        }[moment]
        since = since or (time.monotonic() if has_come else 0.0)
        if since and time.monotonic() - since >= wait:
            break
        time.sleep(0.01)
    else:
        return ""
    struck, name = blow.split(", ")
    if struck == "stage":
        if running is None or is_over:
            process.wait()
            return ""
        running.send_signal(getattr(signal, name))
    elif struck == "dvc":
        process.send_signal(getattr(signal, name))
    else:
        os.killpg(process.pid, getattr(signal, name))
    process.wait()
    if running is not None and not has_ended(running):
        running.kill()
        tally.lose(f"{stage.name}: an orphan after {blow} in {phase}")
    return phase


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def has_ended(process: psutil.Process) -> bool:
    """Wait for a process that may have become ours to end, and reap it if so."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    try:
        while is_alive(process) and time.monotonic() < deadline:
            time.sleep(0.05)
        if is_alive(process):
            return False
        os.waitpid(process.pid, os.WNOHANG)
    except (psutil.NoSuchProcess, ChildProcessError):
        pass
    return True


def note_resumed(
    stage: Stage, before: int | None, printed: str, has_ended: bool, tally: Tally
) -> None:
    """A run goes on from the newest checkpoint there was."""
    said = [line for line in printed.splitlines() if "going on " in line]
    if said:
        tally.resumes += 1
        number = next(word for word in said[0].split() if word.isdigit())
        if before is None or int(number) != before:
            tally.lose(f"{stage.name} went on from {number}, but there was state {before}")
    elif before is not None and has_ended and "is cached - skipping run" not in printed:
        # (DVC may have recorded all of it before it was killed, and bring it back by itself.)
        tally.lose(f"{stage.name} did not go on from state {before}: {printed}")


def remove_torn_locks(project: Path) -> None:
    """DVC's own list of users of paths, which it does not write atomically."""
    path = project / ".dvc" / "tmp" / "rwlock"
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except ValueError:
        print(f"DVC left {path.name} torn; removed, as DVC asks for", flush=True)
        path.unlink()


def restore_torn_lock(project: Path, stage: Stage) -> None:
    """DVC overwrites dvc.lock in place: what a kill has cut off, git brings back."""
    file, own = project / "dvc.lock", (stage.name, "report")
    committed = yaml.safe_load(git(project, "show", "HEAD:dvc.lock"))["stages"]
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"] or {}
    except (yaml.YAMLError, TypeError, KeyError):
        found = {}
    if any(found.get(name) != entry for name, entry in committed.items() if name not in own):
        print(f"DVC left {file.name} torn; git brought it back", flush=True)
        git(project, "checkout", "-q", "dvc.lock")
        forget_recorded(project, stage)


def kill_under_experiments(project: Path, stages: Mapping[str, Stage], tally: Tally) -> None:
    """Kill an experiment in a temporary copy of the project, and one in the queue; run it again.

    stages: those that have been built, sft among them.
    """
    stage = stages["sft"]
    # Long enough for a blow to find it at work.
    change = ("-S", "sft.lr=0.002", "-S", "sft.max_steps=200", "-S", "sft.epochs=100", "sft")

    def start_again() -> None:
        git(project, "checkout", "-q", ".")
        dvc(project, "checkout", "-q", *stages)
        shutil.rmtree(project / ".dvc" / "cache" / "runs", ignore_errors=True)
        shutil.rmtree(project / ".resume", ignore_errors=True)

    def compare(name: str, before: int | None, printed: str, how: str) -> None:
        dvc(project, "exp", "apply", name)
        note_resumed(stage, before, printed, True, tally)
        if digests(project, stage) == whole:
            tally.equal += 1
        else:
            tally.lose(f"{how} ended with other bytes: {printed}")
        start_again()

    def ended(name: str) -> str:
        """What an experiment of the queue printed; `--follow` fails while it is being started."""
        while not re.search(rf"\b{name}\b.*(Success|Failed)", dvc(project, "queue", "status")):
            time.sleep(1)
        return dvc(project, "queue", "logs", name)

    start_again()
    dvc(project, "exp", "run", *change, **SETTINGS)
    whole = digests(project, stage)
    assert whole != stage.whole
    start_again()

    for moment in ("step", "commit"):
        process, _ = start_dvc(project, "exp", "run", "--temp", "-n", f"temp-{moment}", *change)
        blow = "dvc and stage, SIGKILL"
        phase = strike(project, stage, process, blow, moment, random.Random(1), tally)
        tally.kills += 1
        tally.phases[phase] += 1
        tally.means["dvc exp run --temp: SIGKILL"] += 1
        remove_torn_locks(project)
        before = newest_checkpoint(project)
        process, log = start_dvc(project, "exp", "run", "--temp", "-n", f"temp-{moment}", *change)
        process.wait()
        compare(f"temp-{moment}", before, log.read_text(encoding="utf-8"), "dvc exp run --temp")

    dvc(project, "exp", "run", "--queue", "-n", "killed", *change, **SETTINGS)
    starter, _ = start_dvc(project, "queue", "start")  # which may return after the stage has ended
    while newest_checkpoint(project) is None:
        time.sleep(0.005)
    running = next(
        process
        for process in psutil.process_iter(["cmdline", "cwd"])
        if "stages.sft" in (process.info["cmdline"] or [])
        and (process.info["cwd"] or "").startswith(str(project))
    )
    running.kill()
    phase = phase_on_disk(project, stage, running.create_time())
    starter.wait()
    before = newest_checkpoint(project)
    tally.kills += 1
    tally.phases[phase] += 1
    tally.means["queue: stage, SIGKILL"] += 1
    ended("killed")
    dvc(project, "exp", "run", "--queue", "-n", "again", *change, **SETTINGS)
    dvc(project, "queue", "start", **SETTINGS)
    compare("again", before, ended("again"), "the queue")
    dvc(project, "queue", "stop", "--kill")
