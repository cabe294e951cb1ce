"""Draw the first of `dvc plots show`: python docs/plots_svg.py FILE.svg, with vl-convert-python."""

import json
import subprocess
import sys
from pathlib import Path

import vl_convert

shown = subprocess.run(["dvc", "plots", "show", "--json"], capture_output=True, check=True)
plot = next(iter(json.loads(shown.stdout)["data"].values()))[0]["content"]
plot = json.loads(plot) if isinstance(plot, str) else plot
Path(sys.argv[1]).write_text(vl_convert.vegalite_to_svg(plot), encoding="utf-8")
