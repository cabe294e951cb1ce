"""Whether checkpoints are what dvc.lock says, and come of what it says, back to the data.

Every byte is read again: `dvc status` goes by sizes and times of files that it has seen before,
which a flipped bit leaves as they are, and it does not follow a checkpoint to its ancestors.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from ruamel.yaml import YAML  # as DVC reads its files: numbers must come out alike
from ruamel.yaml.error import YAMLError

from minimind.errors import UserError
from minimind.lineage.brought import Brought
from minimind.lineage.dvc_files import (
    first_difference,
    kept_from_dvc,
    maker_of,
    md5_of,
    md5_of_file,
    output_paths,
    stages_as_written,
    value_at,
    variants,
)
from minimind.lineage.paths import quoted
from minimind.lineage.records import MadeFrom, Record, record_name, record_of
from minimind.lineage.repository import fault_of_dvc, has_remote, running_stages

CHECKPOINT_FOLDERS = ("models", "exports")
_DVCS = "DVC writes it; bring the file back with git, or remove it and run `dvc repro`."
UNKNOWN = "unknown"  # the hash of a file in a folder that is not here, nor DVC's list of it


Verdict = Literal["whole", "out of date", "broken"]  # nobody may rely on what is broken


class Break(NamedTuple):
    """Where things do not agree: DVC sees what is out of date, and runs it again by itself."""

    verdict: Verdict
    text: str


class Finding(NamedTuple):
    """What became of a checkpoint, of all metrics together, or of another stage's entry."""

    subject: str
    text: str
    verdict: Verdict


class Project:
    """What dvc.yaml, dvc.lock, params.yaml and the records of runs say, and what there is."""

    def __init__(self, root: Path, staged: Path | None = None) -> None:
        """staged: a copy of what git has of the project, which counts for what is in it."""
        self.root, self.staged = root, staged
        file = self._place("dvc.lock")
        with kept_from_dvc(root):
            self.lock = _stages_of(file)
        check_entries(self.lock, file)
        self.outputs: dict[str, list[str]] = {}  # of each stage
        self.metrics: dict[str, list[str]] = {}
        graph = self._place("dvc.yaml")
        stages = _stages_of(graph)
        try:
            for name, stage, variant in variants(stages):
                self.metrics[name] = output_paths(stage.get("metrics"), variant)
                self.outputs[name] = output_paths(stage.get("outs"), variant) + self.metrics[name]
        except (AttributeError, KeyError, TypeError, StopIteration):
            raise UserError(
                f"{graph} has a stage that is none; `dvc stage list` says which."
            ) from None
        self.maker = {path: name for name, paths in self.outputs.items() for path in paths}
        # DVC's hash of a file or folder, None if it is not there; and what a params file holds.
        self.digest = cache(lambda path: md5_of(self._place(path)))
        self._params = cache(lambda file: _read(self._place(file)))
        self._brought = Brought(root, file.read_text(encoding="utf-8"))
        self.running = [] if staged else running_stages(root)

    def _place(self, path: str) -> Path:
        staged = self.staged and self.staged / path
        return staged if staged and staged.exists() else self.root / path

    def findings(self) -> Iterator[Finding]:
        """Of each checkpoint in the graph, in its order, of the metrics, and of false entries."""
        if self.running:
            yield Finding(
                "DVC",
                f"it runs {', '.join(self.running)}: what these write is not looked at",
                "whole",
            )
        others = [*dict.fromkeys([*self.outputs, *self.lock])]
        for path, stage in self.maker.items():
            if PurePosixPath(path).parts[0] in CHECKPOINT_FOLDERS:
                yield self.checkpoint(path, stage)
                others = [name for name in others if name not in self.ancestors(stage)]
        recorded = [name for name in self.lock if name not in self.running]
        checked = [path for name in recorded for path in self.metrics.get(name, [])]
        breaks = [*filter(None, map(self._break_of_output, checked))]
        missing = [path for path in checked if self.digest(path) is None]
        if breaks:
            yield Finding("metrics", breaks[0].text, breaks[0].verdict)
        elif missing:
            again = f"`git checkout {missing[0]}` or `dvc repro {self.maker[missing[0]]}` brings it"
            yield Finding("metrics", f"{missing[0]} is missing; {again}", "out of date")
        else:
            yield Finding("metrics", f"{len(checked)} files are as dvc.lock says", "whole")
        for stage in others:
            if found := self._break_of_entry(stage):
                yield Finding(stage, found, "broken")
            elif lost := next(self._breaks_of_outputs(stage), None):
                yield Finding(stage, lost.text, lost.verdict)
            else:
                outs = [path for path in self.outputs.get(stage, []) if path not in checked]
                if other := next(filter(None, map(self._break_of_output, outs)), None):
                    yield Finding(stage, other.text, other.verdict)
        if not self.staged and (fault := fault_of_dvc(self.root)):
            yield Finding("DVC", fault, "broken")

    def checkpoint(self, path: str, stage: str) -> Finding:
        """Of an output and the stage that makes it."""
        breaks = [found for name in self.ancestors(stage) for found in self.breaks(name)]
        if first := min(breaks, key=lambda found: found.verdict != "broken", default=None):
            return Finding(path, first.text, first.verdict)
        text = "as dvc.lock says;"
        if stage in self.running:
            text = "in the making; dvc.lock has one"
        elif self.digest(path) is None:
            text = f"not here: {self._bringing(path, stage)} brings it; recorded"
        return Finding(path, f"{text} from {' ← '.join(self._generations(stage))}", "whole")

    def _bringing(self, path: str, stage: str, anew: bool = True) -> str:
        """Commands that bring an output back, as far as there is anywhere to bring it from."""
        md5, commands = self._recorded(path, stage), [f"`dvc repro {stage}`"] if anew else []
        if md5 and self._cached(md5).exists():
            commands.insert(0, f"`dvc checkout {quoted(path)}`")
        elif has_remote(self.root):
            commands.insert(0, f"`dvc pull {quoted(path)}`")
        return " or ".join(commands)

    def ancestors(self, stage: str) -> list[str]:
        """The stages that a stage's result comes of, each after those that it comes of; it last."""
        found: list[str] = []

        def visit(name: str) -> None:
            if name not in waiting:
                waiting.add(name)
                for dep in self._entries(name, "deps"):
                    if (upstream := self._maker_of(dep["path"])) is not None:
                        visit(upstream)
                found.append(name)

        waiting: set[str] = set()
        visit(stage)
        return found

    def breaks(self, stage: str) -> Iterator[Break]:
        """Where a stage's entry of dvc.lock does not agree with others', or with what there is."""
        again = f"`dvc repro {stage}` makes it anew"
        yield from self._breaks_of_outputs(stage)
        for dep in self._entries(stage, "deps"):
            path, expected = dep["path"], dep.get("md5")
            upstream = self._maker_of(path)
            if upstream is None:
                found, what = self.digest(path), "is"
            else:
                found, what = self._recorded(path, upstream), f"by the entry of stage {upstream} is"
            if found not in (expected, UNKNOWN):
                yield Break(
                    "out of date",
                    f"stage {stage} was run with {path} {_short(expected)}, which now {what} "
                    f"{_short(found)}; {again}, or bring the former back",
                )
        for file, values in self.lock.get(stage, {}).get("params", {}).items():
            for key, expected in values.items():
                found = value_at(self._params(file), key)
                if found != expected:
                    difference = first_difference(key, expected, found) or (key, expected, found)
                    name, before, now = difference
                    yield Break(
                        "out of date",
                        f"stage {stage} was run with {name} {before!r}, which now is {now!r} in "
                        f"{file}; {again}, or bring the former back",
                    )
        recorded = [out["path"] for out in self._entries(stage, "outs")]
        yield from filter(None, map(self._break_of_output, recorded))
        yield from self._breaks_of_record(stage)

    def _breaks_of_outputs(self, stage: str) -> Iterator[Break]:
        """Outputs without a hash in dvc.lock, which may have been cut off at the end of a line."""
        recorded = [out["path"] for out in self._entries(stage, "outs") if "md5" in out]
        for path in [] if stage in self.running else self.outputs.get(stage, []):
            if path not in recorded:
                metrics = path if path in self.metrics[stage] and self.digest(path) else None
                record = f"runs/{record_name(stage)}"
                if ran := metrics or (record if (self.root / record).exists() else None):
                    why = f"{ran} is there, so its entry is lost, or the run was not recorded"
                else:
                    why = "it was never run, or its entry is lost"
                yield Break(
                    "broken" if metrics else "out of date",  # git keeps metrics: whose are they?
                    f"dvc.lock does not say that stage {stage} made {path}: {why}; "
                    f"`dvc repro {stage}` makes it anew",
                )

    def _break_of_output(self, path: str) -> Break | None:
        """What is wrong with an output that is here: another run's, as DVC knows, or nobody's."""
        stage, found = self.maker.get(path), self.digest(path)
        if stage is None or stage in self.running or found is None:
            return None
        if found == (expected := self._recorded(path, stage)):
            return None
        if self._is_of_workspace(path, found):
            return None
        if path in self.metrics[stage]:
            brings, is_known = f"`git checkout {quoted(path)}`", False
        else:
            brings = self._bringing(path, stage, anew=False)
            is_known = self._cached(found).exists() and (
                (expected is not None and self._cached(expected).exists())
                or self._brought.has(stage, self.lock.get(stage, {}))
            )
        return Break(
            "out of date" if is_known else "broken",
            f"{path} is {_short(found)}, {'of another run, ' if is_known else ''}but dvc.lock says "
            f"{_short(expected)}; {brings + ' brings that back, ' if brings else ''}"
            f"`dvc repro {stage}` makes it anew",
        )

    def _breaks_of_record(self, stage: str) -> Iterator[Break]:
        """Where what there is, or dvc.lock, is not what a stage's run was made from."""
        if (record := self._record(stage)) is None:
            return
        if false := self._break_of_entry(stage):
            yield Break("broken", false)
        for path, expected in record.files.items():
            file = self._place(path)
            if file.is_file() and (found := md5_of_file(file)) != expected:
                yield Break(
                    "out of date",
                    f"runs/{record_name(stage)} says that stage {stage} read {path} "
                    f"{_short(expected)}, which now is {_short(found)}; {_anyway(stage)}",
                )

    def _break_of_entry(self, stage: str) -> str | None:
        """Where dvc.lock is wrong: what was edited after a stage had ended, it has as edited."""
        record = self._record(stage)
        if not record or not (changed := record.first_difference(self.lock[stage], self.root)):
            return None
        return (
            f"runs/{record_name(stage)} has another {changed} of stage {stage} than dvc.lock has; "
            f"{_anyway(stage)}"
        )

    def _record(self, stage: str) -> MadeFrom | None:
        """Of the run that dvc.lock is of, unless another clone made it.

        A run of the same inputs here stands in for one that is not recorded: an edited output, as
        `dvc commit --force` takes it, may be the one that tells runs apart.
        """
        entry = self.lock.get(stage, {})
        if found := record_of(self.root, stage, entry):
            run = found[0].run_of(entry, self.root)
        else:
            last = Record.read(self.root / "runs" / record_name(stage))
            if not entry or not last or last.first_difference({**entry, "outs": []}, self.root):
                return None
            run = last
        differs = run.first_difference(entry, self.root) is not None
        return None if differs and self._brought.has(stage, entry) else run

    def _recorded(self, path: str, stage: str) -> str | None:
        """The hash of an output in its stage's entry; of a file in an output, in that output."""
        for out in self._entries(stage, "outs"):
            if out["path"] == path:
                return out.get("md5")
            if PurePosixPath(path).is_relative_to(out["path"]):
                if self.digest(out["path"]) == out.get("md5"):
                    return self.digest(path)
                return self._in_cache(str(out.get("md5")), path.removeprefix(out["path"] + "/"))
        return None

    def _is_of_workspace(self, path: str, digest: str) -> bool:
        """Whether DVC keeps an output that is here, and it is of another dvc.lock than git has."""
        if not self.staged or (self.staged / path).exists():
            return False
        entries = stages_as_written(self.root / "dvc.lock").values()
        outs = [out for e in entries if _is_as_dvc_writes(e) for out in e.get("outs", [])]
        return (path, digest) in [(out["path"], out.get("md5")) for out in outs]

    def _in_cache(self, folder: str, name: str) -> str | None:
        """A file's hash by DVC's list of its folder, if that is here."""
        try:
            listed = json.loads(self._cached(folder).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return UNKNOWN
        return next((entry["md5"] for entry in listed if entry["relpath"] == name), None)

    def _cached(self, md5: str) -> Path:
        return self.root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]

    def _maker_of(self, path: str) -> str | None:
        """The stage that makes a path, or a folder it is in."""
        return maker_of(path, self.maker)

    def _entries(self, stage: str, kind: str) -> list[dict[str, Any]]:
        return self.lock.get(stage, {}).get(kind, [])

    def _generations(self, stage: str) -> list[str]:
        """What a stage's result comes of, nearest first: names of data and checkpoints, no code."""
        generations, seen, stages = [], {stage}, [stage]
        while stages:
            deps = [dep["path"] for name in stages for dep in self._entries(name, "deps")]
            paths = [
                path
                for path in dict.fromkeys(deps)
                if path not in seen and not path.startswith("code/") and not path.endswith(".py")
            ]
            if paths:
                generations.append(", ".join(paths))
            makers = dict.fromkeys(map(self._maker_of, paths))
            stages = [name for name in makers if name is not None and name not in seen]
            seen |= {*paths, *stages}
        return generations or ["code and parameters alone"]


def _stages_of(file: Path) -> dict[str, Any]:
    contents = _read(file)
    if file.exists() and not file.read_bytes().endswith(b"\n"):  # whoever writes it ends its lines
        raise UserError(
            f"{file} is cut off after {file.stat().st_size:,} bytes; bring it back with git, or "
            "remove it and run `dvc repro`."
        )
    return stages_in(contents, file)


def stages_in(contents: Any, file: object) -> dict[str, Any]:
    """The stages of a dvc.yaml or dvc.lock that was read."""
    stages = contents.get("stages") if isinstance(contents, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(s, dict) for s in stages.values()):
        raise UserError(
            f"{file} has no stages; bring it back with git, or remove it and run `dvc repro`."
        )
    return stages


def check_entries(lock: Mapping[str, Any], file: object) -> None:
    """Raises UserError where an entry of a dvc.lock is not as DVC writes it."""
    for name, entry in lock.items():
        if not _is_as_dvc_writes(entry):
            raise UserError(f"{file}: the entry of stage {name} is not as {_DVCS}")


def _is_as_dvc_writes(entry: dict[str, Any]) -> bool:
    listed, params = [entry.get("deps", []), entry.get("outs", [])], entry.get("params", {})
    return (
        all(isinstance(one, list) for one in listed)
        and all(
            isinstance(one, dict)
            and isinstance(one.get("path"), str)
            and isinstance(one.get("md5"), str | None)
            for one in chain(*listed)
        )
        and isinstance(params, dict)
        and all(isinstance(values, dict) for values in params.values())
    )


def _read(file: Path) -> Any:
    try:
        return YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file} is missing; run from the project's root folder.") from None
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not valid YAML: {error}; bring it back with git.") from None


def _anyway(stage: str) -> str:
    """A command that runs a stage which DVC takes for unchanged."""
    return f"`dvc repro --force --single-item {stage}` makes it anew"


def _short(digest: str | None) -> str:
    return "missing" if digest is None else f"({digest[:8]})"
