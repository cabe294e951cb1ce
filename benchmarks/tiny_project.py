"""The last commit with the numbers of preset `tiny`, in a git repository of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def copy_project(directory: Path) -> Path:
    """The project without what its stages have written."""
    directory.mkdir(parents=True, exist_ok=True)
    archive = ["git", "archive", "HEAD", "--", ".", ":!metrics", ":!dvc.lock", ":!docs"]
    packed = subprocess.run(archive, cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=directory, input=packed, check=True)
    _run(directory, [sys.executable, "-m", "minimind.cli.main", "preset", "tiny"])
    git(directory, "init", "-q")
    git(directory, "add", "-A")
    git(directory, "commit", "-qm", "tiny")
    return directory


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@example.org"]
    return _run(directory, ["git", *identity, *arguments])


def dvc(directory: Path, *arguments: str, **environment: str) -> str:
    return _run(directory, [sys.executable, "-m", "dvc", *arguments], environment)


def _run(directory: Path, command: list[str], environment: dict[str, str] | None = None) -> str:
    """What a command printed on both streams; it must succeed, without our settings."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MINIMIND_"))}
    inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=directory,
        env=inherited | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} gave {done.returncode}:\n{done.stdout}"
    return done.stdout
