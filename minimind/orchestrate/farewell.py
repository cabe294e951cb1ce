"""The last lines of a run: what differs from the last commit, and three commands to go on with."""

import os
import shlex
import subprocess
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo

MOST_METRICS = 10


def farewell(tracked: Collection[str], what: str) -> Iterator[str]:
    """Lines about the project around the working directory; none where git has nothing to commit.

    tracked: files and folders for git that the run wrote, new ones in them count as changed;
    what: ran, for the commit's message.
    """
    repo = Repo()
    root = Path(os.path.relpath(repo.root_dir))
    changed = _listed(root, "diff", "--name-only", "--relative", "HEAD")
    if tracked:
        changed += _listed(Path(), "ls-files", "--others", "--exclude-standard", "--", *tracked)
    if not changed:
        return
    places = sorted({os.path.normpath(_place(file, root)) for file in changed})
    yield f"Since the last commit {len(set(changed))} files have changed: {', '.join(places)}"
    yield from _metrics_changed(repo)
    yield "Next:"
    add = shlex.join(["git", "add", *places])
    yield f"  {add} && git commit -m {shlex.quote(f'Run {what}')}"
    yield "  minimind verify  # that every output is what dvc.lock says"
    yield "  dvc exp run -S seed=2  # an experiment: any number of params.yaml"


def _place(file: Path, root: Path) -> Path:
    """A file of the project's folder, or else the folder in it that has the file."""
    return root / file.relative_to(root).parts[0]


def _listed(folder: Path, *command: str) -> list[Path]:
    """Files that git names, as seen from here; none if there is no commit, or no git."""
    done = subprocess.run(
        ["git", "-C", str(folder), *command[:1], "-z", *command[1:]],
        capture_output=True,
        check=False,
    )
    names = done.stdout.decode("utf-8", "surrogateescape").split("\0")
    return [folder / name for name in names if name]


def _metrics_changed(repo: Repo) -> Iterator[str]:
    try:
        files: Mapping[str, Any] = repo.metrics.diff().get("diff", {})
    except DvcException:  # as of a file that cannot be read: `dvc metrics diff` says which
        return
    rows = [
        (name, change["old"], change["new"])
        for _, metrics in sorted(files.items())
        for name, change in metrics.items()
        if change.get("old") is not None and change.get("new") is not None  # a stage's first run
    ]
    widest = max((len(name) for name, _, _ in rows[:MOST_METRICS]), default=0)
    for name, old, new in rows[:MOST_METRICS]:
        yield f"  {name:<{widest}}  {_short(old)} -> {_short(new)}"
    if (more := len(rows) - MOST_METRICS) > 0:
        yield f"  and {more} more: dvc metrics diff"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
