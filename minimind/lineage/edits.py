"""The project's source files as they were when this process began, before it imported them.

A stage takes seconds to import what it needs. Code that is edited meanwhile is not the code that
runs.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_at_start: dict[Path, tuple[int, int, int]] = {}


def note_code() -> None:
    """To be called before anything of the project is imported."""
    for package in ("minimind", "stages"):
        for path in (ROOT / package).rglob("*.py"):
            if path.is_file():  # and not some editor's dangling link
                _at_start[path] = marks(path.stat())


def was_edited(path: Path) -> bool:
    """Whether a source file is not what it was when its import began."""
    path = path.resolve()
    return path in _at_start and _at_start[path] != marks(path.stat())


def marks(stat: os.stat_result) -> tuple[int, int, int]:
    """Size, inode and time of change in ns: they tell whether a file was edited."""
    return stat.st_size, stat.st_ino, stat.st_mtime_ns
