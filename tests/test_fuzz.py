"""Broken rows, parameters and states: no traceback, no hang, nothing written by who refuses."""

import json
import subprocess
import sys
from pathlib import Path

from tests.graph import ROOT

FAULTS = ("tracebacks", "hangs", "writes", "unclear", "long")


def test_broken_inputs_are_refused_in_one_line(tmp_path: Path) -> None:
    output = tmp_path / "fuzz.json"
    arguments = ["--cases", "20", "--stages", "sft,reward", "--output", str(output)]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.fuzz", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    counted = json.loads(output.read_text(encoding="utf-8"))
    assert counted["cases"] == 20
    assert counted["refused"] > 0
    assert not any(counted[fault] for fault in FAULTS)


def test_the_thousand_cases_had_no_fault() -> None:
    counted = json.loads((ROOT / "benchmarks/results/fuzz.json").read_text(encoding="utf-8"))
    assert counted["cases"] >= 1000
    assert not any(counted[fault] for fault in FAULTS)
