"""Entries of dvc.lock that another clone wrote, and git or `minimind pull` has brought here.

Git's reflog tells who made a commit: one made here stands in it as such, another's came by pull,
merge or checkout. Merges do not count: what they put together of two entries nobody has run.
"""

import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

LOCK = "./dvc.lock"  # in git's words, of the folder that it is asked in
_ENTRY = re.compile(r"^  \S.*:\n(?:   .*\n)*", re.MULTILINE)
_MADE_HERE = re.compile(
    r"commit\b|cherry-pick|revert|am\b|.*\((pick|reword|edit|squash|fixup|continue)\)"
)


class Brought:
    """What another clone wrote of the project's dvc.lock, as far as this one knows."""

    def __init__(self, root: Path, lock: str) -> None:
        """lock: the text of dvc.lock."""
        self.root = root
        self.entries = {text.partition(":\n")[0].strip(): text for text in _split(lock)}

    def has(self, stage: str, entry: Mapping[str, Any]) -> bool:
        """Whether another clone wrote a stage's entry.

        Raises:
            UserError: DVC has no project here, or cannot read its config.
        """
        if self.entries.get(stage) in self._of_other_clones:
            return True
        # At the top this would double the time of every command: it is DVC's.
        from minimind.lineage.run_cache import was_pulled

        return was_pulled(self.root, entry)

    @cached_property
    def _of_other_clones(self) -> set[str]:
        return {text for changed in self._changes() for text in changed}

    def _changes(self) -> Iterator[set[str]]:
        """The entries that each commit of another clone has changed; nothing without git."""
        # Of HEAD, and of branches, which other worktrees have in common with this one.
        logs = ["--walk-reflogs", "--format=%H %gs", "HEAD", "--branches"]
        made = self._git("log", *logs).splitlines()
        if not made:  # git keeps none, so that nobody knows who made what
            return
        here = {line.split()[0] for line in made if _MADE_HERE.match(line.partition(" ")[2])}
        revisions = ["HEAD", "--branches", "--remotes", "--tags"]
        listed = self._git("rev-list", "--no-merges", "--full-history", *revisions, "--", LOCK)
        for commit in listed.split():
            if commit not in here:
                after, before = (self._git("show", f"{r}:{LOCK}") for r in (commit, f"{commit}^"))
                yield {*_split(after)} - {*_split(before)}

    def _git(self, *arguments: str) -> str:
        """What git prints; nothing where it fails, as where there is no repository."""
        command = ["git", *arguments]
        try:
            done = subprocess.run(command, cwd=self.root, capture_output=True, check=False)
        except OSError:
            return ""
        return "" if done.returncode else done.stdout.decode("utf-8", "replace")


def _split(lock: str) -> list[str]:
    """The text of each entry of a dvc.lock."""
    return _ENTRY.findall(lock)
