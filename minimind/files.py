"""Writing files and folders so that they are there whole, or as they were before."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or folder to; it takes its place at the end.

    On any error what stood at `path` stays. It is replaced, never written into: it may be a link
    to DVC's cache.
    """
    partial = path.with_name(path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        with naming(path):
            yield partial
            if partial.is_dir():
                _remove(path)  # a folder cannot take the place of another in one step
            partial.replace(path)
    finally:
        _remove(partial)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has errors of writing say where: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
