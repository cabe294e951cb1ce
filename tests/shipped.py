"""params.yaml as git has it, whatever an experiment has left in the workspace.

Tests take from here what they do not set themselves: the values of the last commit, for the keys
that there are now, so that a new one can be tested before it is committed. Seed and number format
are the tests' own, since a commit may hold others as well.
"""

import subprocess
from typing import Any

import yaml

from tests.graph import ROOT

# As minimind.params has them. The kills of benchmarks/ start stages from a process that has this
# module, but nothing of minimind yet.
SHARED = ("seed", "dtype")


def shipped_params() -> dict[str, Any]:
    now = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return as_shipped(now, yaml.safe_load(committed("params.yaml")))


def as_shipped(now: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    return _sections(now, then) | {"seed": 1, "dtype": "bfloat16"}


def committed(path: str) -> str:
    """A file's contents in the last commit."""
    command = ["git", "show", f"HEAD:{path}"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, check=True, encoding="utf-8"
    ).stdout


def _sections(now: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in now.items():
        if isinstance(value, dict) and isinstance(then.get(key), dict):
            values[key] = _sections(value, then[key])
        else:
            # In a section, null is the top level's.
            values[key] = None if key in SHARED else then.get(key, value)
    return values
