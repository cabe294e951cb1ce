"""Stages side by side: what may start when, and that DVC's files are as one after another."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import chdir
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import networkx as nx
import pytest
import yaml
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.text import Text

from benchmarks.parallel import bound
from minimind.compute.settings import RuntimeSettings
from minimind.errors import UserError
from minimind.orchestrate import run
from minimind.orchestrate.display import Display
from minimind.orchestrate.graph import load_graph
from minimind.orchestrate.machine import machine
from minimind.orchestrate.run import reproduce
from minimind.orchestrate.scheduler import Machine, Schedule
from tests.project import dvc, git

# Each of a and b waits for the other to have begun: one after the other they would never end.
MEET = (
    "touch {0}.begun; for i in $(seq 300); do [ -e {1}.begun ] && break; sleep 0.1; done; "
    "[ -e {1}.begun ] && cat {2} > {0}"
)
GRAPH = {
    "encode": {
        "foreach": ["x", "y"],
        "do": {
            "cmd": "test -s ${item}.txt && head -n 1 ${item}.txt > ${item}.bin",
            "deps": ["${item}.txt"],
            "outs": ["${item}.bin"],
        },
    },
    "a": {"cmd": MEET.format("a", "b", "x.bin"), "deps": ["x.bin"], "outs": ["a"]},
    "b": {"cmd": MEET.format("b", "a", "y.bin"), "deps": ["y.bin"], "outs": ["b"]},
    "c": {"cmd": "cat a b > c", "deps": ["a", "b"], "metrics": [{"c": {"cache": False}}]},
    "d": {"cmd": "cat b > d", "deps": ["b"], "outs": ["d"]},
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    write_graph(GRAPH)
    Path("x.txt").write_text("1\n")
    Path("y.txt").write_text("2\n")
    git(tmp_path, "init", "-q")
    dvc(tmp_path, "init", "-q")
    return tmp_path


def write_graph(stages: dict[str, object]) -> None:
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))


def locked() -> dict[str, object]:
    return yaml.safe_load(Path("dvc.lock").read_text())["stages"]


def begin(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "minimind.cli.main", "repro", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_dvc_is_told_the_same_as_by_its_own_repro(project: Path) -> None:
    report = reproduce(jobs=2)
    assert {(name, how) for name, how, _ in report.outcomes} == {
        (name, "ran") for name in ("encode@x", "encode@y", "a", "b", "c", "d")
    }
    assert report.tracked == {"dvc.lock", "c"}
    Path("folder").mkdir()
    with chdir("folder"):
        tracked = reproduce(["../dvc.yaml:c"], force=True).tracked
    assert tracked == {"../dvc.lock", "../c"}
    whole = locked()
    assert "up to date" in dvc(project, "status")
    Path("dvc.lock").unlink()
    dvc(project, "repro", "--force")
    assert locked() == whole
    assert (reproduce(jobs=2).outcomes, reproduce(jobs=2).num_unchanged) == ([], 6)

    Path("y.txt").write_text("2\nnot encoded\n")  # encode@y runs, to the same bytes
    again = reproduce(jobs=2)
    assert [(name, how) for name, how, _ in again.outcomes] == [("encode@y", "ran")]
    Path("d").unlink()
    Path("a").unlink()
    Path("dvc.lock").write_text(Path("dvc.lock").read_text().replace("cat b > d", "other"))
    fetched = reproduce(["d"], jobs=2)  # what it ran before is in the run cache; a is not asked for
    assert [(name, how) for name, how, _ in fetched.outcomes] == [("d", "from cache")]
    assert not Path("a").exists()


def test_a_failure_lets_the_others_end_and_starts_none(project: Path) -> None:
    # a fails when b has begun; b ends after that.
    failing = {"cmd": MEET.format("a", "b", "x.bin") + "; echo no room; exit 3", "deps": ["x.bin"]}
    slow = {**GRAPH["b"], "cmd": MEET.format("b", "a", "y.bin") + "; sleep 3"}
    write_graph({**GRAPH, "a": {**failing, "outs": ["a"]}, "b": slow})
    started = begin("-j", "2")
    printed = started.communicate(timeout=120)[0]
    assert started.returncode == 1
    assert printed.splitlines()[-1] == "minimind: a failed: no room (runs/logs/a.log)"
    assert "b" in locked()
    assert not {"a", "c", "d"} & locked().keys()
    report = reproduce(jobs=2, keep_going=True)
    assert [(name, how) for name, how, _ in report.outcomes if how == "ran"] == [("d", "ran")]
    assert "c" not in locked()


def test_bad_data_is_found_before_anything_is_trained(project: Path) -> None:
    Path("y.txt").write_text("")
    (failure,) = reproduce(jobs=1).failures
    assert failure.startswith("encode@y failed")
    assert locked().keys() == {"encode@x"}


def test_asked_to_stop_stages_end_in_order_and_the_same_command_goes_on(project: Path) -> None:
    # A shell and a child, which both must hear of it; `;` would go on to success otherwise.
    catching = "trap 'echo saved; exit 7' INT; touch begun; sleep 60; cat x.bin > a"
    write_graph({**GRAPH, "a": {"cmd": catching, "deps": ["x.bin"], "outs": ["a"]}})
    started = begin("-j", "1", "a")
    wait_for(Path("begun").exists)
    started.send_signal(signal.SIGTERM)
    printed = started.communicate(timeout=60)[0]
    assert started.returncode == 128 + signal.SIGTERM
    assert printed.splitlines()[-1].startswith("minimind: stopped; the same command")
    assert "saved" in Path("runs/logs/a.log").read_text()
    assert locked().keys() == {"encode@x"}
    write_graph(GRAPH)
    assert [how for _, how, _ in reproduce(jobs=2).outcomes] == ["ran"] * 5


def test_the_second_signal_acts_at_once(project: Path) -> None:
    deaf = "trap '' INT; touch begun; sleep 60"
    write_graph({"a": {"cmd": deaf, "outs": ["a"]}})
    started = begin()
    wait_for(Path("begun").exists)
    for _ in range(2):
        started.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert started.communicate(timeout=20)[0].splitlines()[-1].startswith("minimind: stopped")
    assert started.returncode == 128 + signal.SIGINT


def test_each_stage_has_a_gpu_of_its_own(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        name: {**GRAPH[name], "cmd": f"{GRAPH[name]['cmd']}; echo $CUDA_VISIBLE_DEVICES > {name}"}
        for name in "ab"
    }
    write_graph({**GRAPH, **told})
    monkeypatch.setattr(run, "gpus", lambda _: ["3", "5"])
    reproduce(["a", "b"])
    assert {Path("a").read_text(), Path("b").read_text()} == {"3\n", "5\n"}


def test_what_a_launcher_takes_elsewhere_is_told_nothing_of_this_machine(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "RAYON_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MINIMIND_LAUNCHER", "srun {command}")
    monkeypatch.setenv("MINIMIND_THREADS", "7")
    monkeypatch.setattr(run, "gpus", lambda _: ["3", "5"])
    names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MINIMIND_THREADS", "CUDA_VISIBLE_DEVICES")
    told = f"echo {' '.join(f'[${name}]' for name in names)} > "
    stages = {name: {"cmd": told + name, "outs": [name]} for name in ("encode", "a", "b")}
    write_graph(stages)
    reproduce(jobs=4)
    assert Path("encode").read_text() == "[1] [1] [] []\n"  # it stays: a part of what there is
    assert Path("a").read_text() == Path("b").read_text() == "[2] [] [7] []\n"


@pytest.mark.parametrize("width", [60, 112])
def test_the_name_of_a_running_stage_is_whole_and_its_line_fits(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", StringIO())
    said = "rejection_sampling: step 12/300  " + "loss 1.234  " * 20
    stage = SimpleNamespace(
        stage="rejection_sampling", seconds=123.4, threads=2, last_line=lambda: said
    )
    with Display() as display:
        display.show([stage], 12, 40)
    written = Text.from_ansi(sys.stdout.getvalue()).plain.splitlines()
    line = next(line for line in written if "rejection" in line)
    assert line.startswith("rejection_sampling   123 s  ")
    assert "step 12/300  loss" in line
    assert len(line) == width


def test_a_pipe_in_the_place_of_a_file_is_one_line(project: Path) -> None:
    reproduce()
    Path("x.txt").unlink()
    os.mkfifo("x.txt")
    started = begin()  # DVC waits for ever for what is in a pipe
    try:
        printed = started.communicate(timeout=60)[0]
    finally:
        started.kill()
    assert printed.startswith("minimind: x.txt is a pipe")
    assert printed.count("\n") == 1


def test_what_another_dvc_uses_is_waited_for(project: Path) -> None:
    dvc(project, "repro", "encode")
    list_of_users = project / ".dvc" / "tmp" / "rwlock"
    other = subprocess.Popen(["sleep", "8"])
    threading.Thread(target=other.wait).start()  # or it would stay in the list of processes
    in_use = {"write": {str(project / "x.bin"): {"pid": other.pid, "cmd": "dvc"}}}
    list_of_users.write_text(json.dumps(in_use))
    report = reproduce(["a", "b"], jobs=2)
    assert other.returncode == 0
    assert {name for name, how, _ in report.outcomes if how == "ran"} == {"a", "b"}


def test_one_at_a_time_and_targets_that_are_there(project: Path) -> None:
    with (
        FileLock(project / ".dvc/tmp/minimind-repro.lock"),
        pytest.raises(UserError, match="another `minimind repro` runs"),
    ):
        reproduce()
    with pytest.raises(UserError, match=r"'e' not found.*dvc dag"):
        reproduce(["e"])


def test_an_edit_between_the_end_of_a_stage_and_its_entry_is_found(project: Path) -> None:
    """As by the next stage under one `dvc repro`: here each stage has a DVC of its own."""
    record = {
        "metrics_md5": hashlib.md5(b"1\n").hexdigest(),
        "files": {"x.bin": "0" * 32},
        "params": {},
        "dvc": {"stage": "a", "pid": 1, "created": 0.0},
    }
    Path("record.json").write_text(json.dumps(record))
    leaving = "cp x.bin a && cp record.json runs/a.json"
    write_graph({**GRAPH, "a": {"cmd": leaving, "deps": ["x.bin"], "outs": ["a"]}})
    report = reproduce(["a"])
    (failure,) = report.failures
    assert failure.startswith("a failed: x.bin changed after stage a had ended")
    assert [how for name, how, _ in report.outcomes if name == "a"] == ["failed"]


def test_a_broken_graph_is_one_line(project: Path) -> None:
    Path("dvc.yaml").write_text("stages: [\n")
    with pytest.raises(UserError, match="line 2"):
        reproduce()


def test_a_frozen_stage_needs_nothing(project: Path) -> None:
    from dvc.repo import Repo

    write_graph({**GRAPH, "c": {**GRAPH["c"], "frozen": True}})
    assert set(load_graph(Repo(), ["c"])) == {"c"}


NAMES = ["code", "encode@a", "encode@b", "sft", "dpo", "lora", "grpo", "report"]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    graph = nx.DiGraph()
    graph.add_nodes_from(draw(st.permutations(NAMES)))
    order = list(graph)
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    graph.add_edges_from(pair for pair in pairs if draw(st.booleans()))
    jobs = draw(st.integers(1, 4))
    limits = Machine(jobs, draw(st.integers(jobs, 9)), 100, draw(st.booleans()))
    seconds = {name: draw(st.floats(0.1, 100)) for name in order}
    memory = {name: draw(st.floats(0, 150)) for name in order}
    return Schedule(graph, limits, seconds, memory, keep_going=draw(st.booleans()))


@given(schedules(), st.sets(st.sampled_from(NAMES), max_size=2))
@settings(max_examples=200, deadline=None)
def test_schedules_keep_to_the_graph_and_the_machine(plan: Schedule, bad: set[str]) -> None:
    now, ends, starts = 0.0, {}, {}
    while True:
        may_start = not plan.failed or plan.keep_going
        for name, threads in plan.start().items():
            assert may_start
            assert plan.done >= set(plan.graph.predecessors(name))
            assert name not in starts
            starts[name] = now
            ends[name] = now + plan.seconds[name] / threads**0.5
        assert plan.start() == {}  # asked once more, it has nothing to add
        assert len(plan.running) <= plan.machine.jobs
        assert sum(plan.running.values()) <= plan.machine.threads
        used = sum(plan.memory_mib[name] for name in plan.running)
        assert used <= plan.machine.memory_mib or len(plan.running) == 1
        if not ends:
            break
        name = min(ends, key=lambda name: ends[name])
        now = ends.pop(name)
        del plan.running[name]
        (plan.failed if name in bad else plan.done).add(name)
    one = plan.seconds
    assert now <= sum(one[name] for name in starts) + 1e-6  # as one after another
    if not plan.failed and plan.machine.divides_threads and plan.machine.threads > 1:
        every = {name: one[name] / plan.machine.threads**0.5 for name in NAMES}
        assert now >= bound(plan.graph, one, every, plan.machine.threads) - 1e-6
    if not plan.failed or plan.keep_going:
        below = set().union(*(nx.descendants(plan.graph, name) for name in plan.failed))
        assert set(starts) == set(NAMES) - below
    checking = {"code", "encode@a", "encode@b"}
    first = {n for n in checking if nx.ancestors(plan.graph, n) <= checking}
    if not bad:
        others = min(starts[name] for name in NAMES if name not in first)
        assert all(starts[name] + 1e-9 < others or starts[name] == 0 == others for name in first)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"sft": 100, "lora": 90}, {"sft": 2, "lora": 2}),  # enough to do for both
        ({"sft": 100, "lora": 9}, {"sft": 4}),  # not worth half the threads
        ({"sft": 100}, {"sft": 4}),
    ],
)
def test_threads_are_shared_with_those_who_can_use_them(
    seconds: dict[str, float], expected: dict[str, int]
) -> None:
    graph = nx.DiGraph()
    graph.add_nodes_from(seconds)
    plan = Schedule(graph, Machine(2, 4), seconds, dict.fromkeys(seconds, 0.0))
    assert plan.start() == expected


def test_the_longest_remaining_path_goes_first() -> None:
    graph = nx.DiGraph([("pretrain", "sft"), ("sft", "grpo")])
    graph.add_node("lora")
    seconds = {"pretrain": 1.0, "sft": 5.0, "grpo": 5.0, "lora": 9.0}
    assert Schedule(graph, Machine(1, 1), seconds, seconds).ready() == ["pretrain", "lora"]


def test_asked_threads_are_those_of_all_stages_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    six = RuntimeSettings(threads=6)
    limits = [machine(six, jobs, 0) for jobs in (None, 2, 8)]
    assert [(limit.jobs, limit.threads) for limit in limits] == [(6, 6), (2, 6), (8, 8)]
    assert machine(six, None, 2).jobs == machine(six, 9, 2).jobs == 2
