"""Stages as jobs of a real Slurm, one of this machine alone: `make test-more`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from minimind.chat.tokenizer import ChatTokenizer
from minimind.model.checkpoint import save_checkpoint
from tests.graph import ROOT
from tests.test_processes import FIT, free_port
from tests.tiny import random_rows, tiny_model, tiny_tokenizer, write_rows

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun")
PATH = f"{os.environ['PATH']}:/usr/sbin"
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"needs Slurm (apt-get install slurm-wlm munge); missing: {MISSING}",
)
PATIENCE_SECONDS = 600  # with a loaded machine
SAVED, GOES_ON = "resume checkpoint saved at step", "going on from step"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which commands reach it."""
    folder = tmp_path_factory.mktemp("slurm")
    command = [str(Path(__file__).with_name("start.sh")), str(folder)]
    started = subprocess.Popen(
        [*command, str(free_port()), str(free_port())],
        env=os.environ | {"PATH": PATH},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "errors").open("w"),
        text=True,
    )
    assert started.stdin
    assert started.stdout
    if started.stdout.readline() != "ready\n":  # no cgroups, another host name, no ports
        started.stdin.close()
        logs = [file.read_text()[-300:] for file in (folder / "errors", *folder.glob("*.log"))]
        pytest.skip(f"Slurm is installed and does not take jobs on this machine: {logs}")
    plain = {n: v for n, v in os.environ.items() if not n.startswith(("DVC_", "MINIMIND_"))}
    yield (
        plain
        | {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
        | {
            "PATH": f"{Path(sys.executable).parent}:{PATH}",
            "OMP_NUM_THREADS": "1",
            "MINIMIND_SAVE_SECONDS": "0",
        }
    )
    started.stdin.close()
    started.wait()


def project(folder: Path) -> Path:
    """What stage sft needs, and launchers/."""
    tokenizer = tiny_tokenizer(folder / "models/tokenizer")
    fingerprint = ChatTokenizer.load(tokenizer).fingerprint
    save_checkpoint(folder / "models/start", tiny_model(vocab_size=267), tokenizer)
    write_rows(folder / "data", random_rows(47), tokenizer=fingerprint)
    section = FIT | {"init": "models/start", "max_steps": 60, "epochs": 100.0}
    (folder / "params.yaml").write_text(yaml.safe_dump({"sft": section}))
    shutil.copytree(ROOT / "launchers", folder / "launchers")
    return folder


def start_sft(folder: Path, environment: dict[str, str], **more: str) -> subprocess.Popen[str]:
    options = {"conversations": "data", "output": "models/sft", "metrics": "sft.json"}
    options |= {"history": "sft.csv"}
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    return subprocess.Popen(
        [sys.executable, "-m", "stages.sft", *arguments],
        cwd=folder,
        env=environment | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(happened: Callable[[], object], stage: subprocess.Popen[str]) -> None:
    for _ in range(PATIENCE_SECONDS * 20):
        if happened():
            return
        assert stage.poll() is None, stage.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"nothing happened in {PATIENCE_SECONDS} s")


def has_saved(folder: Path) -> Callable[[], object]:
    return lambda: list(folder.glob(".resume/sft/*/checkpoint-*"))


def log_of(folder: Path) -> str:
    return (folder / "runs/logs/sft.job.log").read_text()


def job_of(folder: Path) -> str:
    file = folder / "runs/logs/sft.job.log.id"
    return file.read_text().strip() if file.exists() else ""


def weights(folder: Path) -> bytes:
    return (folder / "models/sft/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, slurm: dict[str, str]) -> bytes:
    """The weights of a run without any cluster."""
    folder = project(tmp_path_factory.mktemp("here"))
    stage = start_sft(folder, slurm)
    assert stage.wait() == 0, stage.communicate()[0]
    return weights(folder)


@pytest.mark.parametrize("launcher", ["slurm --comment='a b'", "srun -J {stage} {command}"])
def test_a_stopped_job_saves_and_goes_on_with_the_same_bytes(
    tmp_path: Path, slurm: dict[str, str], here: bytes, launcher: str
) -> None:
    folder = project(tmp_path / "it's 数据 100%")
    stage = start_sft(folder, slurm, MINIMIND_LAUNCHER=launcher)
    until(has_saved(folder), stage)
    stage.send_signal(signal.SIGINT)
    said, _ = stage.communicate()
    assert SAVED in said
    assert stage.returncode == 128 + signal.SIGUSR1
    stage = start_sft(folder, slurm, MINIMIND_LAUNCHER=launcher)
    said, _ = stage.communicate()
    assert stage.returncode == 0, said
    assert GOES_ON in said
    assert weights(folder) == here


def test_a_preempted_job_goes_on_by_itself_a_cancelled_one_when_run_again(
    tmp_path: Path, slurm: dict[str, str], here: bytes
) -> None:
    """A requeue is what preemption does (PreemptMode=REQUEUE): to DVC the stage takes longer."""
    folder = project(tmp_path)
    stage = start_sft(folder, slurm, MINIMIND_LAUNCHER="slurm")
    for command in ["scontrol", "requeue"], ["scancel"]:
        until(has_saved(folder), stage)
        saved_before = log_of(folder).count(SAVED)
        subprocess.run([*command, job_of(folder)], env=slurm, check=True)
        until(lambda n=saved_before: log_of(folder).count(SAVED) > n, stage)
        if command == ["scontrol", "requeue"]:
            until(lambda: GOES_ON in log_of(folder), stage)
    said, _ = stage.communicate()
    assert stage.returncode != 0
    assert said.count(SAVED) == 2
    stage = start_sft(folder, slurm, MINIMIND_LAUNCHER="slurm")
    assert GOES_ON in stage.communicate()[0]
    assert weights(folder) == here


def test_a_job_that_waits_is_cancelled_when_its_stage_is_stopped(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    folder = project(tmp_path)
    stage = start_sft(folder, slurm, MINIMIND_LAUNCHER="slurm --hold")
    until(lambda: job_of(folder), stage)
    stage.terminate()
    stage.communicate()
    assert stage.returncode != 0
    queue = ["squeue", "--noheader", f"--jobs={job_of(folder)}", "--states=PENDING,RUNNING"]
    assert subprocess.check_output(queue, env=slurm, text=True) == ""


def test_tasks_are_the_processes_of_torchrun_also_beside_others_and_after_preemption(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    ways = {
        "torchrun": {"MINIMIND_PROCESSES": "2"},
        "srun": {"MINIMIND_LAUNCHER": "srun --ntasks=2 {command}"},
        "sbatch": {"MINIMIND_LAUNCHER": "slurm --ntasks=2"},
    }
    folders = {name: project(tmp_path / name) for name in ways}
    stages = {name: start_sft(folders[name], slurm, **ways[name]) for name in ways}
    until(has_saved(folders["sbatch"]), stages["sbatch"])
    subprocess.run(["scontrol", "requeue", job_of(folders["sbatch"])], env=slurm, check=True)
    said = {name: stage.communicate()[0] for name, stage in stages.items()}
    for name, stage in stages.items():
        assert stage.returncode == 0, said[name]
        assert said[name].count("step 60/60") == 1
        assert json.loads((folders[name] / "runs/sft.json").read_text())["processes"] == 2
    assert said["sbatch"].count(SAVED) == said["sbatch"].count(GOES_ON) == 1
    assert len({weights(folder) for folder in folders.values()}) == 1
