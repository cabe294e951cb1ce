"""What a person can mend is one line wherever it is found, be it while code is imported.

To be set as sys.excepthook before typer is imported, which hands on to what it finds.
"""

import os
import sys
from types import TracebackType

from minimind.errors import UserError


def complain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line for a UserError and for code that is not Python, else the traceback."""
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{os.path.relpath(error.filename)}:{error.lineno}"
        print(f"{place}: not Python: {error.msg}; mend it.", file=sys.stderr)
    elif issubclass(kind, UserError):
        print(" ".join(str(error).split()), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
