"""DVC's run cache: a copy of each entry of dvc.lock that DVC wrote, here or elsewhere.

Those that `minimind pull` brings are made older than any run, which tells them from one's own. Of
the same inputs DVC takes the newest.
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

_ELSEWHERE = 0.0  # the time of what another machine wrote


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
            time = before.get(copy, _ELSEWHERE)  # a pull writes again what is here
            os.utime(copy, (time, time))


def was_pulled(root: Path, entry: Mapping[str, Any]) -> bool:
    """Whether `minimind pull` has brought a stage's entry of dvc.lock.

    Raises:
        UserError: DVC has no project at root, or cannot read its config.
    """
    try:
        pulled = [file for file in copies(Repo(str(root))) if file.stat().st_mtime == _ELSEWHERE]
        return any(_said(load_yaml(file)) == _said(entry) for file in pulled)
    except DvcException as error:
        raise said_by_dvc(error) from None


def _said(entry: Mapping[str, Any]) -> Any:
    """What an entry says of its run, without sizes."""
    listed = [entry.get("deps", []), entry.get("outs", [])]
    return [{one["path"]: one.get("md5") for one in of} for of in listed], entry.get("params", {})
