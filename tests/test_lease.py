"""Who may use a run's checkpoints: one process, and never for long a dead one of another host."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimind.datasets.encoded import EncodedDataset
from minimind.errors import Stopped, UserError
from minimind.lineage import lease as lease_module
from minimind.lineage.lease import hold
from minimind.lineage.resume import ResumeCheckpoint, ResumeStore
from minimind.training.fit import FitConfig
from tests.graph import ROOT
from tests.test_fit import CONFIG, a_run, data, quiet_surroundings  # noqa: F401

HOLD = """
import sys, time
from pathlib import Path
from minimind.lineage.lease import hold
while not Path(sys.argv[2]).exists():
    pass
try:
    lease = hold(Path(sys.argv[1]))
except ValueError as refused:
    sys.exit(str(refused))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / ".resume" / "sft" / "0123"


def holder(run: Path, start: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(run), str(start)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)


def held_elsewhere(run: Path, seconds_ago: float) -> Path:
    """As a process on another host left it, when it renewed its lease the last time."""
    run.mkdir(parents=True)
    file = Path(f"{run}.lease")
    fields = {"pid": os.getpid(), "host": "made-up", "mode": "lease", "token": "ab", "start": 1}
    fields["duration"] = lease_module.LEASE_SECONDS
    file.write_text("filelock/2\n" + "".join(f"{name}={value}\n" for name, value in fields.items()))
    then = file.stat().st_mtime - seconds_ago
    os.utime(file, (then, then))
    return file


def test_a_lease_that_another_host_does_not_renew_is_taken(run: Path) -> None:
    held_elsewhere(run, 2 * lease_module.LEASE_SECONDS)
    hold(run).release()
    assert not list(run.parent.glob("*.lease*"))


def test_a_lease_that_another_host_renews_is_waited_for(run: Path) -> None:
    file = held_elsewhere(run, 0)
    said = []

    def wait(holder: str) -> None:
        said.append(holder)
        if len(said) == 2:
            file.unlink()  # as it does when it ends

    with pytest.raises(UserError, match="on made-up; wait for it to end"):
        hold(run)
    hold(run, wait).release()
    assert said == [f"process {os.getpid()} on made-up"] * 2


@pytest.mark.parametrize("left", ["", "filelock/2\npid=", "\0" * 100])  # a power cut: nobody's
def test_a_lease_that_cannot_be_read_is_taken_when_it_is_old(run: Path, left: str) -> None:
    file = held_elsewhere(run, 0)
    file.write_text(left)
    with pytest.raises(UserError, match="in use by another process"):
        hold(run)
    os.utime(file, (0, 0))
    hold(run).release()


def test_of_two_processes_one_has_it_and_its_death_frees_it_at_once(
    run: Path, tmp_path: Path
) -> None:
    held_elsewhere(run, 2 * lease_module.LEASE_SECONDS)  # the harder race: for a lease that is old
    racing = [holder(run, tmp_path / "start") for _ in range(2)]
    (tmp_path / "start").touch()
    while all(process.poll() is None for process in racing):
        time.sleep(0.01)
    refused, winner = sorted(racing, key=lambda process: process.poll() is None)
    assert winner.stdout is not None and winner.stdout.readline() == "held\n"
    assert f"in use by process {winner.pid} on " in refused.communicate()[1]
    winner.kill()
    winner.communicate()
    assert Path(f"{run}.lease").exists()
    hold(run).release()


def test_a_holder_renews_its_lease(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 0.6)
    lease = hold(run)
    taken = Path(lease.lock_file).stat().st_mtime_ns
    while Path(lease.lock_file).stat().st_mtime_ns == taken:
        time.sleep(0.01)
    lease.release()


def test_whoever_has_lost_its_lease_saves_nothing(run: Path) -> None:
    store = ResumeStore(run)
    store.save(ResumeCheckpoint(1, {}, {}))
    os.utime(f"{run}.lease", (0, 0))  # as of a process that is stopped
    other = hold(run)
    with pytest.raises(UserError, match="taken over by process"):
        store.save(ResumeCheckpoint(2, {}, {}))
    store.close()
    assert other.owner is not None and other.owner.token == other.token
    assert [path.name for path in run.glob("[cp]*")] == ["checkpoint-000000001"]
    other.release()


def test_a_second_run_waits_for_the_first_and_can_be_stopped(
    tmp_path: Path,
    data: EncodedDataset,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = FitConfig.model_validate(CONFIG)
    polls = []

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(lease_module.time, "sleep", sleep)
    stops = pytest.raises(Stopped, match="while waiting")
    with a_run(tmp_path, config), stops as stopped, a_run(tmp_path, config):
        pass
    assert stopped.value.exit_code == 130
    assert len(polls) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"sft: waiting for process {os.getpid()} on " in said and ", since 2" in said
