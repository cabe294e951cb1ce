"""What differs between two revisions: at the roots, in the stages that this reached, in metrics.

All of it stands in git (dvc.lock, code/, metrics) and in DVC's cache or remote (rows of data), so
that nothing is checked out; no lock of DVC is taken, so that a stage may run meanwhile.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dvc.dependency import ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.scm import NoSCM, RevError
from dvc.utils.diff import diff, format_dict
from dvc.utils.flatten import flatten
from dvc.utils.serialize import parse_yaml
from dvc_data.index import DataIndexError

from minimind.errors import UserError
from minimind.lineage.dvc_files import kept_from_dvc, maker_of
from minimind.lineage.paths import refuse_pipes
from minimind.lineage.provenance import CODE
from minimind.lineage.repository import has_remote, lack_of_commits, running_stages
from minimind.lineage.verify import CHECKPOINT_FOLDERS, check_entries, stages_in
from minimind.report.ancestry import git
from minimind.report.report import interval, outcomes

WORKSPACE = "workspace"
LOST = (OSError, DvcException, DataIndexError)  # what DVC raises of data that is not to be had

Verdict = Literal["outputs changed", "same outputs", "not reached", "new", "removed"]
Entry = Mapping[str, Any]  # of a stage in dvc.lock


@dataclass
class Root:
    """What differs and is made by no stage: a parameter, a module of code, a file."""

    name: str
    before: Any  # of files and modules a hash; None where it is not there
    now: Any
    stages: list[str] = field(default_factory=list)  # that it reached at once


@dataclass(frozen=True)
class DataChange:
    """What differs in rows of a file or folder; an edited row is one removed and one added."""

    name: str  # parameters that name it, or its path
    before: str | None  # path
    now: str | None
    removed: int | None = None  # rows; None where they could not be read
    added: int | None = None
    note: str = ""


@dataclass(frozen=True)
class StageChange:
    """What became of a stage, and which of its own inputs differ."""

    stage: str
    verdict: Verdict
    because: list[str] = field(default_factory=list)
    was: str | None = None  # the name that it had before, if that is another


@dataclass(frozen=True)
class MetricChange:
    """A metric that differs; half_width is that of its 95 % interval over problems, now."""

    file: str
    name: str
    before: Any
    now: Any
    half_width: float | None = None


@dataclass(frozen=True)
class Explanation:
    """All that differs. out_of_date: of the workspace, stages and what of them has changed."""

    before: str
    now: str
    params: list[Root]
    data: list[DataChange]
    code: list[Root]
    files: list[Root]
    stages: list[StageChange]
    metrics: list[MetricChange]
    out_of_date: dict[str, list[str]]
    notes: list[str]


class Revision:
    """What git and DVC have of a revision."""

    def __init__(self, name: str, repo: Repo) -> None:
        """repo: switched to the revision."""
        self.name, self.repo, self.fs = name, repo, repo.dvcfs
        self.lock: dict[str, Any] = {}
        self.notes: list[str] = []
        if (text := self.read("dvc.lock")) is None:
            self.notes.append(f"{name} has no dvc.lock: no stage had run")
        else:
            where = f"dvc.lock of {name}"
            self.lock = stages_in(parse_yaml(text, where), where)
            check_entries(self.lock, where)
        self.maker = {path: name for name, entry in self.lock.items() for path in hashes(entry)}
        self.inputs = {
            path: md5 for entry in self.lock.values() for path, md5 in hashes(entry, "deps").items()
        }
        self.data = {  # paths by the parameters of section `data` that name them
            key: value
            for entry in self.lock.values()
            for values in entry.get("params", {}).values()
            for key, value in flatten(values).items()
            if key.startswith("data.") and isinstance(value, str) and value in self.inputs
        }
        self.metrics = {}  # as DVC has them, by file
        for file, found in repo.metrics.show()[""].get("data", {}).items():
            if "data" in found:
                self.metrics[file] = found
            elif not isinstance(found["error"], FileNotFoundError):  # not made yet
                self.notes.append(f"{file} of {name} cannot be read: {found['error']}")
        self.predictions = cache(self._predictions)

    def read(self, path: str) -> str | None:
        """A file's text; None if it is not there."""
        try:
            return str(self.fs.read_text(f"/{path}", encoding="utf-8"))
        except FileNotFoundError:
            return None

    def row_files(self, path: str) -> dict[str, str | None]:
        """The JSONL files at a path, which may be a folder, and their MD5s where DVC has them."""
        files = [file for file in self.fs.find(f"/{path}") if file.lower().endswith(".jsonl")]
        return {file: self.fs.info(file).get("md5") for file in files}

    def rows(self, file: str) -> Iterator[bytes]:
        with self.fs.open(file, "rb") as lines:
            yield from filter(None, map(bytes.strip, lines))

    def half_width(self, file: str, metric: str) -> float | None:
        """Of the 95 % interval of a share of right answers; None of what is no such share."""
        if not re.match("exact|choice", metric):
            return None
        try:
            found = outcomes(self.predictions(self.maker.get(file)), metric)
        except (*LOST, ValueError, KeyError, TypeError):  # not here, or of another kind
            return None
        if not found:
            return None
        _, low, high = interval(found)
        return (high - low) / 2

    def _predictions(self, stage: str | None) -> list[dict[str, Any]]:
        outs = hashes(self.lock.get(stage or "", {}))
        files = [path for path in outs if path.endswith(".jsonl")]
        return [json.loads(row) for file in files for row in self.rows(f"/{file}")]


@contextmanager
def revisions(*names: str) -> Iterator[list[Revision]]:
    """Revisions of the project in the working folder, to be read while this is open.

    names: as git has them, experiments, or `workspace`.

    Raises:
        UserError: there is no such revision, or its dvc.lock is broken.
    """
    with ExitStack() as stack:
        found = []
        here = stack.enter_context(Repo())
        if not Path(here.root_dir).samefile("."):
            raise UserError(f"run from the project's root folder, {here.root_dir}.")
        config = dict(here.config)  # remotes of today, of config.local too
        for name in names:
            repo = stack.enter_context(Repo(config=config))
            if name != WORKSPACE:
                if isinstance(repo.scm, NoSCM):
                    raise UserError(
                        "the project is in no git repository: it has no revisions to compare; what "
                        "a checkpoint comes of is told without, as in minimind explain models/dpo."
                    )
                try:
                    stack.enter_context(repo.switch(name))
                except RevError:
                    if any(Path(folder, name).is_dir() for folder in CHECKPOINT_FOLDERS):
                        raise UserError(
                            f"{name} is a checkpoint, no revision; `minimind explain "
                            f"models/{name}` says what it comes of, and `minimind compare` which "
                            "of two is better."
                        ) from None
                    if lack := lack_of_commits(Path()):
                        raise UserError(lack) from None
                    raise UserError(
                        f"{name} is no revision, experiment or checkpoint here; `git log` and "
                        "`dvc exp list --all` have the names, `git fetch` (of a shallow clone with "
                        "--unshallow) and `dvc exp pull origin NAME` bring others."
                    ) from None
            with kept_from_dvc(Path()):
                found.append(Revision(name, repo))
        yield found


def explain(before: Revision, now: Revision) -> Explanation:
    """What differs between two revisions."""
    out_of_date = outdated(now.repo) if now.name == WORKSPACE else {}
    edited = {path for paths in out_of_date.values() for path in paths}
    if now.name == WORKSPACE and (running := running_stages(Path())):
        now.notes.append(f"stages that run: {', '.join(running)}; what they write is left out")
    differences = _Differences(before, now)
    stages = list(differences.stages())
    data, files = differences.data(edited)
    return Explanation(
        before=before.name,
        now=now.name,
        params=_sorted(differences.params),
        data=data,
        code=_sorted(differences.code),
        files=files,
        stages=stages,
        metrics=list(_metrics(before, now, out_of_date)),
        out_of_date=out_of_date,
        notes=[*before.notes, *now.notes],
    )


def outdated(repo: Repo) -> dict[str, list[str]]:
    """Stages of the workspace that are not what their entries of dvc.lock say, and why.

    What is missing counts for nothing: it may lie in the cache, or be in the making.
    """
    found = {}
    refuse_pipes(repo.index.stages)
    for stage in repo.index.stages:
        if stage.addressing.partition(":")[0].endswith("/dvc.yaml"):
            continue  # of a graph in a folder, which runs when it is asked for
        changed = ["its command"] if stage.is_data_source is False and stage.cmd_changed else []
        for item in (*stage.deps, *stage.outs):
            status = {p: s for p, s in item.workspace_status().items() if s != "deleted"}
            is_params = isinstance(item, ParamsDependency)
            changed += [key for keys in status.values() for key in keys] if is_params else status
        if changed:
            found[stage.addressing] = changed
    return found


class _Differences:
    """Between the entries of dvc.lock of two revisions."""

    def __init__(self, before: Revision, now: Revision) -> None:
        self.before, self.now = before, now
        self.listings = _code_listings(Path.cwd())
        self.params: dict[str, Root] = {}
        self.code: dict[str, Root] = {}
        self.files: dict[str, Root] = {}

    def stages(self) -> Iterator[StageChange]:
        before, now = self.before.lock, self.now.lock
        former = _former_names(before, now)
        for name, entry in now.items():
            was = former.get(name, name)
            if was not in before:
                yield StageChange(name, "new")
                continue
            because = list(dict.fromkeys(self._inputs(name, before[was], entry)))
            same = sorted(hashes(before[was]).values()) == sorted(hashes(entry).values())
            verdict: Verdict = "same outputs" if because else "not reached"
            if not same:
                verdict, because = "outputs changed", because or ["the same inputs: run elsewhere?"]
            yield StageChange(name, verdict, because, was if was != name else None)
        for name in before:
            if name not in now and name not in former.values():
                yield StageChange(name, "removed")

    def _inputs(self, stage: str, before: Entry, now: Entry) -> Iterator[str]:
        """What differs in what a stage was made of; what no stage makes is noted as a root."""
        if before.get("cmd") != now.get("cmd"):
            yield "its command"
        changes = diff(*({f: {"data": v} for f, v in _params(e).items()} for e in (before, now)))
        for file, values in changes.items():
            for key, change in sorted(values.items()):
                name = key if file == "params.yaml" else f"{file}: {key}"
                _note(self.params, name, change["old"], change["new"], stage)
                yield name
        olds, news = hashes(before, "deps"), hashes(now, "deps")
        for path in {**olds, **news}:
            old, new = olds.get(path), news.get(path)
            if old == new:
                continue
            if PurePosixPath(path).parts[0] == CODE.name:
                yield self._modules(stage, path)
                continue
            makers = [maker_of(path, revision.maker) for revision in (self.before, self.now)]
            if not any(makers) and CODE.name not in hashes(now):
                _note(self.files, path, old, new, stage)
            yield path

    def _modules(self, stage: str, path: str) -> str:
        olds, news = (self.listings.get(r.inputs.get(path, "")) for r in (self.before, self.now))
        if olds is None or news is None:
            return path
        changed = sorted({module for module, _ in olds.items() ^ news.items()})
        for module in changed:
            _note(self.code, module, olds.get(module), news.get(module), stage)
        return f"code of {some(changed)}"

    def data(self, edited: set[str]) -> tuple[list[DataChange], list[Root]]:
        """What differs in data, and files that differ and have no rows.

        edited: paths in the workspace that are no longer what was used.
        """
        names: dict[tuple[str | None, str | None], list[str]] = {}
        for key in {**self.before.data, **self.now.data}:
            before, now = self.before.data.get(key), self.now.data.get(key)
            if self.before.inputs.get(before or "") != self.now.inputs.get(now or ""):
                names.setdefault((before, now), []).append(key)
        named = {path for paths in names for path in paths}
        roots = [root for root in _sorted(self.files) if root.name not in named]
        for root in roots:
            names[root.before and root.name, root.now and root.name] = [root.name]
        found = {paths: self._rows(", ".join(n), *paths, edited) for paths, n in names.items()}
        rowless = {path for paths, change in found.items() if not change for path in paths}
        files = [root for root in _sorted(self.files) if root.name in rowless]
        return [change for change in found.values() if change], files

    def _rows(
        self, name: str, before: str | None, now: str | None, edited: set[str]
    ) -> DataChange | None:
        """What differs in rows; None of what has none."""
        if now in edited:
            return DataChange(name, before, now, note="edited since it was used")
        found: list[dict[str, str | None]] = []
        sides = [(self.before, before), (self.now, now)]
        for revision, path in sides:
            try:
                found.append(revision.row_files(path) if path else {})
            except LOST:
                return DataChange(name, before, now, note=_not_here(revision, path))
        if not any(found):
            return None
        alike = {file for file, md5 in found[0].items() if md5 and found[1].get(file) == md5}
        counts = Counter[int]()
        for (revision, path), files, sign in zip(sides, found, (-1, 1), strict=True):
            try:
                for file in files.keys() - alike:
                    for row in revision.rows(file):
                        counts[hash(row)] += sign
            except LOST:
                return DataChange(name, before, now, note=_not_here(revision, path))
        removed = -sum(count for count in counts.values() if count < 0)
        added = sum(count for count in counts.values() if count > 0)
        note = "" if removed or added else "the same rows in another order or layout"
        return DataChange(name, before, now, removed, added, note)


def hashes(entry: Entry, kind: Literal["deps", "outs"] = "outs") -> dict[str, str]:
    """MD5s of a stage's inputs or outputs by path, in its entry of dvc.lock."""
    return {item["path"]: str(item.get("md5")) for item in entry.get(kind, [])}


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _params(entry: Entry) -> dict[str, Any]:
    return entry.get("params") or {}


def _code_listings(root: Path) -> dict[str, dict[str, str]]:
    """Digests of modules in all versions of code/*.json that git has or that are here, by MD5.

    A commit may have another version than its dvc.lock says: code that has not run yet.
    """
    listed = git(root, "rev-list", "--objects", "--all", "--", CODE.name).splitlines()
    objects = b"\n".join(line.split()[0] for line in listed if line.endswith(b".json"))
    contents = BytesIO(git(root, "cat-file", "--batch", given=objects))
    texts = [contents.read(int(line.split()[-1]) + 1)[:-1] for line in contents]
    texts += [file.read_bytes() for file in (root / CODE).glob("*.json")]
    found = {}
    for text in texts:
        with suppress(ValueError):
            found[hashlib.md5(text, usedforsecurity=False).hexdigest()] = json.loads(text)
    return found


def _sorted(roots: Mapping[str, Root]) -> list[Root]:
    return [roots[name] for name in sorted(roots)]


def _note(roots: dict[str, Root], name: str, before: Any, now: Any, stage: str) -> None:
    root = roots.setdefault(name, Root(name, before, now))
    root.stages.append(stage)


def _former_names(before: Mapping[str, Entry], now: Mapping[str, Entry]) -> dict[str, str]:
    """Of stages that have another name and outputs of the same paths or contents."""
    gone = [name for name in before if name not in now]
    former: dict[str, str] = {}
    for name in now:
        for old in gone:
            olds, news = hashes(before[old]), hashes(now[name])
            if name in before or old in former.values() or not olds:
                continue
            if olds.keys() == news.keys() or sorted(olds.values()) == sorted(news.values()):
                former[name] = old
                break
    return former


def _not_here(revision: Revision, path: str | None) -> str:
    lost = f"rows of {path} of {revision.name} are in no cache or remote: "
    if not has_remote(Path()):
        return f"{lost}none is configured (`dvc remote add`) to bring them from elsewhere"
    return (
        f"{lost}`dvc push --all-commits` where they are, then `dvc fetch --all-commits {path}` here"
    )


def _metrics(
    before: Revision, now: Revision, out_of_date: Mapping[str, Sequence[str]]
) -> Iterator[MetricChange]:
    """Without files that are not what their own stage's entry of dvc.lock says, as if it runs."""
    for file, changes in sorted(diff(*map(format_dict, (before.metrics, now.metrics))).items()):
        is_recorded = now.name != WORKSPACE or file in now.metrics or file not in now.maker
        own = out_of_date.get(now.maker.get(file, ""), ())
        if file in own or not is_recorded:  # or not here: its stage is running, or was stopped
            continue
        for name, change in sorted(changes.items()):
            half_width = None
            if isinstance(change["new"], float | int):
                half_width = now.half_width(file, name.rpartition(".")[2])
            yield MetricChange(file, name, change["old"], change["new"], half_width)
