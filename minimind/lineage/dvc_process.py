"""Which DVC process runs this stage. Starts fast: a stage looks before it imports what is slow."""

import json
import os
import time
from pathlib import Path

import psutil

# On another machine no ancestor is DVC: there this says who it is, as "<pid> <time of creation>".
DVC_ELSEWHERE = "MINIMIND_DVC"


def writers(root: Path = Path()) -> dict[str, int]:
    """What DVC processes that run stages here write, or wrote when they were killed, and who does.

    While it runs a stage, DVC has paths and its process number in its list of who writes what;
    nobody takes them from there when DVC is killed. Empty where we cannot tell.
    """
    for _ in range(20):
        try:
            users = json.loads((root / ".dvc/tmp/rwlock").read_text(encoding="utf-8"))
            return {path: entry["pid"] for path, entry in users["write"].items()}
        except ValueError:  # one of several DVC processes is just writing it
            time.sleep(0.01)
        except (OSError, KeyError, TypeError, AttributeError):
            break
    return {}


def is_elsewhere() -> bool:
    """Whether a launcher has started this process for the one that DVC started."""
    return DVC_ELSEWHERE in os.environ


def our_dvc() -> tuple[int, float] | None:
    """Number and time of creation of the DVC process that runs this stage; None outside DVC."""
    if is_elsewhere():
        pid, _, created = os.environ[DVC_ELSEWHERE].partition(" ")
        return (int(pid), float(created)) if pid else None
    candidates = {*writers().values()}
    found = next((p for p in psutil.Process().parents() if p.pid in candidates), None)
    return (found.pid, found.create_time()) if found else None
