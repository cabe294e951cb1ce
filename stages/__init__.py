"""The stages, one command a file.

This is imported before all that is slow, so that a stage notices even in its first second when the
DVC or the torchrun that started it is gone, or that its code is being edited.
"""

import os
import sys
from types import TracebackType

from minimind.compute.launch import is_worker
from minimind.errors import UserError
from minimind.lineage.edits import note_code
from minimind.terminal.signals import watch_parents


def complain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line of what a person can mend, also where it is found while a stage is imported."""
    if issubclass(kind, UserError):
        print(" ".join(str(error).split()), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = complain
if os.environ.get("DVC_STAGE") or is_worker():
    watch_parents()
    note_code()
