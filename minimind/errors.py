"""Exceptions that are shown to a person as a single line."""

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


def complaint(detail: ErrorDetails) -> str:
    """What pydantic finds wrong with a value, as a part of a sentence of ours.

    "Input should be greater than 0" becomes "it should be greater than 0".
    """
    return detail["msg"].removeprefix("Value error, ").replace("Input", "it", 1)
