"""Which entries of dvc.lock another clone wrote: by git's reflog, and by what DVC was brought."""

import shutil
from pathlib import Path

import pytest

from minimind.lineage.brought import Brought
from tests.project import dvc, git


def entry(stage: str, lr: float, epochs: int) -> str:
    params = f"    params:\n      params.yaml:\n        lr: {lr}\n        epochs: {epochs}\n"
    return f"  {stage}:\n    cmd: python {stage}.py\n{params}    outs:\n    - path: {stage}\n"


def commit(clone: Path, *entries: str) -> str:
    """dvc.lock with these entries, committed there; its text."""
    text = "schema: '2.0'\nstages:\n" + "".join(entries)
    (clone / "dvc.lock").write_text(text, encoding="utf-8")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "run")
    return text


def stages_of_others(clone: Path) -> set[str]:
    brought = Brought(clone, (clone / "dvc.lock").read_text(encoding="utf-8"))
    return {stage for stage in brought.entries if brought.has(stage, {})}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    project = tmp_path / "mine"
    project.mkdir()
    git(project, "init", "-q", "-b", "main")
    dvc(project, "init", "-q")
    commit(project, entry("sft", 0.1, 1), entry("dpo", 0.1, 1))
    return project


@pytest.fixture
def theirs(mine: Path, tmp_path: Path) -> Path:
    git(tmp_path, "clone", "-q", "mine", "theirs")
    return tmp_path / "theirs"


def test_what_was_committed_here_is_of_nobody_else(mine: Path) -> None:
    commit(mine, entry("sft", 0.2, 1), entry("dpo", 0.1, 1))
    git(mine, "commit", "-q", "--amend", "-m", "amended")
    assert stages_of_others(mine) == set()


def test_what_was_committed_in_another_worktree_is_of_nobody_else(mine: Path) -> None:
    git(mine, "worktree", "add", "-q", "../tree", "-b", "tree")
    commit(mine.parent / "tree", entry("sft", 0.2, 1), entry("dpo", 0.1, 1))
    git(mine, "merge", "-q", "tree")
    assert "lr: 0.2" in (mine / "dvc.lock").read_text(encoding="utf-8")
    assert stages_of_others(mine) == set()


def test_a_clone_has_all_of_others_but_what_it_commits(mine: Path, theirs: Path) -> None:
    assert stages_of_others(theirs) == {"sft", "dpo"}
    commit(theirs, entry("sft", 0.2, 1), entry("dpo", 0.1, 1))
    assert stages_of_others(theirs) == {"dpo"}
    git(mine, "pull", "-q", "../theirs", "main")
    assert stages_of_others(mine) == {"sft"}


@pytest.mark.parametrize("how", ["merge", "rebase"])
def test_what_git_puts_together_of_two_entries_nobody_has_run(
    mine: Path, theirs: Path, how: str
) -> None:
    """Lines of one entry that do not touch each other merge without a conflict."""
    spaced = [f"    - path: {number}\n" for number in range(8)]
    for clone, lr, last in ((theirs, 0.2, "last"), (mine, 0.1, "mine")):
        commit(clone, entry("sft", lr, 1), *spaced, f"    - path: {last}\n", entry("dpo", 0.1, 1))
    git(mine, "fetch", "-q", "../theirs", "main")
    if how == "merge":
        git(mine, "merge", "-q", "-X", "ours", "--no-edit", "FETCH_HEAD")
    else:
        git(mine, "rebase", "-q", "-X", "theirs", "FETCH_HEAD")
    text = (mine / "dvc.lock").read_text(encoding="utf-8")
    assert "lr: 0.2" in text and "path: mine" in text
    assert stages_of_others(mine) == set()
    (mine / "file").write_text("more")
    git(mine, "add", "-A")
    git(mine, "commit", "-qm", "A commit after it")
    assert stages_of_others(mine) == set()


def test_what_is_picked_from_another_clone_is_of_that(mine: Path, theirs: Path) -> None:
    commit(theirs, entry("sft", 0.2, 1), entry("dpo", 0.1, 1))
    git(mine, "commit", "-q", "--allow-empty", "-m", "so that it becomes another commit")
    git(mine, "remote", "add", "theirs", "../theirs")
    git(mine, "fetch", "-q", "theirs")
    git(mine, "cherry-pick", "theirs/main")
    assert stages_of_others(mine) == {"sft"}


def test_without_git_or_its_reflog_nobody_knows(theirs: Path) -> None:
    shutil.rmtree(theirs / ".git/logs")
    assert stages_of_others(theirs) == set()
    (theirs / ".git").rename(theirs / "no git")
    (theirs / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    assert stages_of_others(theirs) == set()
