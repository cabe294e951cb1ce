"""States to resume from, which outlive any kill: written beside, synced, renamed.

    .resume/<stage>/<fingerprint>/state-<step>/tensors.safetensors, values.json
    .resume/<stage>/<fingerprint>/finished.json      once the stage's outputs are written

DVC deletes a stage's outputs before it runs it, so states cannot lie among them. The
fingerprint covers parameters, inputs and code: a state never meets a run of another kind.
"""

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from minimind.errors import UserError

STATE_FORMAT = 1  # part of the fingerprint: states of another format are never read
STATES_KEPT = 2


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
        self._lock = _lock(directory / "lock")

    def save(self, state: TrainingState) -> None:
        """Add a state durably; on any error the states before it are untouched."""
        final = self.directory / f"state-{state.step:09d}"
        partial = self.directory / f"partial-{state.step:09d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        tensors = {name: tensor.detach().cpu() for name, tensor in state.tensors.items()}
        save_file({n: t.contiguous() for n, t in tensors.items()}, partial / "tensors.safetensors")
        # Not sorted: a resumed curve keeps the order of its columns.
        values = json.dumps({"step": state.step, **state.values})
        with (partial / "tensors.safetensors").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        # The first line vouches for the second and for the tensors.
        seal = hashlib.sha256((digest + values).encode()).hexdigest()
        with (partial / "values.json").open("w", encoding="utf-8") as text:
            text.write(f"{seal}\n{values}\n")
            text.flush()
            os.fsync(text.fileno())
        _sync_directory(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync_directory(self.directory)
        for old in self._states()[:-STATES_KEPT]:
            shutil.rmtree(old)

    def load(self) -> tuple[TrainingState | None, list[str]]:
        """The newest state that is whole, and a line for each one that was not."""
        damaged: list[str] = []
        for directory in reversed(self._states()):
            try:
                return _read_state(directory), damaged
            except (OSError, ValueError, KeyError, SafetensorError) as error:
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

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        self._lock.close()

    def _states(self) -> list[Path]:
        return sorted(self.directory.glob("state-*"))


def forget_recorded(resume_root: Path) -> None:
    """Remove the states of finished runs whose outputs DVC has recorded since.

    A finished state is what saves a run that is killed while DVC hashes and records its outputs.
    It has served when dvc.lock names the metrics it led to, or when the temporary copy of the
    project that it ran in is gone.
    """
    for marker in resume_root.glob("*/*/finished.json"):
        try:
            record = json.loads(marker.read_text(encoding="utf-8"))
            lock = Path(record["folder"]) / "dvc.lock"
            recorded = not lock.parent.exists() or (
                lock.exists()
                and lock.stat().st_mtime_ns >= marker.stat().st_mtime_ns
                and record["metrics_md5"] in lock.read_text(encoding="utf-8")
            )
        except (OSError, ValueError, KeyError):
            continue
        if recorded:
            shutil.rmtree(marker.parent, ignore_errors=True)


def _read_state(directory: Path) -> TrainingState:
    data = (directory / "tensors.safetensors").read_bytes()
    seal, values = (directory / "values.json").read_text(encoding="utf-8").splitlines()
    digest = hashlib.sha256(data).hexdigest()
    if hashlib.sha256((digest + values).encode()).hexdigest() != seal:
        raise ValueError("its checksum is wrong")
    contents = json.loads(values)
    return TrainingState(contents.pop("step"), load(data), contents)


def _lock(path: Path) -> IO[str]:
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"{path.parent} is in use by {holder}; wait for it to end, or stop it."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename} ({psutil.Process().name()})")
    file.flush()
    return file


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
