"""What is trained, to and from a remote, with all that was ever run.

`dvc push --run-cache` leaves out metrics, which git keeps (`cache: false`); without them no other
clone can bring back a past run. DVC's cache has their contents, so they are sent beside it.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dvc.repo import Repo
from dvc.utils.serialize import load_yaml
from dvc_data.hashfile.hash_info import HashInfo

from minimind.errors import UserError
from minimind.lineage.repository import said_by_dvc
from minimind.lineage.run_cache import as_of_elsewhere, copies


def push() -> int:
    """Send outputs, past runs and their metrics; returns the number of files.

    Raises:
        UserError: there is no project or remote, or it cannot be reached.
    """
    with dvc_project() as repo:
        sent = repo.push(run_cache=True)
        result = repo.cloud.push(_outputs_of_runs(repo, repo.cache.local.exists))
        if result.failed:
            raise UserError(f"{len(result.failed)} files could not be sent; run it again.")
        return sent + len(result.transferred)


def pull() -> int:
    """Bring outputs, past runs and their metrics; what nobody has sent is no error.

    Raises:
        UserError: there is no project or remote, or it cannot be reached.
    """
    with dvc_project() as repo:
        if not repo.config["core"].get("remote"):
            raise UserError(
                "the project has no default remote; `dvc remote add --default NAME ADDRESS` gives "
                "it one, and docs/project.md has examples."
            )
        with as_of_elsewhere(repo):
            brought = repo.pull(run_cache=True, allow_missing=True)["stats"]["fetched"]
        lacking = _outputs_of_runs(repo, lambda md5: not repo.cache.local.exists(md5))
        return brought + len(repo.cloud.pull(lacking).transferred)


def _outputs_of_runs(repo: Repo, wanted: Callable[[str], bool]) -> set[HashInfo]:
    """The single files among the outputs of past runs."""
    entries: list[Any] = [load_yaml(copy) for copy in copies(repo)]
    hashes = {out.get("md5", ".dir") for entry in entries for out in entry.get("outs", [])}
    return {HashInfo("md5", md5) for md5 in hashes if not md5.endswith(".dir") and wanted(md5)}


@contextmanager
def dvc_project() -> Iterator[Repo]:
    """DVC's view of the project that we are in; what DVC raises becomes one line."""
    logging.getLogger("dvc").setLevel(logging.CRITICAL)  # it is said in a line
    try:
        with Repo() as repo:
            yield repo
    except UserError:
        raise
    except Exception as error:  # of DVC or of the library of any kind of remote
        raise said_by_dvc(error, "see docs/project.md") from None
