"""runs/<stage>.json: what a run was made from, and how. Not an output: it differs every time.

DVC hashes the dependencies of a stage when its command has ended, and so can check nothing any
more. The stages after it compare what DVC wrote into dvc.lock with what it left in its record.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

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
MADE_FROM = ("files", "params", "outs")  # keys of a record that a run is known by
MOST_EARLIER = 10  # runs of a stage that are remembered beside its last one


@dataclass(frozen=True)
class DvcRun:
    """A stage that a DVC process runs."""

    stage: str  # as dvc.lock names it
    pid: int
    created: float

    def has_same_dvc(self, other: "DvcRun") -> bool:
        apart = abs(self.created - other.created)
        return self.pid == other.pid and apart < CLOCK_TOLERANCE_SECONDS


@dataclass(frozen=True)
class MadeFrom:
    """What a run was made from, to be compared with a stage's entry of dvc.lock."""

    files: dict[str, str]  # MD5 by path
    params: dict[str, dict[str, Any]]  # sections by name, by file, scalars as they are written
    outs: dict[str, str] = field(default_factory=dict)  # DVC's hash of each output

    def first_difference(self, entry: Mapping[str, Any], root: Path = Path()) -> str | None:
        """The first file, parameter or output that is not in the entry what it was in the run."""
        pinned = {os.path.abspath(root / name): md5 for name, md5 in self.files.items()}
        for dep in entry.get("deps", []):
            place = os.path.abspath(root / dep["path"])
            if dep.get("hash") != "md5":
                continue
            if place in pinned:
                if pinned[place] != dep.get("md5"):
                    return str(dep["path"])
                continue
            below = f"{place}/"
            inside = {p.removeprefix(below): m for p, m in pinned.items() if p.startswith(below)}
            if inside and md5_of_listing(inside) != dep.get("md5"):
                # DVC leaves out files that .dvcignore names: so look which it was, if any.
                now = listing_of(Path(place))
                for name in sorted({*inside, *now}):
                    if inside.get(name) != now.get(name):
                        return f"{dep['path']}/{name}"
        for file, values in entry.get("params", {}).items():
            for key, value in values.items():
                for section, tree in self.params.get(file, {}).items():
                    if f"{key}.".startswith(f"{section}."):
                        inner = key.removeprefix(section).removeprefix(".")
                        before = value_at(tree, inner) if inner else tree
                        if found := first_difference(key, before, value, _meaning):
                            return f"{found[0]} in {file}"
        for out in entry.get("outs", []):
            if self.outs.get(out["path"], out.get("md5")) != out.get("md5"):
                return str(out["path"])
        return None


@dataclass(frozen=True)
class Record(MadeFrom):
    """What a record says of its run, and of those before it."""

    metrics_md5: str | None = field(kw_only=True)
    dvc: DvcRun | None = field(kw_only=True)
    false_entry: str | None = None  # digest of an entry that a stage has found to be false
    earlier: tuple[MadeFrom, ...] = ()  # others that gave these metrics

    @classmethod
    def read(cls, file: Path) -> "Record | None":
        """None for a record that is broken, or of an earlier version."""
        try:
            return _RECORD.validate_json(file.read_bytes())
        except (OSError, ValidationError):
            return None

    def is_of(self, entry: Mapping[str, Any]) -> bool:
        """Whether a stage's entry of dvc.lock is of this run: its metrics tell."""
        return self.metrics_md5 in [out.get("md5", ...) for out in entry.get("outs", [])]

    def run_of(self, entry: Mapping[str, Any], root: Path = Path()) -> MadeFrom:
        """The run that an entry is of: an earlier one, if git or DVC brought that back."""
        runs = (self, *self.earlier)
        return next((run for run in runs if not run.first_difference(entry, root)), self)


_RECORD = TypeAdapter(Record)


class Records:
    """The records beside a project, as a stage that runs there reads and writes them."""

    def __init__(self, root: Path, dvc_stage: str) -> None:
        """root: of the project; dvc_stage: how DVC calls the stage, empty outside DVC."""
        self.folder = root / "runs"
        self.stage = dvc_stage.rpartition(":")[2]  # without the graph's file
        dvc = our_dvc() if self.stage else None
        self.ours = DvcRun(self.stage, *dvc) if dvc else None

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
            if (stage := record.dvc.stage) != self.stage:
                _refuse_if_false(file, record, stage, lock.get(stage, {}))

    def last(self, stage: str) -> dict[str, Any]:
        """All that the last run's record says; {} if there is none, or it is broken."""
        try:
            record = json.loads((self.folder / record_name(stage)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def write(self, stage: str, contents: Mapping[str, Any]) -> Path:
        """The file that a record was written to.

        It remembers from what else earlier runs made the same metrics, the last one first. One that
        made others is put aside: after an experiment git and DVC bring back what it was a run of.
        """
        file = self.folder / record_name(stage)
        before, now = Record.read(file), {name: contents[name] for name in MADE_FROM}
        earlier: list[dict[str, Any]] = []
        if before and before.metrics_md5 == contents["metrics_md5"]:
            runs = (before, *before.earlier)
            earlier = [{name: getattr(run, name) for name in MADE_FROM} for run in runs]
        elif before and before.metrics_md5:
            _write(_aside(file, before.metrics_md5), self.last(stage))
            aside = sorted(_aside(file, "?" * 32).parent.glob(_aside(file, "?" * 32).name))
            for old in sorted(aside, key=lambda file: file.stat().st_mtime)[:-MOST_EARLIER]:
                old.unlink()
        record = {
            "stage": file.stem,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **_peak_memory(),
            **contents,
            "dvc": self.ours and vars(self.ours),
            "earlier": [run for run in earlier if run != now][:MOST_EARLIER],
        }
        _write(file, record)
        return file

    def outputs(self) -> dict[str, str]:
        """DVC's hash of each output of our stage, metrics first; {} if dvc.yaml has no such."""
        for name, stage, variant in variants(stages_as_written(Path("dvc.yaml"))):
            if name == self.stage:
                written = [*stage.get("metrics", []), *stage.get("outs", [])]
                hashes = {path: md5_of(Path(path)) for path in output_paths(written, variant)}
                return {path: md5 for path, md5 in hashes.items() if md5}
        return {}


def record_of(
    root: Path, stage: str, entry: Mapping[str, Any]
) -> tuple[Record, dict[str, Any]] | None:
    """The record of the run that an entry of dvc.lock is of, and all that it says.

    None if that run was not here, or is forgotten.
    """
    last = root / "runs" / record_name(stage)
    for file in (last, *(_aside(last, out.get("md5", "")) for out in entry.get("outs", []))):
        if (record := Record.read(file)) and record.is_of(entry):
            return record, json.loads(file.read_text(encoding="utf-8"))
    return None


def _aside(file: Path, metrics_md5: str) -> Path:
    """Where a record is kept when a run with other metrics writes its own."""
    return file.parent / "earlier" / f"{file.stem}-{metrics_md5}.json"


def refuse_false_entry(root: Path, stage: str) -> None:
    """As :meth:`Records.refuse_false_lock` of one stage, which DVC has just recorded in dvc.lock.

    For stages side by side: each has a DVC process of its own, and so cannot tell by itself.
    """
    file = root / "runs" / record_name(stage)
    if (record := Record.read(file)) and record.dvc:
        entry = stages_as_written(root / "dvc.lock").get(stage, {})
        _refuse_if_false(file, record, stage, entry, root)


def _refuse_if_false(
    file: Path, record: Record, stage: str, entry: Mapping[str, Any], root: Path = Path()
) -> None:
    if not record.is_of(entry) or record.false_entry not in (None, _digest(entry)):
        return
    if changed := record.run_of(entry, root).first_difference(entry, root):
        contents = json.loads(file.read_text(encoding="utf-8"))
        _write(file, {**contents, "false_entry": _digest(entry)})
        made = ", ".join(out["path"] for out in entry["outs"])
        raise UserError(
            f"{changed} changed after stage {stage} had ended and before DVC recorded it, "
            f"so dvc.lock is wrong about what made {made}; "
            f"run `dvc repro --force --single-item {stage}`."
        )


def record_name(stage: str) -> str:
    """The name of a stage's record below runs/: of any graph, whose file may stand before it."""
    return f"{stage.rpartition(':')[2].replace('@', '-')}.json"


def _peak_memory() -> dict[str, int]:
    """{"peak_memory_mib": ..} of this process; {} where the system does not say."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return {"peak_memory_mib": round(peak * unit / 2**20)}


def _write(file: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def _digest(entry: Mapping[str, Any]) -> str:
    text = json.dumps(entry, sort_keys=True)
    return hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()


def _meaning(value: Any) -> Any:
    """What a parameter's text says, however it is written: 5e-4 and 0.0005 are one number."""
    if isinstance(value, dict):
        return {name: _meaning(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_meaning(inner) for inner in value]
    text = str(value).lower()
    for number in (int, lambda text: int(text, 0), float):  # 010, 0x10, 1e-3
        with suppress(ValueError):
            return number(text)
    return "" if text in ("none", "null", "~") else text
