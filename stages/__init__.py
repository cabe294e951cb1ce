"""The stages, one command a file.

This is imported before all that is slow, so that a stage notices even in its first second when the
DVC or the torchrun that started it is gone, or that its code is being edited.
"""

import os
import sys

from minimind.compute.launch import is_worker
from minimind.lineage.edits import note_code
from minimind.terminal.complain import complain
from minimind.terminal.signals import watch_parents

sys.excepthook = complain
if os.environ.get("DVC_STAGE") or is_worker():
    watch_parents()
    note_code()
