"""The stages, one command a file.

This is imported before all that is slow, so that a stage notices even in its first second when the
DVC that started it is gone.
"""

import os

from minimind.runtime.stop import watch_parents

if os.environ.get("DVC_STAGE"):
    watch_parents()
