"""A stage's command elsewhere, and places in a cluster: by templates and variables, without one.

tests/cluster/ has the same with a real Slurm.
"""

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from minimind.compute.cluster import place_in_cluster
from minimind.errors import UserError
from minimind.lineage.dvc_process import our_dvc
from minimind.terminal.elsewhere import filled
from tests.graph import ROOT

FIELDS = {
    "command": ["python", "-m", "stages.sft", "--output", "a b'"],
    "stage": ["evaluate@sft"],
    "log": ["/a b/sft.log"],
    "root": ["/a b"],
}


@pytest.fixture
def launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launchers").mkdir()
    return tmp_path / "launchers"


def test_a_field_alone_is_words_and_in_a_shells_text_it_is_quoted() -> None:
    command = FIELDS["command"]
    assert filled("srun -J {stage} --output={log} {command}", FIELDS) == [
        *("srun", "-J", "evaluate@sft", "--output=/a b/sft.log"),
        *command,
    ]
    remote = filled("ssh gpu 'cd {root} && {command}'", FIELDS)
    assert remote[:2] == ["ssh", "gpu"]
    assert shlex.split(remote[2]) == ["cd", "/a b", "&&", *command]
    assert filled("env A={{}} {command}", FIELDS)[:2] == ["env", "A={}"]


def test_a_name_is_a_file_in_launchers_with_options_of_its_own(launchers: Path) -> None:
    (launchers / "mine").touch()
    assert filled("mine --gres=gpu:1", FIELDS) == [
        *("launchers/mine", "evaluate@sft", "/a b/sft.log", "--gres=gpu:1", "--"),
        *FIELDS["command"],
    ]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("slrum", r"is no file in launchers/ \(mine\)"),
        ("srun python", "it has no {command}"),
        ("srun {comand} {command}", "it has no field {comand}"),
        ("srun {command} {stage.__class__}", "it has no field {stage.__class__}"),
        ("srun {command} {}", "it has no field {}"),
        ("srun '{command}", "No closing quotation"),
        ("srun {command} {", "Single '{'|expected '}'"),
    ],
)
def test_a_wrong_template_is_one_line_with_what_is_allowed(
    launchers: Path, template: str, said: str
) -> None:
    (launchers / "mine").touch()
    with pytest.raises(UserError, match=said) as wrong:
        filled(template, FIELDS)
    assert "{command}, {stage}, {log}, {root}" in str(wrong.value)


SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu7",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
SKYPILOT = {
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6\n",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_TASK_ID": "sky-managed-1-0",
}


def test_slurms_variables_are_torchruns() -> None:
    place = place_in_cluster(SLURM)
    assert place
    variables = place.torchruns_variables(1)
    assert 20_000 <= int(variables.pop("MASTER_PORT")) < 30_000
    assert variables == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu7",
    }
    several = place.torchruns_variables(2)
    assert several["PET_NNODES"] == "4"
    assert several["PET_NODE_RANK"] == "3"
    bound = place_in_cluster(SLURM | {"SLURM_GPUS_PER_TASK": "1"})
    assert bound
    assert bound.torchruns_variables(1)["LOCAL_RANK"] == "0"


def test_all_processes_of_a_job_have_one_port_and_jobs_side_by_side_another() -> None:
    def port(**changes: str) -> str:
        place = place_in_cluster(SLURM | changes)
        assert place
        return place.torchruns_variables(1)["MASTER_PORT"]

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0")
    assert len({port(), port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="18")}) == 3


def test_slurms_short_way_to_write_hosts_is_asked_of_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = SLURM | {"SLURM_STEP_NODELIST": "gpu[7-8]"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="put scontrol on the PATH"):
        place_in_cluster(many)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[7-8]" ] && echo gpu7 && echo gpu8')
    scontrol.chmod(0o755)
    place = place_in_cluster(many)
    assert place
    assert place.address == "gpu7"


def test_skypilots_variables_are_torchruns() -> None:
    place = place_in_cluster(SKYPILOT)
    assert place
    assert place.num_gpus == 8
    variables = place.torchruns_variables(place.num_gpus)
    variables.pop("PET_MASTER_PORT")
    assert variables == {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "10.0.0.5",
        "PET_RDZV_BACKEND": "static",
        "PET_STANDALONE": "0",
    }


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a shell within a job
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        SLURM | {"RANK": "0"},  # torchrun under srun
        SKYPILOT | {"PET_NNODES": "2"},
        {"SKYPILOT_NODE_IPS": "10.0.0.5", "SKYPILOT_NUM_GPUS_PER_NODE": "1"},
    ],
)
def test_one_process_has_no_place(variables: dict[str, str]) -> None:
    assert place_in_cluster(variables) is None


def test_a_job_has_the_dvc_that_it_works_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMIND_DVC", "4711 1750000000.25")
    assert our_dvc() == (4711, 1750000000.25)
    monkeypatch.setenv("MINIMIND_DVC", "")
    assert our_dvc() is None


STAGE = """
import os, sys, time
from pathlib import Path
from minimind.compute.settings import load_settings
from minimind.lineage.dvc_process import is_elsewhere
from minimind.terminal.command import stage_app
from minimind.terminal.elsewhere import run_elsewhere
from minimind.terminal.signals import StopRequest

app = stage_app("toy")

@app.command()
def main(what: str) -> None:
    if not is_elsewhere():
        raise SystemExit(run_elsewhere("toy", load_settings()))
    stop = StopRequest()
    settings = load_settings()
    print("there", repr(settings.launcher), settings.dvc_stage, settings.root, flush=True)
    while what == "wait" and not stop.requested:
        time.sleep(0.01)
    raise SystemExit(stop.signal and stop.exit_code or 7)

app()
"""


def start(folder: Path, launcher: str, what: str) -> subprocess.Popen[str]:
    (folder / "toy.py").write_text(STAGE)
    variables = {"MINIMIND_LAUNCHER": launcher, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "toy.py", what],
        cwd=folder,
        env=os.environ | variables | {"DVC_ROOT": str(folder), "DVC_STAGE": "toy"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# As ssh: nothing of the environment comes along, and a shell reads the command.
BARE = f"env -i sh -c 'cd {{root}} && PYTHONPATH=\"{ROOT}\" {{command}}'"


@pytest.mark.parametrize("launcher", ["nice {command}", BARE])
def test_the_command_runs_there_and_ends_with_its_exit_code(tmp_path: Path, launcher: str) -> None:
    folder = tmp_path / "it's 数据"
    folder.mkdir()
    stage = start(folder, launcher, "work")
    said, errors = stage.communicate()
    assert (said, errors) == ("there '' toy .\n", "")
    assert stage.returncode == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_command(tmp_path: Path, number: signal.Signals) -> None:
    stage = start(tmp_path, "nice {command}", "wait")
    assert stage.stdout
    assert stage.stdout.readline().startswith("there")
    stage.send_signal(number)
    assert stage.wait() == 128 + signal.SIGUSR1


def test_a_stop_that_the_launcher_calls_success_is_none(tmp_path: Path) -> None:
    launcher = "sh -c 'trap \"exit 0\" USR1; echo there; while :; do sleep 0.1; done; {command}'"
    stage = start(tmp_path, launcher, "work")
    assert stage.stdout
    stage.stdout.readline()
    stage.terminate()
    assert stage.wait() == 128 + signal.SIGTERM


def test_a_launcher_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    stage = start(tmp_path, "no-such-program {command}", "work")
    _, errors = stage.communicate()
    assert stage.returncode == 1
    (line,) = errors.splitlines()
    assert "'no-such-program'" in line


def test_the_command_is_told_which_dvc_it_works_for(tmp_path: Path) -> None:
    """What stands in its record, and is compared with dvc.lock, as if DVC were its ancestor."""
    # With an output: DVC lists who writes what, and so alone is known as the stage's.
    stage = {"cmd": f"{sys.executable} toy.py work; touch out", "outs": ["out"]}
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"toy": stage}}))
    (tmp_path / "toy.py").write_text(STAGE)
    launcher = "sh -c 'echo $MINIMIND_DVC; : {command}'"
    python = [sys.executable, "-m", "dvc"]
    subprocess.run([*python, "init", "-q", "--no-scm"], cwd=tmp_path, check=True)
    dvc = subprocess.Popen(
        [*python, "repro"],
        cwd=tmp_path,
        env=os.environ | {"MINIMIND_LAUNCHER": launcher, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    created = psutil.Process(dvc.pid).create_time()
    assert f"{dvc.pid} {created}" in dvc.communicate()[0].splitlines()


SBATCH = """#!/bin/sh
touch begun
sleep 1
echo 17
until [ -s calls ]; do sleep 0.1; done
exit 3
"""


def test_a_job_is_cancelled_that_had_no_number_yet_when_its_stage_was_stopped(
    tmp_path: Path,
) -> None:
    for name, text in {"sbatch": SBATCH, "scancel": '#!/bin/sh\necho "$*" >> calls\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    launcher = str(ROOT / "launchers/slurm")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    launched = subprocess.Popen(
        [launcher, "sft", "log", "--", "true"], cwd=tmp_path, env=environment
    )
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    time.sleep(0.2)  # until the launcher listens
    launched.send_signal(signal.SIGUSR1)
    assert launched.wait(60) == 3
    assert (tmp_path / "calls").read_text().splitlines()[0] == "--state=PENDING 17"


def test_launchers_can_be_run() -> None:
    for file in (ROOT / "launchers").iterdir():
        assert file.suffix == ".yaml" or file.stat().st_mode & stat.S_IXUSR, file
