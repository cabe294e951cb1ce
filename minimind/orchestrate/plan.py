"""What `dvc repro` would do, stage by stage, and why; nothing is run, locked or written.

DVC decides about a stage when those before it have run. Here that is gone through ahead: what a
stage will find is on disk, or known from the run cache or the code, or not known.
"""

import hashlib
import io
import json
import os
import subprocess
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import networkx as nx
from dvc.dependency import Dependency, ParamsDependency
from dvc.exceptions import DvcException
from dvc.fs import LocalFileSystem
from dvc.output import Output
from dvc.repo import Repo
from dvc.stage import PipelineStage
from dvc.stage.cache import _can_hash
from dvc.stage.serialize import to_single_stage_lockfile
from dvc.utils.serialize import load_yaml
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from dvc_data.hashfile.obj import HashFile
from dvc_data.hashfile.tree import Tree

from minimind.lineage.code import as_text, code_of, code_texts, stage_names
from minimind.lineage.dvc_files import differences
from minimind.lineage.provenance import CODE
from minimind.lineage.records import record_name

Verdict = Literal["runs", "from cache", "runs if its inputs change", "fails", "unchanged"]
# `meta` in dvc.yaml of a stage whose outputs are the same whatever its parameters.
CONSTANT = {"output": "constant"}
NEVER_RAN = "never ran"
ABSENT = "-"
STATES = {
    "deleted": "is missing",
    "modified": "was edited",
    "new": "is a new output",
    "not in cache": "is not in the cache",
}
MOST_NAMES = 3  # that a reason lists

Entry = Mapping[str, Any]  # of dvc.lock, or a run in the run cache
Contents = Mapping[str, HashFile | None]  # of outputs, by path


@dataclass(frozen=True)
class Planned:
    """What becomes of a stage, and why."""

    stage: str
    verdict: Verdict
    reasons: list[str] = field(default_factory=list)


class EditedFiles(LocalFileSystem):  # type: ignore[misc]
    """The files on disk, some of them with another text, which DVC reads in their place."""

    def __init__(self, texts: Mapping[Path, str]) -> None:
        super().__init__()
        self.texts = {os.path.abspath(path): text for path, text in texts.items()}

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        text = self.texts.get(os.path.abspath(path))
        return super().open(path, mode, **kwargs) if text is None else io.StringIO(text)


def plan(repo: Repo, graph: nx.DiGraph) -> Iterator[Planned]:
    """What becomes of each stage that has a command, after those that it depends on.

    graph: as :func:`minimind.orchestrate.graph.load_graph` gives it.
    """
    future = _Future(repo)
    for name in nx.lexicographical_topological_sort(graph):
        stage = graph.nodes[name]["stage"]
        if stage.cmd:  # the others are data
            yield future.decide(stage)


class _Future:
    """What a stage will find when its turn comes."""

    def __init__(self, repo: Repo) -> None:
        self.repo, self.cache = repo, repo.stage_cache
        # What stages before it write, by path, and who does; None: not known before it has run.
        self.written: dict[str, tuple[str, HashFile | None]] = {}

    def decide(self, stage: PipelineStage) -> Planned:
        """What becomes of a stage; its outputs are known from then on, as far as they can be."""
        verdict, reasons, outs = self._decide(stage)
        if verdict != "unchanged":
            for out in stage.outs:
                self.written[out.fs_path] = (stage.addressing, outs.get(out.def_path))
        return Planned(stage.addressing, verdict, reasons)

    def _decide(self, stage: PipelineStage) -> tuple[Verdict, list[str], Contents]:
        """Verdict, reasons, and what its outputs will be, where that is known."""
        if stage.frozen:
            return "unchanged", ["frozen"], {}
        deps = [dep for dep in stage.deps if not isinstance(dep, ParamsDependency)]
        makers = {str(dep): maker for dep in deps if (maker := self._maker_of_unknown(dep))}
        found = {dep: self._find(dep) for dep in deps if str(dep) not in makers}
        if lost := [f"{dep} is missing, and no stage makes it" for dep in found if not found[dep]]:
            return "fails", lost, {}
        changed = [dep for dep in found if dep.hash_info != found[dep]]
        inputs = [*_changed_definition(stage)]
        if inputs != [NEVER_RAN]:
            inputs += [reason for dep in stage.params for reason in _changed_params(dep)]
            inputs += [self._changed(stage, dep, found[dep]) for dep in changed]
        outputs = [reason for out in stage.outs for reason in _lost(out) if not inputs]
        if not inputs and not outputs:
            after = [f"after {some(sorted(set(makers.values())))}"] if makers else []
            return ("runs if its inputs change" if makers else "unchanged"), after, {}
        # Without changed inputs DVC restores the outputs of dvc.lock itself.
        entry = None if inputs else to_single_stage_lockfile(stage)
        is_constant = stage.meta == CONSTANT and not changed and not makers
        outs = {out.def_path: _as_locked(out) for out in stage.outs} if is_constant else {}
        try:
            for dep in stage.params:
                dep.hash_info = dep.get_hash()
        except DvcException as error:
            return "fails", [str(error)], {}
        for dep, hash_info in found.items():
            dep.hash_info, dep.meta = hash_info, dep.get_meta() if dep.exists else Meta()
        if makers:
            if any(self._outs_of(stage, run) for run in self._may_restore(stage, makers, entry)):
                return "runs if its inputs change", inputs + outputs, {}
        elif not all(dep.exists for dep in found):  # DVC would read what is still to be made
            past = (self._outs_of(stage, run) for run in self._may_restore(stage, (), entry))
            if not stage.always_changed and (restored := next(filter(None, past), {})):
                return "from cache", inputs + outputs, restored
        elif _can_hash(stage):
            entry = entry or self.cache._load(stage)
            if restored := self._outs_of(stage, entry) if entry else {}:
                return "from cache", inputs + outputs, restored
        if stage.cmd == f"python -m stages.code --output {CODE}":
            outs = {str(CODE): _tree_of_code()}
        return "runs", inputs + outputs, outs

    def _maker_of_unknown(self, dep: Dependency) -> str | None:
        """The stage that writes all or part of a dependency, if what it will write is not known."""
        for path, (maker, content) in self.written.items():
            inside = _is_within(dep.fs_path, path)
            if (inside and content is None) or (not inside and _is_within(path, dep.fs_path)):
                return maker
        return None

    def _find(self, dep: Dependency) -> HashInfo | None:
        """Hash of a dependency when the stage's turn comes; None if it is not there."""
        for path, (_, content) in self.written.items():
            if _is_within(dep.fs_path, path):
                if inner := Path(dep.fs_path).relative_to(path).parts:
                    assert isinstance(content, Tree)
                    content = content.get_obj(self.repo.cache.local, inner)
                return content and content.hash_info
        return dep.get_hash() if dep.exists else None

    def _changed(self, stage: PipelineStage, dep: Dependency, now: HashInfo) -> str:
        """What to say of a changed dependency; of code, which modules changed."""
        if not dep.hash_info:
            return f"{dep} is a new input"
        if Path(dep.def_path).parent == CODE and (modules := self._changed_modules(stage, dep)):
            return f"code of {some(modules)}"
        return f"{dep} changed"

    def _changed_modules(self, stage: PipelineStage, dep: Dependency) -> list[str]:
        """Those whose digests are not what dvc.lock has; [] if that is to be found nowhere."""
        root, name = Path(self.repo.root_dir), Path(dep.def_path).stem
        show = ["git", "show", f"HEAD:./{dep.def_path}"]
        texts = [subprocess.run(show, cwd=root, capture_output=True, check=False).stdout]
        with suppress(OSError, ValueError, KeyError, TypeError):
            texts.append((root / dep.def_path).read_bytes())
            record = json.loads((root / "runs" / record_name(stage.addressing)).read_bytes())
            texts.append(as_text(record["code"]).encode())
        before = [json.loads(text) for text in texts if _md5(text) == dep.hash_info.value]
        if not before or name not in stage_names():
            return []
        return sorted({module for module, _ in before[0].items() ^ code_of(name).items()})

    def _may_restore(
        self, stage: PipelineStage, unknown: Container[str], entry: Entry | None
    ) -> Iterator[Entry]:
        """Runs whose outputs DVC may bring back: the recorded one, and those of the run cache.

        They have the same inputs, as far as these are known.
        """
        if entry:
            yield entry
        wanted = _known_part(to_single_stage_lockfile(stage), unknown)
        name = f"path: {stage.outs[0].def_path}\n" if stage.outs else ""
        for file in Path(self.cache.cache_dir).glob("*/*/*"):
            if name in file.read_text(encoding="utf-8"):
                run = load_yaml(file)
                if _known_part(run, unknown) == wanted:
                    yield run

    def _outs_of(self, stage: PipelineStage, entry: Entry) -> Contents:
        """The outputs of a stage's run, if all are in the cache."""
        run = self.cache._create_stage(entry, wdir=stage.wdir)
        return {out.def_path: out.get_obj() for out in run.outs} if run.outs_cached() else {}


def _changed_definition(stage: PipelineStage) -> Iterator[str]:
    """Why a stage runs whatever its inputs are."""
    if not any(item.hash_info for item in (*stage.deps, *stage.outs)):
        yield NEVER_RAN
    elif stage.always_changed or stage.is_callback:
        yield "always runs"
    elif stage.cmd_changed:
        yield "its command changed"


def _changed_params(dep: ParamsDependency) -> Iterator[str]:
    before, now = dep.hash_info.value or {}, dep.read_params()
    for key in dep.params or {**before, **now}:
        old, new = before.get(key, ABSENT), now.get(key, ABSENT)
        if old != new:
            leaves = [*differences(key, old, new)] or [(key, old, new)]  # a new key without a value
            yield from (f"{name}: {_shown(old)} -> {_shown(new)}" for name, old, new in leaves)


def _as_locked(out: Output) -> HashFile | None:
    """What dvc.lock says that an output holds, be it here or not; None if that is not known."""
    if out.hash_info and not out.hash_info.isdir:
        return HashFile("", out.fs, out.hash_info)
    return out.get_obj() if out.exists else None


def _lost(out: Output) -> Iterator[str]:
    """Why an output has to be made or brought again, if it has."""
    for state in out.status().values():
        yield f"{out} {STATES[state] if out.exists else STATES['deleted']}"


def _known_part(entry: Entry, unknown: Container[str]) -> tuple[Any, ...]:
    """What two runs of a stage agree in, if they have the same inputs but for unknown ones."""
    deps = {dep["path"]: dep["path"] in unknown or dep["md5"] for dep in entry.get("deps", [])}
    return entry["cmd"], entry.get("params"), deps, {out["path"] for out in entry["outs"]}


def _tree_of_code() -> Tree:
    """The folder that stage `code` would write now."""
    tree = Tree()
    for name, text in code_texts(stage_names()).items():
        tree.add((f"{name}.json",), Meta(), HashInfo("md5", _md5(text.encode())))
    tree.digest()
    return tree


def _is_within(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def some(names: Sequence[str]) -> str:
    """The first of some names or reasons, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _md5(text: bytes) -> str:
    return hashlib.md5(text, usedforsecurity=False).hexdigest()
