"""Values in params.yaml that a stage would refuse, found before the first one runs."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dvc.dependency import ParamsDependency

from minimind.errors import UserError

PARAMS = "params.yaml"


def refuse_values(root: Path, stages: Iterable[Any], edited: Path | None = None) -> None:
    """Raises UserError for what is wrong in the sections that some of DVC's stages read.

    root: the folder of params.yaml; edited: a copy of that file with other values.
    """
    read = [dep for stage in stages for dep in stage.deps if isinstance(dep, ParamsDependency)]
    file = (root / PARAMS).resolve()
    keys = {key for dep in read if Path(dep.fs_path).resolve() == file for key in dep.params}
    if not keys:
        return
    # Stages know their sections, and stand above this package.
    command = [sys.executable, "-m", "stages._sections", "--params", str(edited or PARAMS)]
    done = subprocess.run(
        [*command, *sorted(keys)], cwd=root, capture_output=True, text=True, check=False
    )
    said = done.stderr.strip()
    # A traceback is of code that stages cannot be loaded with either, and they say where it is.
    if done.returncode == 1 and said.startswith("params: ") and "\n" not in said:
        raise UserError(said.removeprefix("params: ").replace(str(edited), PARAMS))
