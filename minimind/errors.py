"""Exceptions that are shown to a person as a single line."""


class UserError(ValueError):
    """Something a person can put right: bad data, a wrong parameter, a missing file.

    The message is one line: where, what was found, what is allowed, what to do.
    """


class Stopped(Exception):
    """A stage was asked to stop and has saved its state; never an exit code of 0."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
