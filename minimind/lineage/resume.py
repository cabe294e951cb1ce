"""States to resume from, which outlive any kill: written beside, synced, renamed.

    .resume/<stage>/<fingerprint>/state-<step>/tensors.safetensors, values.json
    .resume/<stage>/<fingerprint>/finished.json      once the stage's outputs are written

DVC deletes a stage's outputs before it runs it, so states cannot lie among them. The
fingerprint covers parameters, inputs and code: a state never meets a run of another kind.
"""

import hashlib
import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from minimind.errors import UserError

STATE_FORMAT = 1  # part of the fingerprint: states of another format are never read
STATES_KEPT = 2
STATE_DAMAGE = (OSError, ValueError, KeyError, SafetensorError)


@dataclass(frozen=True)
class TrainingState:
    """All that the rest of a run depends on."""

    step: int  # optimizer steps done
    tensors: dict[str, Tensor]
    values: dict[str, Any]  # JSON


class ResumeStore:
    """The states of one run; one process at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for parent in list(directory.parents)[:3]:  # .resume/<stage>/ and what holds it
            _sync_directory(parent)
        self._lock = _lock(directory)
        for unfinished in directory.glob("partial-*/"):  # left by a kill, and never read
            shutil.rmtree(unfinished, ignore_errors=True)

    def save(self, state: TrainingState) -> None:
        """Add a state durably.

        Raises:
            UserError: it could not be written; the states before it are untouched.
        """
        final = self.directory / f"state-{state.step:09d}"
        if _is_whole(final):
            return  # of the same run, so of the same content: there is nothing to add
        partial = self.directory / f"partial-{state.step:09d}"
        try:
            _write_state(partial, state)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            raise UserError(
                f"{final} could not be saved: {error}; the state before it, if there is one, is "
                "kept: mend this and run the same command again to go on."
            ) from None
        shutil.rmtree(final, ignore_errors=True)  # damaged, or it would have been enough
        partial.rename(final)
        _sync_directory(self.directory)
        states = self._states()
        kept = [directory for directory in states if directory <= final][-STATES_KEPT:]
        for old in states:
            if old not in kept:  # those of later steps could not be used
                shutil.rmtree(old)

    def load(self) -> tuple[TrainingState | None, list[str]]:
        """The newest state that is whole, and a line for each one that was not."""
        damaged: list[str] = []
        for directory in reversed(self._states()):
            try:
                return _read_state(directory), damaged
            except STATE_DAMAGE as error:
                damaged.append(f"{directory} is damaged ({error}); falling back to the one before")
        return None, damaged

    def finish(self, record: dict[str, Any]) -> None:
        """Mark the run as finished; its last state stays until DVC has recorded the outputs."""
        partial = self.directory / "partial-finished.json"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.directory / "finished.json")
        _sync_directory(self.directory)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        self._lock.release()

    def _states(self) -> list[Path]:
        return sorted(self.directory.glob("state-*"))


def forget_recorded(resume_root: Path, wanted: Path) -> None:
    """Remove the states of finished runs whose outputs DVC has recorded since.

    A finished state is what saves a run that is killed while DVC hashes and records its outputs.
    It has served when dvc.lock names the metrics it led to, or when the temporary copy of the
    project that it ran in is gone.

    wanted: the states of the run that is starting. That DVC starts it again tells that a copy
        which is gone was not recorded.
    """
    recorded = []
    for marker in resume_root.glob("*/*/finished.json"):
        try:
            record = json.loads(marker.read_text(encoding="utf-8"))
            lock = Path(record["folder"]) / "dvc.lock"
            if lock.parent.exists():
                has_served = (
                    lock.exists()
                    and lock.stat().st_mtime_ns >= marker.stat().st_mtime_ns
                    and record["metrics_md5"] in lock.read_text(encoding="utf-8")
                )
            else:
                has_served = marker.parent != wanted
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if has_served:
            recorded.append(marker.parent)
    if recorded and hasattr(os, "sync"):
        os.sync()  # what DVC recorded, which it does not do itself: a power cut must find one
    for directory in recorded:
        try:
            in_use = _lock(directory)
        except (OSError, UserError):
            continue
        shutil.rmtree(directory, ignore_errors=True)
        in_use.release()


def _write_state(directory: Path, state: TrainingState) -> None:
    """All of a state, durably, but for the directory's own name."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    tensors = {name: tensor.detach().cpu() for name, tensor in state.tensors.items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "tensors.safetensors")
    # Not sorted: a resumed curve keeps the order of its columns.
    values = json.dumps({"step": state.step, **state.values})
    with (directory / "tensors.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    # The first line vouches for the second and for the tensors.
    seal = hashlib.sha256((digest + values).encode()).hexdigest()
    with (directory / "values.json").open("w", encoding="utf-8") as text:
        text.write(f"{seal}\n{values}\n")
        text.flush()
        os.fsync(text.fileno())
    _sync_directory(directory)


def _is_whole(directory: Path) -> bool:
    try:
        _read_state(directory)
    except STATE_DAMAGE:
        return False
    return True


def _read_state(directory: Path) -> TrainingState:
    data = (directory / "tensors.safetensors").read_bytes()
    seal, values = (directory / "values.json").read_text(encoding="utf-8").splitlines()
    digest = hashlib.sha256(data).hexdigest()
    if hashlib.sha256((digest + values).encode()).hexdigest() != seal:
        raise ValueError("its checksum is wrong")
    contents = json.loads(values)
    return TrainingState(contents.pop("step"), load(data), contents)


def _lock(directory: Path) -> BaseFileLock:
    """A lock that its process's death releases; beside it stands whose it is."""
    lock, holder = FileLock(directory / "lock", timeout=0), directory / "holder.json"
    try:
        lock.acquire()
    except Timeout:
        try:
            of = json.loads(holder.read_text(encoding="utf-8"))
            who = f"process {of['pid']} on {of['host']} ({of['program']})"
        except (OSError, ValueError, KeyError):  # it is about to be written
            who = "another process"
        raise UserError(
            f"{directory} is in use by {who}; wait for it to end, or stop it."
        ) from None
    of = {"pid": os.getpid(), "host": platform.node(), "program": psutil.Process().name()}
    holder.write_text(json.dumps(of), encoding="utf-8")
    return lock


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
