"""Which DVC process runs this stage. Starts fast: a stage looks before it imports what is slow."""

import json
from pathlib import Path

import psutil


def writers() -> set[int]:
    """Numbers of the DVC processes that run stages here, or were killed while they did.

    While it runs a stage, DVC has its process number in its list of who writes what; nobody takes
    it from there when DVC is killed. Empty where we cannot tell.
    """
    try:
        users = json.loads(Path(".dvc/tmp/rwlock").read_text(encoding="utf-8"))
        return {entry["pid"] for entry in users["write"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def our_dvc() -> psutil.Process | None:
    """The DVC process that runs this stage; None outside DVC."""
    candidates = writers()
    return next((p for p in psutil.Process().parents() if p.pid in candidates), None)
