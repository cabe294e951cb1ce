"""A copy of the project with a tiny configuration, in a git repository of its own.

What an experiment has left in the workspace is no part of it: see tests/shipped.py.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from minimind.cli.presets import merge, read_preset
from tests.graph import ROOT
from tests.shipped import shipped_params


def copy_project(directory: Path) -> Path:
    """The project's files as they are in the working tree, with tiny numbers, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(
            ("metrics/", "dvc.lock", "docs/", "tools/")
        ):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, directory / name)
    params = merge(shipped_params(), read_preset(ROOT / "presets", "tiny"))
    (directory / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    _keep_the_chain(directory / "dvc.yaml")
    git(directory, "init", "-q")
    git(directory, "add", "-A")
    git(directory, "commit", "-qm", "tiny")
    return directory


# The stages of a tiny project, and the variants of those that have some: as much graph as the
# everyday commands need, so that all of it is run in seconds.
CHAIN: dict[str, list[str]] = {
    "code": [],
    "check": [],
    "mini_world": [],
    "tokenizer": [],
    "encode": ["pretrain", "sft", "dpo", "reason"],
    "pretrain": [],
    "sft": [],
    "reference": [],
    "dpo": [],
    "reason": [],
    "evaluate": ["sft", "reason"],
}


def _keep_the_chain(graph: Path) -> None:
    contents = yaml.safe_load(graph.read_text(encoding="utf-8"))
    del contents["plots"]
    contents["stages"] = {name: contents["stages"][name] for name in CHAIN}
    for name, variants in CHAIN.items():
        stage = contents["stages"][name]
        if variants:
            stage["foreach"] = {variant: stage["foreach"][variant] for variant in variants}
    graph.write_text(yaml.safe_dump(contents, sort_keys=False))


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return _run(directory, ["git", *identity, *arguments])


def dvc(directory: Path, *arguments: str, expect: int = 0, **environment: str) -> str:
    """Run dvc as a user would; returns what it printed on both streams."""
    return _run(directory, [sys.executable, "-m", "dvc", *arguments], expect, environment)


def minimind(directory: Path, *arguments: str, expect: int = 0, **environment: str) -> str:
    command = [sys.executable, "-m", "minimind.cli.main", *arguments]
    return _run(directory, command, expect, {"PYTHONPATH": str(ROOT), **environment})


def _run(
    directory: Path,
    command: list[str],
    expect: int = 0,
    environment: dict[str, str] | None = None,
) -> str:
    python_folder = os.path.dirname(sys.executable)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DVC_", "MINIMIND_", "PYTHONPATH"))
    }
    result = subprocess.run(
        command,
        cwd=directory,
        env=inherited
        | {"PATH": f"{python_folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == expect, f"{command} gave {result.returncode}:\n{result.stdout}"
    return result.stdout


def share(project: Path, remote: Path | str, **environment: str) -> None:
    """As docs/project.md says, without pushing to where clones are made from."""
    dvc(project, "remote", "add", "-d", "store", str(remote))
    if endpoint := environment.get("ENDPOINT"):
        dvc(project, "remote", "modify", "store", "endpointurl", endpoint)
    git(project, "add", "-A")
    git(project, "commit", "-qm", "A store")
    minimind(project, "push", **environment)


def clone_of(project: Path, clone: Path) -> Path:
    git(project, "clone", "-q", str(project), str(clone))
    return clone


def stages_run(printed: str) -> list[str]:
    """Names of the stages that dvc says it ran."""
    return [line.split("'")[1] for line in printed.splitlines() if line.startswith("Running stage")]


def file_bytes(directory: Path, *folders: str) -> dict[str, bytes]:
    """Contents of every file below some folders of a project, by path."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for folder in folders
        for path in sorted((directory / folder).rglob("*"))
        if path.is_file()
    }
