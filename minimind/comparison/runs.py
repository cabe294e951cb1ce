"""Runs of the graph, in the workspace, a commit or an experiment, and the checkpoints they made."""

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

from minimind.comparison.paired import Outcomes, outcomes
from minimind.comparison.seeds import Seeds
from minimind.errors import UserError
from minimind.lineage.dvc_files import kept_from_dvc, variants
from minimind.lineage.repository import lack_of_commits, said_by_dvc
from minimind.report.results import parse_predictions

if TYPE_CHECKING:
    from dvc.api import DVCFileSystem

PREFIX = "evaluate@"  # of the stages whose predictions are compared
WORKSPACE = "workspace"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # faster where there is libyaml


@dataclass(frozen=True)
class Run:
    """What dvc.lock says of the graph somewhere."""

    name: str
    files: "DVCFileSystem"  # its files; what DVC tracks comes from the cache, or a remote
    stages: dict[str, Any]  # of dvc.lock, those that dvc.yaml has

    @classmethod
    def of(cls, name: str, files: "DVCFileSystem") -> "Run":
        try:
            graph, lock = (
                yaml.load(files.read_text(file), _Loader)["stages"]
                for file in ("dvc.yaml", "dvc.lock")
            )
            graph = {stage for stage, _, _ in variants(graph)}
            return cls(name, files, {stage: lock[stage] for stage in lock if stage in graph})
        except FileNotFoundError as error:
            raise UserError(
                f"{name} has no {PurePosixPath(str(error.filename or error)).name}; name a run of "
                "the graph, from the project's root folder."
            ) from None
        except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{name}: dvc.yaml or dvc.lock is not as DVC writes it; take them from git."
            ) from None

    def checkpoints(self) -> list["Checkpoint"]:
        names = (stage.removeprefix(PREFIX) for stage in self.stages if stage.startswith(PREFIX))
        return [Checkpoint(self, name) for name in names]

    def find(self, said: str) -> "Checkpoint | None":
        """The checkpoint with a name, as `dpo`, or a path, as `models/dpo`."""
        path = said.rstrip("/")
        for checkpoint in self.checkpoints():
            made = [dep["path"] for dep in checkpoint.stage.get("deps", [])]
            if said == checkpoint.name or ("/" in path and path in made):
                return checkpoint
        return None


@dataclass(frozen=True)
class Checkpoint:
    """An evaluated checkpoint of a run."""

    run: Run
    name: str

    def __str__(self) -> str:
        return self.name if self.run.name == WORKSPACE else f"{self.name}@{self.run.name}"

    @property
    def stage(self) -> dict[str, Any]:
        return self.run.stages[PREFIX + self.name]

    @property
    def predictions(self) -> dict[str, Any]:
        """The entry of the file of predictions in dvc.lock."""
        try:
            return next(out for out in self.stage["outs"] if out["path"].endswith(".jsonl"))
        except (StopIteration, KeyError, TypeError):
            raise UserError(f"{self}: its evaluation in dvc.lock has no predictions.") from None

    @cached_property
    def outcomes(self) -> Outcomes:
        """Of the predictions that dvc.lock names; without them, of those in the workspace.

        Raises:
            UserError: they are in neither cache, remote nor workspace.
        """
        path = self.predictions["path"]
        where = path if self.run.name == WORKSPACE else f"{self.run.name}:{path}"
        files = self.run.files
        try:
            try:
                text = files.repo.datafs.read_text(path, "utf-8")
            except OSError:
                text = files.read_text(path, "utf-8")
            return outcomes(parse_predictions(text, where))
        except UnicodeDecodeError:
            raise UserError(f"{where} is not UTF-8; run the evaluate stage.") from None
        except OSError:
            raise UserError(
                f"{where} is in neither workspace, cache nor remote; run "
                f"`dvc repro {PREFIX}{self.name}` there."
            ) from None

    @cached_property
    def origin(self) -> tuple[str, Seeds] | None:
        """All that the predictions come of but seeds, and these.

        None where stages in dvc.lock are of different runs: the predictions are out of date.
        """
        stages = self.run.stages
        makers = {
            out["path"]: (name, out.get("md5"))
            for name, stage in stages.items()
            if name != "code"  # whose inputs change with every comment; its outputs count
            for out in stage.get("outs", [])
        }
        came_of: dict[str, Any] = {}
        seeds: dict[str, Any] = {}
        todo = [PREFIX + self.name]
        while todo:
            name = todo.pop()
            if name in came_of:
                continue
            given = {}
            for dep in stages[name].get("deps", []):
                path = PurePosixPath(dep["path"])
                made = next((p for p in map(str, (path, *path.parents)) if p in makers), None)
                if made is None:
                    given[dep["path"]] = dep.get("md5")
                    continue
                maker, md5 = makers[made]
                if made == dep["path"] and md5 != dep.get("md5"):
                    return None
                todo.append(maker)
            kept, own = _without_seeds(stages[name].get("params", {}))
            if any(seeds.setdefault(key, value) != value for key, value in own.items()):
                return None
            came_of[name] = [stages[name].get("cmd"), given, kept]
        found = tuple(f"{key}={value}" for key, value in sorted(seeds.items()))
        return json.dumps(came_of, sort_keys=True), found


def _without_seeds(values: Any, prefix: str = "") -> tuple[Any, dict[str, Any]]:
    """Parameters but seeds, and these by their full names."""
    if not isinstance(values, dict):
        return values, {}
    kept: dict[str, Any] = {}
    seeds: dict[str, Any] = {}
    for key, value in values.items():
        if key != "seed":
            kept[key], below = _without_seeds(value, f"{prefix}{key}.")
            seeds |= below
        elif value is not None:  # a section's own; with null it has the top level's
            seeds[prefix + key] = value
    return kept, seeds


class Project:
    """Runs of the project in the working folder.

    Raises:
        UserError: there is none.
    """

    def __init__(self) -> None:
        from dvc.api import DVCFileSystem
        from dvc.exceptions import DvcException

        self._open = DVCFileSystem
        try:
            files = DVCFileSystem(".")
            self._repo = files.repo
            with kept_from_dvc(Path()):
                self.workspace = Run.of(WORKSPACE, files)
        except DvcException as error:
            raise said_by_dvc(error) from None
        self._runs: dict[str, Run] = {}  # by commit

    def __enter__(self) -> "Project":
        return self

    def __exit__(self, *error: object) -> None:
        for run in [self.workspace, *self._runs.values()]:
            run.files.repo.close()

    def run(self, revision: str, commit: str | None = None) -> Run:
        """Of a revision or experiment, or a commit under that name.

        Raises:
            UserError: git and DVC know no such thing.
        """
        from dvc.scm import SCMError, resolve_rev
        from scmrepo.exceptions import SCMError as GitError

        try:
            commit = commit or resolve_rev(self._repo.scm, revision)
        except (SCMError, GitError):  # without git, and without a commit, too
            known = ", ".join(checkpoint.name for checkpoint in self.workspace.checkpoints())
            advice = lack_of_commits(Path()) or "`dvc exp list --all-commits` has experiments."
            raise UserError(
                f"{revision!r} is no evaluated checkpoint ({known}), revision or experiment; "
                f"{advice}"
            ) from None
        if commit not in self._runs:
            self._runs[commit] = Run.of(revision, self._open(".", rev=commit))
        return self._runs[commit]

    @cached_property
    def _every_run(self) -> list[Run]:
        """The workspace, branches, tags and experiments, as far as they have the graph."""
        from dvc.scm import NoSCM

        runs = [self.workspace]
        if isinstance(self._repo.scm, NoSCM):
            return runs
        named = [
            (name, None) for name in self._repo.scm.list_branches() + self._repo.scm.list_tags()
        ]
        for of_commit in self._repo.experiments.ls(all_commits=True).values():
            named += of_commit
        for name, commit in named:
            with suppress(UserError):
                runs.append(self.run(name, commit))
        return runs

    def parse(self, said: str) -> "Checkpoint | Run":
        """`dpo`, `models/dpo`: in the workspace; `dpo@main`, `main:models/dpo`: of a revision or
        experiment; `main`: all of its checkpoints.

        Raises:
            UserError: there is no such thing.
        """
        revision, colon, name = said.partition(":")
        if not colon:
            name, _, revision = said.partition("@")
            if revision.startswith("{") or not name:  # git's HEAD@{1} and @
                name, revision = "", said
        if not name or not revision:
            return (not revision and self.workspace.find(name)) or self.run(said)
        run = self.run(revision)
        if (found := run.find(name)) is None:
            known = ", ".join(checkpoint.name for checkpoint in run.checkpoints())
            raise UserError(f"{revision} has no evaluated checkpoint {name!r}; it has {known}.")
        return found

    def siblings(self, checkpoint: Checkpoint) -> dict[Seeds, Checkpoint]:
        """The same checkpoint of runs that differ in nothing but the seed; itself comes first."""
        if checkpoint.origin is None:
            return {}
        same, seeds = checkpoint.origin
        found = {seeds: checkpoint}
        for run in self._every_run:
            for other in run.checkpoints():
                if other.name == checkpoint.name and other.origin and other.origin[0] == same:
                    found.setdefault(other.origin[1], other)
        return found
