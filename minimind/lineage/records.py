"""runs/<stage>.json: what a run was made from, and how. Not an output: it differs every time.

DVC hashes the dependencies of a stage when its command has ended, and so can check nothing any
more. The stages after it compare what DVC wrote into dvc.lock with what it left in its record.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.errors import UserError
from minimind.files import replacing
from minimind.lineage.dvc_files import (
    first_difference,
    listing_of,
    md5_of,
    md5_of_listing,
    output_paths,
    stages_as_written,
    value_at,
    variants,
)
from minimind.lineage.dvc_process import our_dvc

# A process's creation is told by a clock that may be set meanwhile.
CLOCK_TOLERANCE_SECONDS = 60.0
MOST_EARLIER = 10  # runs of the same metrics that a record remembers


@dataclass(frozen=True)
class DvcRun:
    """A stage that a DVC process runs."""

    stage: str  # as dvc.lock names it
    pid: int
    created: float

    @classmethod
    def ours(cls, stage: str) -> "DvcRun | None":
        """None if no DVC process runs us."""
        dvc = our_dvc() if stage else None
        return None if dvc is None else cls(stage, dvc.pid, dvc.create_time())

    def has_same_dvc(self, other: "DvcRun") -> bool:
        apart = abs(self.created - other.created)
        return self.pid == other.pid and apart < CLOCK_TOLERANCE_SECONDS


@dataclass(frozen=True)
class Record:
    """What is compared with a stage's entry of dvc.lock."""

    files: dict[str, str]  # MD5 by path
    params: dict[str, dict[str, Any]]  # sections by name, by file, scalars as they are written
    metrics_md5: str | None
    dvc: DvcRun | None
    false_entry: str | None = None  # digest of an entry that a stage has found to be false
    earlier: tuple["Record", ...] = ()  # runs from other files or parameters, with these metrics

    @classmethod
    def read(cls, file: Path) -> "Record | None":
        """None for a record that is broken, or of an earlier version."""
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                files=dict(record["files"]),
                params=dict(record["params"]),
                metrics_md5=record["metrics_md5"],
                dvc=record["dvc"] and DvcRun(**record["dvc"]),
                false_entry=record.get("false_entry"),
                earlier=tuple(
                    cls(dict(run["files"]), dict(run["params"]), record["metrics_md5"], None)
                    for run in record.get("earlier", [])
                ),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_of(self, entry: Mapping[str, Any]) -> bool:
        """Whether a stage's entry of dvc.lock is of this run: its metrics tell."""
        return self.metrics_md5 in [out.get("md5", ...) for out in entry.get("outs", [])]

    def run_of(self, entry: Mapping[str, Any], root: Path = Path()) -> "Record":
        """The run that an entry is of: an earlier one, if git or DVC brought that back."""
        runs = (self, *self.earlier)
        return next((run for run in runs if not run.first_difference(entry, root)), self)

    def first_difference(self, entry: Mapping[str, Any], root: Path = Path()) -> str | None:
        """The first file or parameter that is not in the entry what it was in the run."""
        return next(self._differences(entry, root), None)

    def _differences(self, entry: Mapping[str, Any], root: Path) -> Iterator[str]:
        pinned = {os.path.abspath(root / name): md5 for name, md5 in self.files.items()}
        for dep in entry.get("deps", []):
            place = os.path.abspath(root / dep["path"])
            if dep.get("hash") != "md5":
                continue
            if place in pinned:
                if pinned[place] != dep["md5"]:
                    yield dep["path"]
                continue
            below = f"{place}/"
            inside = {p.removeprefix(below): m for p, m in pinned.items() if p.startswith(below)}
            if inside and md5_of_listing(inside) != dep["md5"]:
                # DVC leaves out files that .dvcignore names: so look which it was, if any.
                now = listing_of(Path(place))
                names = sorted({*inside, *now})
                yield from (f"{dep['path']}/{n}" for n in names if inside.get(n) != now.get(n))
        for file, values in entry.get("params", {}).items():
            for key, value in values.items():
                for section, tree in self.params.get(file, {}).items():
                    if f"{key}.".startswith(f"{section}."):
                        inner = key.removeprefix(section).removeprefix(".")
                        before = value_at(tree, inner) if inner else tree
                        if found := first_difference(key, before, value, _say_the_same):
                            yield f"{found[0]} in {file}"


class Records:
    """The records beside a project, as a stage that runs there reads and writes them."""

    def __init__(self, root: Path, dvc_stage: str) -> None:
        """root: of the project; dvc_stage: how DVC calls the stage, empty outside DVC."""
        self.folder = root / "runs"
        self.stage = dvc_stage.rpartition(":")[2]  # without the graph's file
        self.ours = DvcRun.ours(self.stage)

    def refuse_false_lock(self) -> None:
        """Compare dvc.lock with the records that stages under the same DVC process have left.

        Those of other processes may rightly differ: git may have brought another dvc.lock since.
        But what was once found to be false stays so, until that stage has run again.

        Raises:
            UserError: a dependency was edited after a stage had ended and before DVC hashed it.
        """
        if self.ours is None:
            return
        read = {file: Record.read(file) for file in sorted(self.folder.glob("*.json"))}
        records = {
            file: record
            for file, record in read.items()
            if record and record.dvc and (self.ours.has_same_dvc(record.dvc) or record.false_entry)
        }
        lock = stages_as_written(Path("dvc.lock")) if records else {}
        for file, record in records.items():
            assert record.dvc is not None
            stage = record.dvc.stage
            entry = lock.get(stage, {})
            if stage == self.stage or not record.is_of(entry):
                continue
            if record.false_entry not in (None, _digest(entry)):
                continue
            if changed := record.run_of(entry).first_difference(entry):
                contents = json.loads(file.read_text(encoding="utf-8"))
                _write(file, {**contents, "false_entry": _digest(entry)})
                made = ", ".join(out["path"] for out in entry["outs"])
                raise UserError(
                    f"{changed} changed after stage {stage} had ended and before DVC recorded it, "
                    f"so dvc.lock is wrong about what made {made}; "
                    f"run `dvc repro --force --single-item {stage}`."
                )

    def write(self, stage: str, contents: Mapping[str, Any]) -> Path:
        """The file that a record was written to."""
        file = self.folder / record_name(stage)
        record = {
            "stage": file.stem,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **contents,
            "dvc": self.ours and vars(self.ours),
            "earlier": _earlier(Record.read(file), contents),
        }
        _write(file, record)
        return file

    def metrics_md5(self) -> str | None:
        """MD5 of our stage's metrics, of an output if it has none; None if dvc.yaml has no such."""
        for name, stage, variant in variants(stages_as_written(Path("dvc.yaml"))):
            if name == self.stage:
                written = [*stage.get("metrics", []), *stage.get("outs", [])]
                for path in output_paths(written, variant):
                    return md5_of(Path(path))
        return None


def record_name(stage: str) -> str:
    """The name of a stage's record below runs/."""
    return f"{stage.replace('@', '-')}.json"


def _write(file: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def _earlier(before: Record | None, contents: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What runs of the same metrics were made from, the last one first, but this one."""
    if before is None or before.metrics_md5 != contents["metrics_md5"]:
        return []
    runs = [{"files": run.files, "params": run.params} for run in (before, *before.earlier)]
    now = {"files": contents["files"], "params": contents["params"]}
    return [run for run in runs if run != now][:MOST_EARLIER]


def _digest(entry: Mapping[str, Any]) -> str:
    text = json.dumps(entry, sort_keys=True)
    return hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()


def _say_the_same(before: Any, now: Any) -> bool:
    return _meaning(before) == _meaning(now)


def _meaning(value: Any) -> Any:
    """What a parameter's text says, however it is written: 5e-4 and 0.0005 are one number."""
    if isinstance(value, dict):
        return {name: _meaning(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_meaning(inner) for inner in value]
    text = str(value).lower()
    for number in (int, _prefixed, float):
        try:
            return number(text)
        except ValueError:
            continue
    return "" if text in ("none", "null", "~") else text


def _prefixed(text: str) -> int:
    return int(text, 0)  # 0x10 and the like
