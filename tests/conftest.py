"""Before anything imports PyTorch."""

import os
import tempfile
from pathlib import Path

# Its compile cache does not ask for a simulated processor: code for other instructions is garbage.
if simulated := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = Path(tempfile.gettempdir()) / f"minimind-compiled-for-{simulated}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{cache}")
