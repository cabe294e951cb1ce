"""Stages killed at random moments end with the bytes of a run that was left in peace."""

import json
import subprocess
import sys
from pathlib import Path

from minimind.lineage.dvc_files import stages_as_written
from minimind.terminal.signals import NAMES as SIGNALS
from tests.graph import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "kill.json"


def test_killed_stages_lose_nothing(tmp_path: Path) -> None:
    output = tmp_path / "kill.json"
    arguments = ["--kills", "24", "--dvc-kills", "0", "--stages", "sft,grpo,teacher_outputs"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.kill", *arguments, "--output", str(output)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    counted = json.loads(output.read_text(encoding="utf-8"))
    assert counted["kills"] >= 20
    assert counted["losses"] == 0
    assert counted["resumes"] > 0
    assert counted["equal"] > 0
    assert len(counted["signals"]) >= 4
    assert len(counted["phases"]) >= 3


def test_the_long_run_lost_nothing() -> None:
    counted = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert counted["kills"] >= 300
    assert counted["losses"] == 0
    assert set(counted["signals"]) == {"SIGKILL", *SIGNALS}
    assert set(counted["phases"]) == {"start", "step", "state write", "final save", "commit"}
    assert set(counted["stages"]) == set(stages_as_written(ROOT / "dvc.yaml"))
    assert all(stage["kills"] for stage in counted["stages"].values())
    assert {"dvc exp run --temp: SIGKILL", "queue: stage, SIGKILL"} <= set(counted["means"])
