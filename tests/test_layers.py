"""How the packages may import one another: the contracts stand in pyproject.toml."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.graph import ROOT

# From us alone: other libraries know on which system they are, so they are imported before.
HIDING = """
import importlib.util, sys
import datasketch, dvc.repo, filelock, peft, psutil, pydantic_settings, rich.progress
import torch, transformers, typer
if importlib.util.find_spec("lm_eval"): import lm_eval.tasks
sys.modules["{hidden}"] = None
for name in {names}:
    importlib.import_module(name.removesuffix(".__init__"))
"""


def test_no_import_goes_up_or_in_a_circle() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("hidden", ["fcntl", "resource"])
def test_everything_imports_where_a_module_of_unix_is_missing(hidden: str) -> None:
    """On Windows neither is there. It has not been run on one."""
    names = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for package in ("minimind", "stages")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.stem != "harness" or find_spec("lm_eval")  # an extra
    ]
    code = HIDING.format(hidden=hidden, names=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
