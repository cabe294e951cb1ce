"""launchers/skypilot.yaml as SkyPilot reads it, and launchers/skypilot with a stand-in for sky."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.graph import ROOT

PYTHON = ROOT / ".venv/skypilot/bin/python"  # made by `make test-more`
READ = """
import sky
task = sky.Task.from_yaml("launchers/skypilot.yaml")
assert task.workdir == "." and "COMMAND" in task.envs and "$COMMAND" in task.run
"""
# Runs the command here, as a machine of SkyPilot's would there, or waits to be cancelled.
SKY = """#!/bin/sh
echo "sky $*" >> calls
[ "$1" = launch ] || exit 0
for word; do case $word in COMMAND=*) command=${word#COMMAND=} ;; esac; done
eval "exec $command"
"""


@pytest.mark.skipif(not PYTHON.exists(), reason="SkyPilot is not installed in .venv/skypilot")
def test_skypilot_reads_the_task(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    read = subprocess.run(
        [PYTHON, "-c", READ], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert read.returncode == 0, read.stderr


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    for name, text in {"sky": SKY, "rsync": '#!/bin/sh\necho "rsync $*" >> calls\n'}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    launcher = str(ROOT / "launchers/skypilot")
    return subprocess.Popen(
        [launcher, "evaluate@sft", "log", "--gpus", "H100:8", "--", *command],
        cwd=folder,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_command_arrives_word_by_word_and_what_it_made_is_fetched(tmp_path: Path) -> None:
    words = ["a  b", "it's", "$HOME", "--", "*", ""]
    launched = start(tmp_path, "printf", r"[%s]\n", *words)
    assert launched.communicate()[0].splitlines() == [f"[{word}]" for word in words]
    assert launched.returncode == 0
    launch, *fetched = (tmp_path / "calls").read_text().splitlines()
    assert "--cluster minimind-evaluate-sft" in launch
    assert "--gpus H100:8 launchers/skypilot.yaml --env COMMAND=" in launch
    assert any("minimind-evaluate-sft:sky_workdir/models/ models/" in line for line in fetched)


def test_a_stop_cancels_the_job_and_fetches_what_it_saved(tmp_path: Path) -> None:
    launched = start(tmp_path, "sh", "-c", 'trap "exit 7" USR1; echo there; sleep 600 & wait')
    assert launched.stdout
    assert launched.stdout.readline() == "there\n"
    (tmp_path / "sky").write_text('#!/bin/sh\necho "sky $*" >> calls; pkill -USR1 -P $PPID sh\n')
    launched.send_signal(signal.SIGUSR1)
    launched.wait()
    calls = (tmp_path / "calls").read_text()
    assert "sky cancel --yes --all minimind-evaluate-sft" in calls
    assert calls.index("sky cancel") < calls.index("sky_workdir/.resume/")
    assert launched.returncode == 7
