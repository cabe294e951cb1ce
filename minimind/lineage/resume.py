"""Checkpoints to resume from, which outlive any kill: written beside, synced, renamed.

    .resume/<stage>/<fingerprint>/checkpoint-<step>/tensors.safetensors, values.json
    .resume/<stage>/<fingerprint>/finished.json      once the stage's outputs are written
    .resume/<stage>/<fingerprint>.lease              while a process uses them

DVC deletes a stage's outputs before it runs it, so checkpoints cannot lie among them. The
fingerprint covers parameters, inputs and code: a checkpoint never meets a run of another kind.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from minimind.errors import UserError
from minimind.files import naming
from minimind.lineage.lease import hold, refuse_if_lost

CHECKPOINT_FORMAT = 1  # part of the fingerprint: checkpoints of another format are never read
CHECKPOINTS_KEPT = 2
CHECKPOINT_DAMAGE = (OSError, ValueError, KeyError, SafetensorError)


@dataclass(frozen=True)
class ResumeCheckpoint:
    """All that the rest of a run depends on."""

    step: int  # optimizer steps done
    tensors: dict[str, Tensor]
    values: dict[str, Any]  # JSON
    part: int = 0  # of what comes before the next step, where that takes long: how much is done

    @property
    def name(self) -> str:
        """Sorted as they are made."""
        return f"checkpoint-{self.step:09d}" + (f"-{self.part:09d}" if self.part else "")


class ResumeStore:
    """The checkpoints of one run; one process at a time."""

    def __init__(
        self,
        directory: Path,
        check: Callable[[], None] = lambda: None,
        wait: Callable[[str], None] | None = None,
    ) -> None:
        """Waits for the process that has them.

        check: called before a checkpoint becomes visible; what it raises keeps it from that.
        wait: as in :func:`minimind.lineage.lease.hold`.
        """
        self.directory, self._check = directory, check
        self._lease = hold(directory, wait)
        for parent in list(directory.parents)[:3]:  # .resume/<stage>/ and what holds it
            _sync_directory(parent)
        for unfinished in directory.glob("partial-*/"):  # left by a kill, and never read
            shutil.rmtree(unfinished, ignore_errors=True)

    def save(self, checkpoint: ResumeCheckpoint) -> None:
        """Add a checkpoint durably; a UserError if that fails leaves those before it untouched."""
        final = self.directory / checkpoint.name
        with suppress(*CHECKPOINT_DAMAGE):
            _read_checkpoint(final)
            return  # of the same run, so of the same content: there is nothing to add
        partial = self.directory / checkpoint.name.replace("checkpoint", "partial")
        try:
            _write_checkpoint(partial, checkpoint)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            raise UserError(
                f"{final} could not be saved: {error}; the one before it, if there is one, is "
                "kept: mend this and run the same command again to go on."
            ) from None
        try:
            self._check()
            refuse_if_lost(self._lease)
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)  # damaged, or it would have been enough
        partial.rename(final)
        _sync_directory(self.directory)
        checkpoints = self._checkpoints()
        kept = [directory for directory in checkpoints if directory <= final][-CHECKPOINTS_KEPT:]
        for old in checkpoints:
            if old not in kept:  # those of later steps could not be used
                shutil.rmtree(old)

    def load(self) -> tuple[ResumeCheckpoint | None, list[str]]:
        """The newest checkpoint that is whole, and a line for each one that was not."""
        damaged: list[str] = []
        for directory in reversed(self._checkpoints()):
            try:
                return _read_checkpoint(directory), damaged
            except CHECKPOINT_DAMAGE as error:
                damaged.append(f"{directory} is damaged ({error}); falling back to the one before")
        return None, damaged

    def finish(self, record: dict[str, Any]) -> None:
        """Mark the run as finished; its last checkpoint stays until DVC knows the outputs."""
        partial = self.directory / "partial-finished.json"
        _write_synced(partial, json.dumps(record))
        partial.rename(self.directory / "finished.json")
        _sync_directory(self.directory)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        self._lease.release()

    def _checkpoints(self) -> list[Path]:
        return sorted(self.directory.glob("checkpoint-*"))


class StoredRun(NamedTuple):
    """What lies in .resume/<stage>/<fingerprint>/ of a run of those parameters, data and code."""

    directory: Path
    step: int | None  # of the newest checkpoint
    num_bytes: int
    seconds: float  # since it was saved


def stored_runs(resume_root: Path) -> list[StoredRun]:
    """All runs that could be gone on with, the oldest first."""
    runs = []
    for directory in resume_root.glob("*/*/"):
        if directory.is_symlink():  # none of ours
            continue
        stats = []
        for file in directory.rglob("*"):
            with suppress(FileNotFoundError):  # a run that is going on removes old ones
                stats += [file.stat()] if file.is_file() else []
        newest = max(directory.glob(f"checkpoint-{'[0-9]' * 9}*"), default=None)
        step = None if newest is None else int(newest.name.split("-")[1])
        seconds = time.time() - max((stat.st_mtime for stat in stats), default=time.time())
        runs.append(StoredRun(directory, step, sum(stat.st_size for stat in stats), seconds))
    return sorted(runs, key=lambda run: -run.seconds)


def remove_run(run: StoredRun) -> None:
    """Raises UserError where a process is using it."""
    _remove(run.directory)


def forget_recorded(resume_root: Path, wanted: Path) -> None:
    """Remove the checkpoints of finished runs that nothing is to go on from any more.

    They save a run that is killed while DVC hashes its outputs, and have served when dvc.lock
    names its metrics, or when the temporary copy of the project that it ran in is gone.

    wanted: the checkpoints of the run that is starting. That DVC starts it again tells that a copy
        which is gone was not recorded.
    """
    recorded = []
    for marker in resume_root.glob("*/*/finished.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(marker.read_text(encoding="utf-8"))
            folder = Path(record["folder"])
            if folder.exists():
                has_served = any(
                    lock.stat().st_mtime_ns >= marker.stat().st_mtime_ns
                    and record["metrics_md5"] in lock.read_text(encoding="utf-8")
                    for pattern in ("dvc.lock", "*/dvc.lock")  # tools/ has a graph of its own
                    for lock in folder.glob(pattern)
                )
            else:
                has_served = marker.parent != wanted
            if has_served:
                recorded.append(marker.parent)
    if recorded and hasattr(os, "sync"):
        os.sync()  # what DVC recorded, which it does not do itself: a power cut must find one
    for directory in recorded:
        with suppress(OSError, UserError):
            _remove(directory)


def _write_checkpoint(directory: Path, checkpoint: ResumeCheckpoint) -> None:
    """All of a checkpoint, durably, but for the directory's own name."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
    save_file(tensors, directory / "tensors.safetensors")
    # Not sorted: a resumed history keeps the order of its columns.
    values = json.dumps({"step": checkpoint.step, **checkpoint.values})
    with (directory / "tensors.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    # The first line vouches for the second and for the tensors.
    seal = hashlib.sha256((digest + values).encode()).hexdigest()
    _write_synced(directory / "values.json", f"{seal}\n{values}\n")
    _sync_directory(directory)


def _write_synced(file: Path, text: str) -> None:
    with naming(file), file.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def _read_checkpoint(directory: Path) -> ResumeCheckpoint:
    data = (directory / "tensors.safetensors").read_bytes()
    seal, values = (directory / "values.json").read_text(encoding="utf-8").splitlines()
    digest = hashlib.sha256(data).hexdigest()
    if hashlib.sha256((digest + values).encode()).hexdigest() != seal:
        raise ValueError("its checksum is wrong")
    contents = json.loads(values)
    return ResumeCheckpoint(contents.pop("step"), load(data), contents)


def _remove(directory: Path) -> None:
    lease = hold(directory)
    shutil.rmtree(directory, ignore_errors=True)
    lease.release()


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
