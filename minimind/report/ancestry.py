"""What an output comes of, back to the data: rows, overlap with evaluation, parameters, runs."""

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from minimind.errors import UserError
from minimind.lineage.dvc_files import (
    maker_of,
    read_as_written,
    stages_as_written,
    value_at,
    variants,
)
from minimind.lineage.provenance import CODE
from minimind.lineage.records import record_of
from minimind.lineage.verify import CHECKPOINT_FOLDERS, Finding, Project
from minimind.params import read_params
from minimind.report.results import flat

# `meta` in dvc.yaml of a stage whose outputs are the same whatever it reads: no ancestor.
CONSTANT = {"output": "constant"}
EVALUATION = ("data.problems", "data.text")  # parameters that name what nothing is trained on
OVERLAP = "eval_overlap_rows"  # a metric of stage encode
OF_RUN = ("host", "processor", "device", "seconds", "finished", "python", "versions")


@dataclass(frozen=True)
class Ancestor:
    """A file or folder, and what it was made of."""

    path: str
    md5: str | None  # by dvc.lock
    stage: str | None  # None: no stage makes it
    license: str | None = None
    desc: str | None = None
    rows: int | None = None  # of JSONL that is here
    is_above: bool = False  # all that follows is said where the stage came first
    params: dict[str, Any] = field(default_factory=dict)
    code: str | None = None  # hash of the list of modules
    num_modules: int = 0
    counts: dict[str, Any] = field(default_factory=dict)  # the stage's metrics
    compared_with: list[str] = field(default_factory=list)  # data that overlaps are counted with
    run: dict[str, Any] = field(default_factory=dict)  # here: host, seconds, versions
    made_of: list["Ancestor"] = field(default_factory=list)

    def walk(self) -> Iterator["Ancestor"]:
        """It and all that it comes of, each once."""
        if not self.is_above:
            yield self
        for ancestor in self.made_of:
            yield from ancestor.walk()


@dataclass(frozen=True)
class Ancestry:
    """What an output comes of, and a summary."""

    output: Ancestor
    verdict: Finding  # as `minimind verify` finds it
    running: list[str]  # stages
    commit: str | None  # the first with this output, and its date
    training_rows: int  # of all encoded data
    overlap_rows: int  # those of them that ask what evaluation data asks
    compared_with: list[str]
    not_compared: list[str]  # other data that was read
    num_stages: int
    runs_here: int
    seconds: float  # of the runs here
    hosts: list[str]
    versions: list[str]


def output_named(name: str, project: Project) -> str | None:
    """The output in the graph that a path, or a name in models/ or exports/, stands for."""
    path = name.removeprefix("./").rstrip("/")
    places = [path, *(f"{folder}/{path}" for folder in CHECKPOINT_FOLDERS)]
    return next((place for place in places if place in project.maker), None)


def ancestry(path: str, project: Project) -> Ancestry:
    """What an output of the graph comes of, by dvc.lock and what is here.

    Raises:
        UserError: it was never made.
    """
    stage = project.maker[path]
    if stage not in project.lock:
        raise UserError(f"{path} was never made: dvc.lock has no stage {stage}; run `dvc repro`.")
    output = _Tree(project).ancestor(path)
    made = [ancestor for ancestor in output.walk() if ancestor.stage]
    encoded = [ancestor for ancestor in made if OVERLAP in ancestor.counts]
    others = [ancestor for ancestor in made if OVERLAP not in ancestor.counts]
    runs = [ancestor.run for ancestor in made if ancestor.run]
    return Ancestry(
        output=output,
        verdict=project.checkpoint(path, stage),
        running=project.running,
        commit=_commit_of(output.md5, project.root),
        training_rows=sum(ancestor.counts["rows"] for ancestor in encoded),
        overlap_rows=sum(ancestor.counts[OVERLAP] for ancestor in encoded),
        compared_with=_once(path for ancestor in encoded for path in ancestor.compared_with),
        not_compared=_once(s.path for o in others for s in o.made_of if s.rows is not None),
        num_stages=len(made),
        runs_here=len(runs),
        seconds=sum(run.get("seconds", 0) for run in runs),
        hosts=_once(f"{run['host']} ({run['processor']})" for run in runs if "host" in run),
        versions=_once(f"{n} {v}" for run in runs for n, v in run.get("versions", {}).items()),
    )


def ancestries(root: Path) -> list[Ancestry]:
    """Of each checkpoint of the project that was made."""
    if not (root / "dvc.lock").is_file():
        return []
    project = Project(root)
    return [
        ancestry(path, project)
        for path, stage in project.maker.items()
        if PurePosixPath(path).parts[0] in CHECKPOINT_FOLDERS and stage in project.lock
    ]


class _Tree:
    def __init__(self, project: Project) -> None:
        self.project, self.root = project, project.root
        self.stages = {
            name: stage for name, stage, _ in variants(stages_as_written(self.root / "dvc.yaml"))
        }
        params = read_params(self.root / "params.yaml")
        self.evaluation = [value_at(params, key) for key in EVALUATION]
        self.told: set[str] = set()

    def ancestor(self, path: str, md5: str | None = None) -> Ancestor:
        """md5: of what no stage makes, and of a file in a folder that one makes."""
        stage = maker_of(path, self.project.maker)
        entry = self.project.lock.get(stage or "", {})
        made = {out["path"]: out.get("md5") for out in entry.get("outs", [])}
        md5 = made.get(path, md5)
        said = self.stages[stage] if stage else _dvc_file(self.root / path)
        license_, desc = value_at(said, "meta.license"), said.get("desc")
        # What a stage that runs has written so far is not what was read.
        rows = _num_rows(self.root / path) if self.project.digest(path) == md5 else None
        about = (path, md5, stage, license_, desc, rows)
        if (stage or path) in self.told:
            return Ancestor(*about, is_above=True)
        self.told.add(stage or path)
        if stage is None:
            return Ancestor(*about)
        deps = {dep["path"]: dep.get("md5") for dep in entry.get("deps", [])}
        code = next((dep for dep in deps if PurePosixPath(dep).parts[0] == CODE.name), None)
        return Ancestor(
            *about,
            params={k: v for p in entry.get("params", {}).values() for k, v in flat(p).items()},
            code=deps[code] if code else None,
            num_modules=len(_json(self.root / code)) if code else 0,
            counts={
                name.rpartition(".")[2]: value
                for file in self.project.metrics[stage]
                if self.project.digest(file) == made.get(file)
                for name, value in flat(_json(self.root / file)).items()
            },
            compared_with=[dep for dep in deps if dep in self.evaluation],
            run=self._run(stage, entry),
            made_of=[self.ancestor(*dep) for dep in deps.items() if self._is_source(dep[0])],
        )

    def _is_source(self, path: str) -> bool:
        stage = self.stages.get(maker_of(path, self.project.maker) or "", {})
        is_code = PurePosixPath(path).parts[0] == CODE.name
        return not is_code and path not in self.evaluation and stage.get("meta") != CONSTANT

    def _run(self, stage: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Of the run that an entry is of, if it was here."""
        found = record_of(self.root, stage, entry)
        if found is None or found[0].first_difference(entry, self.root):
            return {}
        return {key: found[1][key] for key in OF_RUN if key in found[1]}


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _dvc_file(path: Path) -> dict[str, Any]:
    """What the .dvc file of a path, or of a folder that it is in, says of it."""
    for place in (path, *path.parents):
        with suppress(OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            said = read_as_written(place.with_name(f"{place.name}.dvc"))
            return {**said["outs"][0], **said}
    return {}


def _num_rows(path: Path) -> int | None:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    shards = [file for file in files if file.suffix.lower() == ".jsonl" and file.is_file()]
    if not shards:
        return None
    return sum(1 for file in shards for line in file.open("rb") if line.strip())


def _json(file: Path) -> dict[str, Any]:
    """{} for what is not here, or broken: the verdict tells."""
    with suppress(OSError, ValueError):
        contents = json.loads(file.read_text(encoding="utf-8"))
        return contents if isinstance(contents, dict) else {}
    return {}


def _commit_of(md5: str | None, root: Path) -> str | None:
    """The first commit whose dvc.lock has a hash; None without git, or before there is one."""
    if md5 is None:
        return None
    found = git(root, "log", "--reverse", "--format=%h %cs", "-S", md5, "--", "dvc.lock")
    return next(iter(found.decode().splitlines()), None)


def git(root: Path, *arguments: str, given: bytes = b"") -> bytes:
    """What git prints; nothing where it cannot."""
    with suppress(OSError):
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=root, input=given, capture_output=True, check=False
        ).stdout
    return b""
