"""The last lines of a run: what git has not seen, and a command that commits all of it."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from minimind.orchestrate.farewell import MOST_METRICS, farewell
from tests.project import dvc, git

WHAT = "it's all"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "test")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "test@example.org")
    stage = {"cmd": "true", "metrics": [{"metrics/a.json": {"cache": False}}]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"a": stage}}))
    Path("params.yaml").write_text("seed: 1\n")
    Path("metrics").mkdir()
    Path("metrics/a.json").write_text(json.dumps({"a": {"loss": 1.0, "steps": 3}}))
    git(tmp_path, "init", "-q")
    dvc(tmp_path, "init", "-q")
    return tmp_path


def commit_of(lines: list[str]) -> str:
    return lines[lines.index("Next:") + 1].strip()


def test_a_run_ends_with_what_has_changed_and_the_command_commits_it(project: Path) -> None:
    tracked = {"dvc.lock", "metrics"}
    first = list(farewell(tracked, WHAT))  # before the first commit
    assert first[1] == "Next:"
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "before")
    assert list(farewell(tracked, WHAT)) == []

    Path("params.yaml").write_text("seed: 2\n")
    Path("metrics/a.json").write_text(json.dumps({"a": {"loss": 0.123456, "steps": 3}}))
    Path("metrics/b.json").write_text(json.dumps({"of a stage that is new": 1}))
    Path("dvc.lock").write_text("schema: '2.0'\n")
    Path("my notes.txt").write_text("of mine\n")  # none of a run's business
    lines = list(farewell(tracked, WHAT))
    assert lines[:2] == [
        "Since the last commit 4 files have changed: dvc.lock, metrics, params.yaml",
        "  a.loss  1 -> 0.1235",
    ]
    assert len(lines) - lines.index("Next:") == 4
    subprocess.run(commit_of(lines), shell=True, check=True, capture_output=True)
    assert list(farewell(tracked, WHAT)) == []
    assert git(project, "status", "--short").strip() == '?? "my notes.txt"'
    assert git(project, "log", "-1", "--format=%s").strip() == f"Run {WHAT}"


def test_many_metrics_are_counted_and_paths_are_from_where_one_stands(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (0, 1):
        Path("metrics/a.json").write_text(json.dumps({f"m{i}": value for i in range(25)}))
        git(project, "add", ".")
        if not value:
            git(project, "commit", "-q", "-m", "before")
    lines = list(farewell((), WHAT))
    assert sum("0 -> 1" in line for line in lines) == MOST_METRICS
    assert f"  and {25 - MOST_METRICS} more: dvc metrics diff" in lines
    Path("folder").mkdir()
    monkeypatch.chdir("folder")
    add = shlex.split(commit_of(list(farewell((), WHAT))))
    assert add[:3] == ["git", "add", os.path.join("..", "metrics")]
