"""Exceptions that are shown to a person as a single line."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic_core import ErrorDetails


class UserError(ValueError):
    """Something a person can put right: bad data, a wrong parameter, a missing file.

    The message is one line: where, what was found, what is allowed, what to do.
    """


class Stopped(Exception):
    """A stage was asked to stop and has saved a resume checkpoint; never an exit code of 0."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def importing(file: Path) -> Iterator[None]:
    """Raises UserError with file and line where importing a Python file fails."""
    try:
        yield
    except (Exception, SystemExit) as error:  # code that people write may raise anything
        frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            frames.append((error.filename or "", error.lineno))
        lines = [f":{line}" for name, line in frames if Path(name).absolute() == file.absolute()]
        line = lines[-1] if lines else ""
        raise UserError(
            f"{file}{line} cannot be imported: {type(error).__name__}: {error}; correct it."
        ) from error


def complaint(detail: ErrorDetails) -> str:
    """What pydantic finds wrong with a value, as a part of a sentence of ours.

    "Input should be greater than 0" becomes "it should be greater than 0".
    """
    return detail["msg"].removeprefix("Value error, ").replace("Input", "it", 1)
