"""Asked to stop; and no orphans: a stage whose DVC is gone ends, whenever that was."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from minimind.errors import Stopped
from minimind.terminal import signals
from minimind.terminal.signals import NAMES, StopRequest
from tests.graph import ROOT

WATCHING = """
import time
from minimind.terminal.signals import watch_parents
watch_parents(interval_seconds=0.01)
print("watching", flush=True)
time.sleep(60)
print("nobody stopped this")
"""


def list_of_writers(directory: Path, process: int) -> None:
    file = directory / ".dvc" / "tmp" / "rwlock"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"write": {"models/sft": {"pid": process, "cmd": "dvc repro"}}}))


def watching(directory: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WATCHING],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_stage_whose_dvc_died_while_it_started_ends_at_once(tmp_path: Path) -> None:
    list_of_writers(tmp_path, process=2**22 + 1)  # more than Linux ever gives
    stage = watching(tmp_path)
    assert stage.communicate()[0] == ""
    assert stage.returncode == -signal.SIGTERM


@pytest.mark.parametrize("listed", [True, False])
def test_a_stage_whose_dvc_lives_goes_on(tmp_path: Path, listed: bool) -> None:
    if listed:
        list_of_writers(tmp_path, os.getpid())
    stage = watching(tmp_path)
    assert stage.stdout is not None
    assert stage.stdout.readline() == "watching\n"
    assert stage.poll() is None
    stage.kill()
    stage.communicate()


def test_a_stage_on_another_machine_does_not_look_for_its_dvc_there(tmp_path: Path) -> None:
    list_of_writers(tmp_path, process=2**22 + 1)
    stage = watching(tmp_path, MINIMIND_DVC=f"{2**22 + 1} 1750000000.0")
    assert stage.stdout is not None
    assert stage.stdout.readline() == "watching\n"
    stage.kill()
    stage.communicate()


@pytest.mark.parametrize("at_once", [False, True])
def test_a_signal_and_its_echo_are_one_wish_to_stop(
    monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """As Slurm signals every process of a job, and those that start others pass it on."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    reached: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: reached.append(number))
    stop = StopRequest(at_once)
    with pytest.raises(Stopped) if at_once else nullcontext():
        signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    assert (stop.requested, reached) == (True, [])
    monkeypatch.setattr(signals, "ECHO_SECONDS", -1.0)  # so it comes later
    signal.raise_signal(signal.SIGUSR1)
    assert reached == [signal.SIGUSR1]
    stop.restore()
    signal.signal(signal.SIGUSR1, before)


def test_a_stage_ends_when_its_dvc_is_killed(tmp_path: Path) -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WATCHING!r}])"
    dvc = subprocess.Popen(
        [sys.executable, "-c", parent],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert dvc.stdout is not None
    assert dvc.stdout.readline() == "watching\n"
    dvc.kill()
    assert dvc.communicate()[0] == ""  # all that was printed until the stage let go of the pipe


@pytest.mark.parametrize("name", NAMES)
def test_the_same_signal_again_acts_at_once(name: str) -> None:
    number, acted = getattr(signal, name), []
    before = signal.signal(number, lambda number, _: acted.append(number))
    stop = StopRequest()
    try:
        signal.raise_signal(number)
        assert (stop.exit_code, acted) == (128 + number, [])
        signal.raise_signal(number)
        assert acted == [number]
    finally:
        stop.restore()
        signal.signal(number, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_that_is_ignored_stays_ignored(name: str) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)  # as by nohup, or for what a shell runs with &
    stop = StopRequest()
    try:
        assert signal.getsignal(number) == signal.SIG_IGN
        signal.raise_signal(number)
        assert not stop.requested
        stop.restore()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        stop.restore()
        signal.signal(number, before)
