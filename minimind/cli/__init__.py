"""The commands of `minimind`."""

import sys

from minimind.terminal.complain import complain

sys.excepthook = complain
