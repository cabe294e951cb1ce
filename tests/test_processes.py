"""Many processes give what one gives: one start of two and one of four check most claims.

Losses are compared in float32; see docs/scaling.md for what 16 bits and Muon add.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from minimind.chat.tokenizer import ChatTokenizer
from minimind.chat.tokenizer_training import SMALLEST_VOCAB, save_tokenizer, train_tokenizer
from minimind.datasets.batches import divide
from minimind.model.checkpoint import load_model, save_checkpoint
from tests.graph import ROOT
from tests.many_processes import run_case
from tests.test_fit import CONFIG
from tests.test_reinforcement_stages import CUSTOM, GRPO, SPO
from tests.tiny import random_pairs, random_rows, tiny_model, tiny_tokenizer, write_rows

# One worker: the starts are shared.
pytestmark = pytest.mark.xdist_group("processes")
Case = dict[str, Any]

# 41 samples in steps of 8: the last step of an epoch holds one, so some processes hold none.
FIT = CONFIG | {"log_interval": 1, "validation_share": 0.13, "batch_size": 4}
REINFORCE = {"max_steps": 20, "lr": 1e-3, "batch_size": 3, "accumulation_steps": 1}
# Nothing that adds up in another order: no norm over parts, no accumulation.
MUON = {"optimizer": "muon", "grad_clip": 1e9, "batch_size": 8, "accumulation_steps": 1}
MUON |= {"max_steps": 5}

# name: (kind, changes of the section, and what only the process knows)
OF_TWO: dict[str, tuple[str, Case, Case]] = {
    "fit": ("sft", {}, {}),
    "dpo": ("dpo", {}, {}),
    "experts in parts": ("sft", {"gradient_checkpointing": True}, {"shard": 1, "experts": 4}),
    "grpo": ("grpo", {}, {}),
    "spo": ("spo", {}, {}),
    "grpo in parts": ("grpo", {"beta": 0.0}, {"shard": 1}),
    "muon": ("sft", MUON, {}),
    "muon in parts": ("sft", MUON, {"shard": 1}),
    "stopped in parts": ("sft", {"seed": 5}, {"shard": 1, "stop_at": 7}),
}
OF_FOUR: dict[str, tuple[str, Case, Case]] = {
    "fit of four in parts": ("sft", {"patience": 9}, {"shard": 1}),
    "reward of four": ("reward", {"lr": 1e-3}, {}),
    "stopped": ("sft", {"seed": 6}, {"stop_at": 7}),
    "resumed": ("sft", {"seed": 6}, {}),
    "whole": ("sft", {"seed": 6}, {}),
    "resumed in parts": ("sft", {"seed": 5}, {"shard": 1}),
}
# Cases that go on from another's state.
FOLDER_OF = {"resumed": "stopped", "resumed in parts": "stopped in parts"}


@pytest.fixture(autouse=True, scope="module")
def _plain_surroundings() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DVC_STAGE", raising=False)
        patch.delenv("DVC_ROOT", raising=False)
        patch.setenv("MINIMIND_SAVE_SECONDS", "3600")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MINIMIND_THREADS", "1")
        folder = Path.cwd()
        yield
        os.chdir(folder)


def prepare(folder: Path, kind: str, changes: Case) -> None:
    """Data, checkpoint and parameters of a case."""
    if folder.exists():
        return
    folder.mkdir()
    if kind in ("grpo", "spo"):
        section = {"grpo": GRPO, "spo": SPO}[kind] | REINFORCE | changes
        tokenizer = folder / "models/tokenizer"
        save_tokenizer(train_tokenizer(["3+4=7 小明"], SMALLEST_VOCAB), tokenizer)
        save_checkpoint(folder / "models/start", tiny_model(vocab_size=SMALLEST_VOCAB), tokenizer)
        rows = [{"prompt": f"{a}+{b}?", "answer": str(a + b)} for a in range(4) for b in range(5)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "prompts.jsonl").write_text(text)
        (folder / "custom.py").write_text(CUSTOM)
    else:
        section = FIT | changes
        pairs = kind in ("dpo", "reward")
        rows_of = random_pairs(47) if pairs else random_rows(47)
        write_rows(folder / "data", rows_of, "preference" if pairs else "chat")
    (folder / "params.yaml").write_text(yaml.safe_dump({"section": section}))


def run_together(
    root: Path, num_processes: int, specs: dict[str, tuple[str, Case, Case]]
) -> dict[str, list[Case]]:
    """Every case's result, by process."""
    cases = {}
    for name, (kind, changes, own) in specs.items():
        folder = root / FOLDER_OF.get(name, name)
        prepare(folder, kind, changes)
        cases[name] = {"kind": kind, "folder": str(folder), **own}
    file = root / f"cases{num_processes}.json"
    file.write_text(json.dumps(cases))
    finished = subprocess.run(
        [sys.executable, "-m", "tests.many_processes", str(file)],
        cwd=ROOT,
        env=os.environ | {"MINIMIND_PROCESSES": str(num_processes), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    results = [
        json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(num_processes)
    ]
    (root / f"said{num_processes}").write_text(finished.stderr)
    return {name: [result[name] for result in results] for name in cases}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def of_two(root: Path) -> dict[str, list[Case]]:
    return run_together(root, 2, OF_TWO)


@pytest.fixture(scope="module")
def of_four(root: Path, of_two: dict[str, list[Case]]) -> dict[str, list[Case]]:
    return run_together(root, 4, OF_FOUR)


def of_one(root: Path, name: str, **changes: Any) -> Case:
    """The same case in this process."""
    kind, section, own = (OF_TWO | OF_FOUR)[name]
    folder = root / f"{name} of one"
    prepare(folder, kind, section | changes)
    own = {key: value for key, value in own.items() if key == "experts"}
    return run_case({"kind": kind, "folder": str(folder), **own})


def assert_same_losses(many: Case, one: Case) -> None:
    """Every number of every step; losses to 1e-5, as promised."""
    assert len(many["history"]) == len(one["history"]) >= 20
    assert many["tokens"] == one["tokens"]
    assert many["validation"] == pytest.approx(one["validation"], rel=1e-5, abs=1e-5)
    for a, b in zip(many["history"], one["history"], strict=True):
        assert list(a) == list(b)
        for name in a:
            close = 1e-5 if "loss" in name else 1e-4
            assert a[name] == pytest.approx(b[name], rel=close, abs=close), (name, a["step"])


@pytest.mark.parametrize("name", ["fit", "dpo", "experts in parts", "grpo", "spo", "grpo in parts"])
def test_two_processes_give_the_losses_of_one(
    root: Path, of_two: dict[str, list[Case]], name: str
) -> None:
    one = of_one(root, name)
    assert_same_losses(of_two[name][0], one)
    losses = [row["loss"] for row in one["history"] if "loss" in row]
    assert len({round(loss, 3) for loss in losses}) > 5  # there is something to compare


@pytest.mark.parametrize("name", ["whole", "fit of four in parts", "reward of four"])
def test_four_processes_give_the_losses_of_one(
    root: Path, of_four: dict[str, list[Case]], name: str
) -> None:
    assert_same_losses(of_four[name][0], of_one(root, name))


def test_all_processes_end_with_the_same_bytes(
    of_two: dict[str, list[Case]], of_four: dict[str, list[Case]]
) -> None:
    for results in [*of_two.values(), *of_four.values()]:
        assert all(result == results[0] for result in results)


def test_muon_in_parts_is_muon(of_two: dict[str, list[Case]]) -> None:
    """To the last bit: its bfloat16 would blow any rounding up, but sums of two have none."""
    assert of_two["muon in parts"][0]["weights"] == of_two["muon"][0]["weights"]


def test_all_stop_at_the_same_step_when_one_is_asked_to(
    of_two: dict[str, list[Case]], of_four: dict[str, list[Case]]
) -> None:
    for result in [*of_two["stopped in parts"], *of_four["stopped"]]:
        assert "resume checkpoint saved at step 7 of 20" in result["stopped"]
        assert result["exit_code"] == 128 + signal.SIGTERM


def test_a_resumed_run_ends_with_the_same_bytes(of_four: dict[str, list[Case]]) -> None:
    resumed, whole = of_four["resumed"][0], of_four["whole"][0]
    assert (resumed["resumes"], whole["resumes"]) == (1, 0)
    assert resumed["weights"] == whole["weights"]
    assert resumed["history"] == whole["history"]


def test_a_state_in_parts_goes_on_in_another_number_of_processes(
    root: Path, of_four: dict[str, list[Case]]
) -> None:
    """Stopped in two, resumed in four."""
    resumed = of_four["resumed in parts"][0]
    assert resumed["resumes"] == 1
    assert_same_losses(resumed, of_one(root, "resumed in parts"))


def test_only_one_process_speaks(root: Path, of_two: dict[str, list[Case]]) -> None:
    said = (root / "said2").read_text()
    assert said.count("step 20/20") + said.count("step 5/5") == len(OF_TWO) - 1
    assert "Warning" not in said


def test_a_process_without_a_sample_gets_a_stand_in_that_does_not_count() -> None:
    samples = torch.arange(9).numpy()
    shares = [list(divide(samples, 8, rank, 4)) for rank in range(4)]
    assert [[weight for _, weight in share] for share in shares] == [[1, 1], *[[1, 0]] * 3]
    counted = [s for share in shares for part, weight in share if weight for s in part]
    assert sorted(counted) == list(range(9))


TOY = """
import os, signal, time
from minimind.errors import UserError
from minimind.terminal.command import stage_app
from minimind.compute.launch import is_worker, launch

app = stage_app("toy")

@app.command()
def main(what: str) -> None:
    if not is_worker():
        raise SystemExit(launch("toy", int(os.environ["MINIMIND_PROCESSES"])))
    rank = int(os.environ["RANK"])
    if what == "peer" and rank == 0:
        while not os.path.exists("waiting"):  # the other has to get as far as that
            time.sleep(0.01)
        raise RuntimeError("Connection closed by peer")
    if what == "peer":
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until it is waited for
        open("waiting", "w").close()
        signal.sigwait({signal.SIGTERM})
        raise UserError("the data is wrong;\\nmend it")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL) if rank else signal.pause()
    print(os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["TORCHELASTIC_RUN_ID"])

app()
"""


def start_toy(folder: Path, what: str, **environment: str) -> subprocess.Popen[str]:
    (folder / "toy.py").write_text(TOY)
    return subprocess.Popen(
        [sys.executable, "toy.py", what],
        cwd=folder,
        env=os.environ | {"MINIMIND_PROCESSES": "2", "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("peer", "toy: the data is wrong; mend it\n"),
        ("killed", "process 1 was killed by SIGKILL; was there too little memory?\n"),
    ],
)
def test_an_error_of_any_process_is_one_line(tmp_path: Path, what: str, said: str) -> None:
    toy = start_toy(tmp_path, what)
    assert toy.communicate()[1] == said
    assert toy.returncode == 1


def test_torchruns_variables_make_one_group_of_two_machines(tmp_path: Path) -> None:
    variables = {"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ID": "mine"}
    variables |= {"PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "MINIMIND_PROCESSES": "1"}
    machines = [start_toy(tmp_path, "greet", **variables) for _ in range(2)]
    printed = [machine.communicate() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    assert sorted(out for out, _ in printed) == ["0 2 mine\n", "1 2 mine\n"]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def start_stage(folder: Path) -> subprocess.Popen[str]:
    options = {
        "conversations": "data",
        "output": "models/sft",
        "metrics": "sft.json",
        "history": "sft.csv",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    return subprocess.Popen(
        [sys.executable, "-m", "stages.sft", *arguments],
        cwd=folder,
        env=os.environ
        | {"MINIMIND_PROCESSES": "2", "MINIMIND_SAVE_SECONDS": "0", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_stage_stops_as_a_whole_goes_on_and_writes_once(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "models/tokenizer")
    fingerprint = ChatTokenizer.load(tokenizer).fingerprint
    save_checkpoint(tmp_path / "models/start", tiny_model(vocab_size=267), tokenizer)
    write_rows(tmp_path / "data", random_rows(47), tokenizer=fingerprint)
    section = FIT | {"init": "models/start", "max_steps": 60, "epochs": 100.0}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"sft": section}))

    stage = start_stage(tmp_path)
    while not list(tmp_path.glob(".resume/sft/*/checkpoint-*")):
        assert stage.poll() is None, stage.communicate()
        time.sleep(0.05)
    workers = psutil.Process(stage.pid).children(recursive=True)
    assert len(workers) == 2
    stage.terminate()
    _, said = stage.communicate()
    assert stage.returncode == 128 + signal.SIGTERM
    _header, line = said.splitlines()
    assert "sft: asked to stop; resume checkpoint saved at step" in line
    assert not any(worker.is_running() for worker in workers)
    assert not (tmp_path / "models/sft").exists()

    stage = start_stage(tmp_path)
    _, said = stage.communicate()
    assert stage.returncode == 0, said
    assert said.count("going on from step") == 1
    assert json.loads((tmp_path / "runs/sft.json").read_text())["processes"] == 2
    assert json.loads((tmp_path / "sft.json").read_text())["sft"]["steps"] == 60
    assert load_model(tmp_path / "models/sft").config.vocab_size == 267
    assert not list(tmp_path.glob(".resume/sft/*"))
