"""Which DVC process runs this stage. Starts fast: a stage looks before it imports what is slow."""

import json
import time
from pathlib import Path

import psutil


def writers() -> set[int]:
    """Numbers of the DVC processes that run stages here, or were killed while they did.

    While it runs a stage, DVC has its process number in its list of who writes what; nobody takes
    it from there when DVC is killed. Empty where we cannot tell.
    """
    for _ in range(20):
        try:
            users = json.loads(Path(".dvc/tmp/rwlock").read_text(encoding="utf-8"))
            return {entry["pid"] for entry in users["write"].values()}
        except ValueError:  # one of several DVC processes is just writing it
            time.sleep(0.01)
        except (OSError, KeyError, TypeError, AttributeError):
            break
    return set()


def our_dvc() -> psutil.Process | None:
    """The DVC process that runs this stage; None outside DVC."""
    candidates = writers()
    return next((p for p in psutil.Process().parents() if p.pid in candidates), None)
