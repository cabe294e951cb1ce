"""The project's source files as they were when this process began, before it imported them.

A stage takes seconds to import what it needs. Code that is edited meanwhile is not the code that
runs.
"""

from pathlib import Path

Marks = tuple[int, int, int]  # size, inode, time of change in ns
ROOT = Path(__file__).resolve().parents[2]
_at_start: dict[Path, Marks] = {}


def note_code() -> None:
    """To be called before anything of the project is imported."""
    for package in ("minimind", "stages"):
        for path in (ROOT / package).rglob("*.py"):
            if path.is_file():  # and not some editor's dangling link
                _at_start[path] = _marks(path)


def was_edited(path: Path) -> bool:
    """Whether a source file is not what it was when its import began."""
    path = path.resolve()
    return path in _at_start and _at_start[path] != _marks(path)


def _marks(path: Path) -> Marks:
    stat = path.stat()
    return stat.st_size, stat.st_ino, stat.st_mtime_ns
