"""DVC's run cache has a copy of each entry that DVC wrote into dvc.lock.

The time of a copy is when DVC wrote the entry, but for those that `minimind pull` brings: they are
made older than any run, as nothing was written here. DVC takes the newest of the same inputs.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.serialize import load_yaml

from minimind.lineage.repository import said_by_dvc

ELSEWHERE = 0.0  # the time of what another machine wrote


def copies(repo: Repo) -> list[Path]:
    """The run cache's files: YAML, as an entry of dvc.lock each."""
    return [*Path(repo.stage_cache.cache_dir).glob("*/*/*")]


@contextmanager
def as_of_elsewhere(repo: Repo) -> Iterator[None]:
    """What comes into the run cache meanwhile was written by another machine."""
    before = {copy: copy.stat().st_mtime for copy in copies(repo)}
    try:
        yield
    finally:
        for copy in copies(repo):
            time = before.get(copy, ELSEWHERE)  # a pull writes again what is here
            os.utime(copy, (time, time))


def was_written_here(root: Path, entry: Mapping[str, Any], since: float) -> bool:
    """Whether DVC itself wrote a stage's entry of dvc.lock here, at a time or after it.

    since: in seconds of the epoch.

    Raises:
        UserError: DVC has no project at root, or cannot read its config.
    """
    try:
        written = [file for file in copies(Repo(str(root))) if file.stat().st_mtime >= since]
        hashes = [str(out.get("md5")) for out in entry.get("outs", [])]
        texts = [(file, file.read_text(encoding="utf-8")) for file in written]
        likely = [file for file, text in texts if all(md5 in text for md5 in hashes)]
        return any(_said(load_yaml(file)) == _said(entry) for file in likely)
    except DvcException as error:
        raise said_by_dvc(error) from None


def _said(entry: Mapping[str, Any]) -> Any:
    """What an entry says of its run, without sizes."""
    listed = [entry.get("deps", []), entry.get("outs", [])]
    return [{one["path"]: one.get("md5") for one in of} for of in listed], entry.get("params", {})
