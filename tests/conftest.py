"""Before anything imports PyTorch."""

import os
import signal
import tempfile
from pathlib import Path

# Its compile cache does not ask for a simulated processor: code for other instructions is garbage.
if simulated := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = Path(tempfile.gettempdir()) / f"minimind-compiled-for-{simulated}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{cache}")

# Tests send these signals; those who run tests by nohup or with & have them ignored.
for name in ("SIGINT", "SIGHUP", "SIGQUIT"):
    number = getattr(signal, name, None)  # Windows has not all of them
    if number and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
