"""Whether checkpoints are what dvc.lock says, and come of what it says, back to the data.

Every byte is read again: `dvc status` goes by sizes and times of files that it has seen before,
which a flipped bit leaves as they are, and it does not follow a checkpoint to its ancestors.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML  # as DVC reads its files: numbers must come out alike
from ruamel.yaml.error import YAMLError

from minimind.errors import UserError

CHECKPOINT_FOLDERS = ("models", "exports")
UNKNOWN = "unknown"  # the hash of a file in a folder that is not here, nor DVC's list of it


@dataclass(frozen=True)
class Finding:
    """What became of a checkpoint, or of all metrics together."""

    subject: str
    text: str
    broken: bool


class Project:
    """What dvc.yaml, dvc.lock, params.yaml and the records of runs say, and what there is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = _stages_of(root / "dvc.lock")
        self.outputs: dict[str, list[str]] = {}  # of each stage
        self.metrics: dict[str, list[str]] = {}
        for name, stage, variant in _variants(_stages_of(root / "dvc.yaml")):
            self.metrics[name] = _paths(stage.get("metrics"), variant)
            self.outputs[name] = _paths(stage.get("outs"), variant) + self.metrics[name]
        self.maker = {path: name for name, paths in self.outputs.items() for path in paths}
        self._digests: dict[str, str | None] = {}
        self._params: dict[str, Any] = {}

    def findings(self) -> Iterator[Finding]:
        """One for each checkpoint in the graph, in its order, and one for the metrics."""
        for path, stage in self.maker.items():
            if PurePosixPath(path).parts[0] in CHECKPOINT_FOLDERS:
                yield self._checkpoint(path, stage)
        checked = [path for name in self.lock for path in self.metrics.get(name, [])]
        breaks = [found for path in checked if (found := self._break_of_output(path))]
        text = breaks[0] if breaks else f"{len(checked)} files are as dvc.lock says"
        yield Finding("metrics", text, bool(breaks))

    def _checkpoint(self, path: str, stage: str) -> Finding:
        for ancestor in self.ancestors(stage):
            for found in self.breaks(ancestor):
                return Finding(path, found, broken=True)
        if self.digest(path) is None:
            text = f"not here: `dvc pull {path}` or `dvc repro {stage}` brings it; recorded"
        else:
            text = "as dvc.lock says;"
        return Finding(path, f"{text} from {' ← '.join(self._generations(stage))}", broken=False)

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

    def breaks(self, stage: str) -> Iterator[str]:
        """Where a stage's entry of dvc.lock does not agree with others', or with what there is."""
        again = f"`dvc repro {stage}` makes it anew"
        recorded = {out["path"]: out.get("md5") for out in self._entries(stage, "outs")}
        for path in self.outputs[stage]:
            if path not in recorded:
                yield f"dvc.lock does not say that stage {stage} made {path}; {again}"
        for dep in self._entries(stage, "deps"):
            path, expected = dep["path"], dep.get("md5")
            upstream = self._maker_of(path)
            if upstream is None:
                found, what = self.digest(path), "is"
            else:
                found, what = self._recorded(path, upstream), f"by the entry of stage {upstream} is"
            if found not in (expected, UNKNOWN):
                yield (
                    f"stage {stage} was run with {path} {_short(expected)}, which now {what} "
                    f"{_short(found)}; {again}, or bring the former back"
                )
        for file, values in self.lock.get(stage, {}).get("params", {}).items():
            for key, expected in values.items():
                if (found := self._param(file, key)) != expected:
                    yield (
                        f"stage {stage} was run with {_difference(key, expected, found)} in "
                        f"{file}; {again}, or bring the former back"
                    )
        for path in recorded:
            if found := self._break_of_output(path):
                yield found
        yield from self._breaks_of_record(stage)

    def _break_of_output(self, path: str) -> str | None:
        """What is wrong with an output that is here."""
        stage, found = self.maker.get(path), self.digest(path)
        if stage is None or found is None:
            return None
        if found == (expected := self._recorded(path, stage)):
            return None
        tool = "git" if path in self.metrics[stage] else "dvc"  # who keeps it
        return (
            f"{path} is {_short(found)}, but dvc.lock says {_short(expected)}; `{tool} checkout "
            f"{path}` brings that back, `dvc repro {stage}` makes it anew"
        )

    def _breaks_of_record(self, stage: str) -> Iterator[str]:
        """runs/<stage>.json says what a run read, by hashes of its own; not every machine has it.

        It may be of another run than dvc.lock is: its metrics tell.
        """
        file = self.root / "runs" / f"{stage.replace('@', '-')}.json"
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            inputs, metrics = dict(record["inputs"]), record["metrics_md5"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if metrics not in [out.get("md5") for out in self._entries(stage, "outs")]:
            return
        for path, expected in inputs.items():
            if (self.root / path).is_file():
                found = _hash_of_file(self.root / path, "sha256")
                if found != expected:
                    yield (
                        f"{file.relative_to(self.root)} says that stage {stage} read {path} "
                        f"{_short(expected)}, which now is {_short(found)}; `dvc repro {stage}`"
                    )

    def digest(self, path: str) -> str | None:
        """DVC's hash of a file or folder; None if it is not there."""
        if path not in self._digests:
            place = self.root / path
            if place.is_dir():
                self._digests[path] = _hash_of_folder(place)
            else:
                self._digests[path] = _hash_of_file(place, "md5") if place.is_file() else None
        return self._digests[path]

    def _recorded(self, path: str, stage: str) -> str | None:
        """The hash of an output in its stage's entry; of a file in an output, in that output."""
        for out in self._entries(stage, "outs"):
            if out["path"] == path:
                return out.get("md5")
            if PurePosixPath(path).is_relative_to(out["path"]):
                folder = self.digest(out["path"])
                if folder is None:
                    return self._in_cache(str(out.get("md5")), path.removeprefix(out["path"] + "/"))
                return self.digest(path) if folder == out.get("md5") else None
        return None

    def _in_cache(self, folder: str, name: str) -> str | None:
        """A file's hash by DVC's list of its folder, if that is here."""
        place = self.root / ".dvc" / "cache" / "files" / "md5" / folder[:2] / folder[2:]
        try:
            listed = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return UNKNOWN
        return next((entry["md5"] for entry in listed if entry["relpath"] == name), None)

    def _maker_of(self, path: str) -> str | None:
        """The stage that makes a path, or a folder it is in."""
        place = PurePosixPath(path)
        return next((m for p in (place, *place.parents) if (m := self.maker.get(str(p)))), None)

    def _entries(self, stage: str, kind: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.lock.get(stage, {}).get(kind, [])
        return entries

    def _param(self, file: str, key: str) -> Any:
        if file not in self._params:
            self._params[file] = _read(self.root / file)
        value = self._params[file]
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def _generations(self, stage: str) -> list[str]:
        """What a stage's result comes of, nearest first: names of data and checkpoints, no code."""
        generations, seen, stages = [], {stage}, [stage]
        while stages:
            paths = [dep["path"] for name in stages for dep in self._entries(name, "deps")]
            paths = [path for path in dict.fromkeys(paths) if not path.endswith(".py")]
            paths = [path for path in paths if path not in seen]
            if paths:
                generations.append(", ".join(paths))
            stages = list(dict.fromkeys(m for p in paths if (m := self._maker_of(p)) is not None))
            stages = [name for name in stages if name not in seen]
            seen |= {*paths, *stages}
        return generations or ["code and parameters alone"]


def _stages_of(file: Path) -> dict[str, Any]:
    contents = _read(file)
    stages = contents.get("stages") if isinstance(contents, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(s, dict) for s in stages.values()):
        raise UserError(f"{file} has no stages; bring it back with git, or run `dvc repro`.")
    return stages


def _read(file: Path) -> Any:
    try:
        return YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; run from the project's root folder.") from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"{file} is not valid YAML: {error}; bring it back with git.") from None


def _variants(stages: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, definition and variant of each stage of dvc.yaml."""
    for name, stage in stages.items():
        if "foreach" not in stage:
            yield name, stage, ""
            continue
        for variant in stage["foreach"]:
            yield f"{name}@{variant}", stage["do"], str(variant)


def _paths(entries: list[str | dict[str, Any]] | None, variant: str) -> list[str]:
    paths = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries or []]
    return [path.replace("${key}", variant).replace("${item}", variant) for path in paths]


def _hash_of_folder(folder: Path) -> str:
    """MD5 of the list of its files with their MD5s, as DVC makes it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    listed = [
        {"md5": _hash_of_file(folder / name, "md5"), "relpath": name} for name in sorted(names)
    ]
    content = json.dumps(listed, sort_keys=True).encode("utf-8")
    return hashlib.md5(content, usedforsecurity=False).hexdigest() + ".dir"


def _hash_of_file(file: Path, method: str) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(
            content, lambda: hashlib.new(method, usedforsecurity=False)
        ).hexdigest()


def _difference(key: str, expected: Any, found: Any) -> str:
    """The first parameter that differs, with the value that it had and the one that it has."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted({*expected, *found}):
            if expected.get(name, ...) != found.get(name, ...):
                return _difference(f"{key}.{name}", expected.get(name), found.get(name))
    return f"{key} {expected!r}, which now is {found!r}"


def _short(digest: str | None) -> str:
    return "missing" if digest is None else f"({digest[:8]})"
