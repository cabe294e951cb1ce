"""What the installed version changes in a project: its files merged with yours, its code noted.

A merge of three: the file as it was shipped (kept in `.minimind/`), as it is shipped now, and as it
is here, by `git merge-file`. Nothing is written before all is known to fit.
"""

import json
import logging
import subprocess
from collections.abc import Iterator
from contextlib import chdir, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import networkx as nx
from dvc.exceptions import DvcException
from dvc.repo import Repo

from minimind.errors import UserError
from minimind.files import replacing
from minimind.lineage.code import code_of, stage_names, write_code
from minimind.lineage.provenance import CODE, PROJECT
from minimind.orchestrate.graph import load_graph
from minimind.params import read_params
from minimind.project.template import first_files, kept_files

VERSION = PROJECT / "version"


@dataclass
class Upgrade:
    """What changes; of files that stay as they are there is nothing."""

    before: str  # version
    now: str
    files: dict[str, str] = field(default_factory=dict)  # their new contents
    conflicts: list[str] = field(default_factory=list)  # where yours and ours change the same lines
    values: list[str] = field(default_factory=list)  # a line for each that changes
    code: dict[str, list[str]] = field(default_factory=dict)  # modules, by stages/<name>.py
    stages: dict[str, str] = field(default_factory=dict)  # why each would run again


def create_project(folder: Path) -> None:
    """Write a new project; in a git repository it becomes a part of that.

    Raises:
        UserError: a file is there already, or git or DVC cannot be run. Nothing is written then.
    """
    files = {**kept_files(), **first_files()}
    there = [name for name in [*files, str(CODE), str(PROJECT)] if (folder / name).exists()]
    if there:
        raise UserError(
            f"{folder} has {', '.join(there)} already; name another folder, or if it is "
            "a project of `minimind init`, run `minimind upgrade` there."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file is in the way
        raise UserError(
            f"{folder} cannot be made: {error.strerror}; name another folder."
        ) from None
    below = _run(["git", "rev-parse", "--show-prefix"], folder, 0, 128)
    if below.returncode:
        _run(["git", "init", "-q"], folder)
    logging.getLogger("dvc").setLevel(logging.CRITICAL)  # what comes next, `init` says itself
    try:
        Repo.init(str(folder), subdir=bool(below.stdout.strip())).close()
    except DvcException as error:
        raise UserError(f"DVC cannot begin in {folder}: {error}") from None
    for name, text in files.items():
        _write(folder / name, text)
    _note(folder)


def plan_upgrade(root: Path) -> Upgrade:
    """What the installed version would change in a project.

    Raises:
        UserError: it is no such project, or a file of it cannot be read.
    """
    if not (root / VERSION).is_file():
        raise UserError(
            f"{root / VERSION} is missing: this is no project of `minimind init`; in a clone, "
            "`git pull` brings a new version."
        )
    upgrade = Upgrade((root / VERSION).read_text(encoding="utf-8").strip(), _version())
    for name, new in kept_files().items():
        shipped, here = root / PROJECT / name, root / name
        if not here.exists() and shipped.exists():
            continue  # you have removed it
        ours, base = _read(here), _read(shipped)
        merged, num_conflicts = _merge(ours, base, new)
        if num_conflicts:
            upgrade.conflicts.append(f"{name} ({num_conflicts})")
        elif merged != ours and here.suffix == ".yaml":
            upgrade.values += _changed_values(here, merged)
        if merged != ours:
            upgrade.files[name] = merged
    for stage in stage_names():
        file = root / CODE / f"{stage}.json"
        before: dict[str, str] = {}
        with suppress(ValueError, TypeError):  # what is broken is written anew
            before = dict(json.loads(_read(file)))
        if changed := before.items() ^ code_of(stage).items():
            upgrade.code[stage] = sorted({module for module, _ in changed})
    if not upgrade.conflicts and (upgrade.files or upgrade.code):
        upgrade.stages = dict(_stages_to_run(root, upgrade))
    return upgrade


def apply_upgrade(root: Path, upgrade: Upgrade) -> None:
    """Write it. Cut short, the next one goes on: the shipped files are noted last."""
    for name, text in upgrade.files.items():
        _write(root / name, text)
    _note(root)


def _note(root: Path) -> None:
    """The digests of the installed code, and the files as they are shipped with it."""
    write_code(root / CODE, stage_names())
    for name, text in kept_files().items():
        _write(root / PROJECT / name, text)
    _write(root / VERSION, f"{_version()}\n")


def _version() -> str:
    return version("minimind-dvc")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8") if file.exists() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None


def _write(file: Path, text: str) -> None:
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def _merge(ours: str, base: str, new: str) -> tuple[str, int]:
    """Our text with what changed from base to new, and how often both changed the same lines."""
    with TemporaryDirectory() as folder:
        for name, text in (("yours", ours), ("shipped before", base), ("shipped now", new)):
            Path(folder, name).write_text(text, encoding="utf-8")
        labels = ["yours", "shipped before", "shipped now"]
        done = _run(["git", "merge-file", "-p", *labels], Path(folder), *range(128))
    return done.stdout, done.returncode


def _run(command: list[str], folder: Path, *allowed: int) -> subprocess.CompletedProcess[str]:
    """What git says; raises UserError where it is missing, or does not end as allowed."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, encoding="utf-8", check=False
        )
    except FileNotFoundError:
        raise UserError("git is missing; install it.") from None
    if done.returncode not in (allowed or (0,)):
        raise UserError(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
    return done


def _changed_values(here: Path, merged: str) -> Iterator[str]:
    """A line for each value of a YAML file that a merge changes."""
    before, name = dict(_leaves(read_params(here))) if here.exists() else {}, here.name
    with TemporaryDirectory() as folder:
        (file := Path(folder, name)).write_text(merged, encoding="utf-8")
        try:
            now = dict(_leaves(read_params(file)))
        except UserError as error:  # yours is as YAML wants it, and so is ours: not both in one
            raise UserError(
                f"merged with the new version's, {error}".replace(f"{folder}/", "")
            ) from None
    for key in {**before, **now}:
        if key not in before:
            yield f"{name}: {key} is new: {_short(now[key])}"
        elif key not in now:
            yield f"{name}: {key} is gone; it was {_short(before[key])}"
        elif before[key] != now[key]:
            yield f"{name}: {key}: {_short(before[key])} -> {_short(now[key])}"


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield prefix, tree
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}"


def _stages_to_run(root: Path, upgrade: Upgrade) -> Iterator[tuple[str, str]]:
    """Stages that are not what they were, and those behind them."""
    with chdir(root):  # by which DVC names stages
        before = load_graph(Repo())
    with TemporaryDirectory() as folder:  # DVC reads the graph as it would be
        for file in root.iterdir():
            if file.is_file() and file.name not in upgrade.files:
                Path(folder, file.name).symlink_to(file.absolute())
        for name, text in upgrade.files.items():
            _write(Path(folder, name), text)
        try:
            with chdir(folder):
                after = load_graph(Repo(uninitialized=True))
            old, new = dict(before.nodes("stage")), dict(after.nodes("stage"))
            whys = {name: _why(old.get(name), new[name], upgrade) for name in new}
        except DvcException as error:
            raise UserError(f"with the new version's dvc.yaml: {error}; mend yours.") from None
    for name in nx.topological_sort(after):
        behind = [s for s in after.predecessors(name) if whys[s]]
        if behind and not whys[name]:
            whys[name] = f"after {', '.join(behind)}"
        if whys[name]:
            yield name, whys[name]


def _why(old: Any, new: Any, upgrade: Upgrade) -> str:
    """Why DVC would run a stage of the new graph again; empty if nothing tells that it would."""
    if old is None:
        return "new"
    whys = []
    paths = [dep.def_path for dep in new.deps if dep not in new.params]
    for path in map(Path, paths):
        if path.parent == CODE and (modules := upgrade.code.get(path.stem)):
            more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
            whys.append(f"code of {', '.join(modules[:3])}{more}")
    if (old.cmd, *_ends(old)) != (new.cmd, *_ends(new)):
        whys.append("its command or paths")
    params, were = _params(new), _params(old)
    whys += [key for key in {**were, **params} if were.get(key) != params.get(key)]
    whys += [path for path in paths if path in upgrade.files]
    return ", ".join(whys)


def _ends(stage: Any) -> tuple[list[str], list[str]]:
    return sorted(d.def_path for d in stage.deps), sorted(o.def_path for o in stage.outs)


def _params(stage: Any) -> dict[str, Any]:
    """The values of the parameters that a stage tracks."""
    return {key: value for dep in stage.params for key, value in dep.read_params().items()}
