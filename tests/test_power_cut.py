"""Power cuts: whatever was written and not synced may be lost, and a run goes on all the same.

What a run does to the disk is recorded. Then every prefix of it is replayed, each in several
ways: files that were not synced are empty, cut or whole; of the names that a folder was given
or lost since it was synced, the first few are there, or all, or only the last.
"""

import itertools
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.errors import Stopped
from minimind.lineage.resume import ResumeCheckpoint, ResumeStore, forget_recorded
from tests.test_fit import data, quiet_surroundings, train, weights  # noqa: F401


@dataclass
class File:
    """One file, whatever its name."""

    content: bytes = b""
    synced: bytes = b""


@dataclass
class Folder:
    """One folder: what its names stood for when it was synced, and what became of them since."""

    synced: dict[str, int] = field(default_factory=dict)  # name to node
    changes: list[dict[str, int | None]] = field(default_factory=list)

    def entries(self, changes: list[dict[str, int | None]]) -> dict[str, int]:
        names: dict[str, int | None] = dict(self.synced)
        for change in changes:
            names |= change
        return {name: node for name, node in names.items() if node is not None}


Disk = dict[int, File | Folder]  # by inode number


class Recorder:
    """Follows a folder through what is done to it; `moments` are the disks it has been."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.disk: Disk = {}
        self.moments: list[Disk] = []
        self.marks: list[Any] = []  # what was promised by then
        self.mark: Any = None
        # Of everything that was ever there: as long as it is open, its number is not given away.
        self._opened: dict[int, int] = {}
        self._notice()
        for node in self.disk.values():  # what was there before is durable
            _sync(node)

    @contextmanager
    def recording(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
                patch.setattr(os, name, self._watched(getattr(os, name)))
            patch.setattr(os, "fsync", self._watched(os.fsync, self._synced))
            patch.setattr(os, "sync", self._watched(os.sync, self._all_synced))
            yield
        self._moment()
        for descriptor in self._opened.values():
            os.close(descriptor)

    def _watched(self, function: Callable[..., Any], then: Any = None) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self._moment()  # files may have been written since the last one
            result = function(*arguments, **named)
            if then:
                then(*arguments)
            self._moment()
            return result

        return call

    def _synced(self, descriptor: int) -> None:
        self._notice()
        if node := self.disk.get(os.fstat(descriptor).st_ino):
            _sync(node)

    def _all_synced(self) -> None:
        self._notice()
        for node in self.disk.values():
            _sync(node)

    def _moment(self) -> None:
        self._notice()
        if not self.moments or self.moments[-1] != self.disk or self.marks[-1] != self.mark:
            self.moments.append(deepcopy(self.disk))
            self.marks.append(self.mark)

    def _number(self, path: Path) -> int:
        number = path.stat().st_ino
        if number not in self._opened:
            self._opened[number] = os.open(path, os.O_RDONLY)
        return number

    def _notice(self) -> None:
        """Bring `disk` up to what lies in the folder now."""
        for folder, folders, files in os.walk(self.root):
            here = Path(folder)
            node = self.disk.setdefault(self._number(here), Folder())
            assert isinstance(node, Folder)
            now = {name: self._number(here / name) for name in [*folders, *files]}
            before = node.entries(node.changes)
            changed: dict[str, int | None] = {
                name: now.get(name)
                for name in sorted(before | now)
                if before.get(name) != now.get(name)
            }
            if changed:
                node.changes.append(changed)
            for name in files:
                file = self.disk.setdefault(now[name], File())
                assert isinstance(file, File)
                file.content = (here / name).read_bytes()


def _sync(node: File | Folder) -> None:
    if isinstance(node, File):
        node.synced = node.content
    else:
        node.synced, node.changes = node.entries(node.changes), []


def contents_after_a_cut(file: File) -> list[bytes]:
    half = file.content[: len(file.content) // 2]
    return list(dict.fromkeys([file.synced, b"", half, file.content]))


def entries_after_a_cut(folder: Folder) -> list[dict[str, int]]:
    changes = folder.changes
    survivors = [changes[:kept] for kept in range(len(changes) + 1)]
    survivors += [changes[-1:]] if len(changes) > 1 else []
    return [folder.entries(kept) for kept in survivors]


def disks_after_a_cut(disk: Disk, root: int, limit: int = 24) -> Iterator[dict[str, bytes | None]]:
    """Files (and folders, as None) by path, in some of the ways that a power cut may leave them."""
    ways: dict[int, list[Any]] = {}
    for number, node in disk.items():
        if isinstance(node, Folder):
            ways[number] = entries_after_a_cut(node)
        elif node.content == node.synced:
            ways[number] = [node.content]
        else:
            ways[number] = contents_after_a_cut(node)
    for choice in itertools.islice(itertools.product(*ways.values()), limit):
        chosen = dict(zip(ways, choice, strict=True))
        tree: dict[str, bytes | None] = {}

        def walk(number: int, path: str, chosen=chosen, tree=tree) -> None:
            for name, child in chosen[number].items():
                what = chosen[child]
                tree[f"{path}{name}"] = None if isinstance(what, dict) else what
                if isinstance(what, dict):
                    walk(child, f"{path}{name}/")

        walk(root, "")
        yield tree


def cuts(recorder: Recorder) -> Iterator[tuple[dict[str, bytes | None], Any]]:
    """Every disk that a cut may leave, with what had been promised by then; each once."""
    seen = set()
    root = recorder.root.stat().st_ino
    for disk, mark in zip(recorder.moments, recorder.marks, strict=True):
        for tree in disks_after_a_cut(disk, root):
            key = (mark, *sorted((name, hash(content)) for name, content in tree.items()))
            if key not in seen:
                seen.add(key)
                yield tree, mark


def lay_out(tree: dict[str, bytes | None], directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, content in tree.items():
        path = directory / name
        path.mkdir() if content is None else path.write_bytes(content)
        if name.endswith(".lease"):
            os.utime(path, (0, 0))  # the power was gone for a while


def a_state(step: int) -> ResumeCheckpoint:
    return ResumeCheckpoint(step, {"weights": torch.full((64,), float(step))}, {"note": f"{step}"})


def check_loaded(store: ResumeStore, at_least: int | None, when: str) -> int | None:
    """What is loaded is what was saved, and no older than was promised."""
    state, _ = store.load()
    if at_least is not None:
        assert state is not None, f"no state {when}, though {at_least} was saved"
        assert state.step >= at_least, when
    if state is None:
        return None
    assert state.values == {"note": f"{state.step}"}
    assert torch.equal(state.tensors["weights"], a_state(state.step).tensors["weights"])
    return state.step


def several_saves(root: Path, recorder: Recorder) -> None:
    store = ResumeStore(root / ".resume" / "sft" / "0123")
    for step in (1, 2, 3, 4):
        store.save(a_state(step))
        recorder.mark = step
    store.close()


def saving_over_a_damaged_state(root: Path, recorder: Recorder) -> None:
    store = ResumeStore(root / ".resume" / "sft" / "0123")
    store.save(a_state(1))
    store.save(a_state(4))
    (store.directory / "checkpoint-000000004" / "values.json").write_bytes(b"")
    recorder.mark = 1
    for step in (2, 3, 4):
        store.save(a_state(step))
        recorder.mark = step
        kept = sorted(path.name[-1] for path in store.directory.glob("checkpoint-*"))
        assert kept == [str(step - 1), str(step)]
    store.close()


def a_last_state_saved_again(root: Path, recorder: Recorder) -> None:
    """A short run has one state; killed while DVC records it, it goes on from there and ends."""
    for _ in range(2):
        store = ResumeStore(root / ".resume" / "sft" / "0123")
        store.save(a_state(5))
        recorder.mark = 5
        store.finish({"folder": str(root), "metrics_md5": "5d41"})
        store.close()


@pytest.mark.parametrize(
    "history", [several_saves, saving_over_a_damaged_state, a_last_state_saved_again]
)
def test_a_state_that_was_saved_is_there_after_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: Callable[[Path, Recorder], None]
) -> None:
    root, again = tmp_path / "disk", tmp_path / "again"
    root.mkdir()
    recorder = Recorder(root)
    with recorder.recording(monkeypatch):
        history(root, recorder)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and nothing is cut below
    num_cuts = 0
    for tree, mark in cuts(recorder):
        lay_out(tree, again)
        num_cuts += 1
        store = ResumeStore(again / ".resume" / "sft" / "0123")
        step = check_loaded(store, mark, f"on {sorted(tree)}")
        store.save(a_state((step or 0) + 1))  # it goes on
        check_loaded(store, (step or 0) + 1, "after going on")
        assert len(list(store.directory.glob("checkpoint-*"))) <= 2
        assert not list(store.directory.glob("partial-*/"))
        store.close()
    assert num_cuts > 40


def test_states_go_only_when_what_dvc_recorded_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, again = tmp_path / "disk", tmp_path / "again"
    root.mkdir()
    recorder = Recorder(root)
    states = root / ".resume" / "sft" / "0123"
    lock = json.dumps({"sft": "5d41"})
    with recorder.recording(monkeypatch):
        store = ResumeStore(states)
        store.save(a_state(5))
        store.finish({"folder": str(root), "metrics_md5": "5d41"})
        store.close()
        recorder.mark = 5
        forget_recorded(root / ".resume", wanted=states)  # DVC has not recorded anything yet
        (root / "weights").write_bytes(b"the outputs")
        (root / "dvc.lock").write_text(lock)
        forget_recorded(root / ".resume", wanted=states)
    assert not states.exists()
    num_without_states = 0
    for tree, mark in cuts(recorder):
        outputs = (tree.get("weights"), tree.get("dvc.lock"))
        is_recorded = outputs == (b"the outputs", lock.encode())
        lay_out(tree, again)
        store = ResumeStore(again / ".resume" / "sft" / "0123")
        step = check_loaded(store, None, "")
        store.close()
        assert step == 5 or is_recorded or mark is None
        num_without_states += step is None and is_recorded
    assert num_without_states


def test_a_run_ends_with_the_same_bytes_after_any_power_cut(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"max_steps": 6, "eval_interval": 3}
    _, whole = train(tmp_path, data, **changes)
    monkeypatch.setenv("DVC_STAGE", "sft")  # or the last states would go at the end
    monkeypatch.setenv("MINIMIND_SAVE_SECONDS", "0")
    disk, again = tmp_path / "disk", tmp_path / "again"
    disk.mkdir()
    monkeypatch.setenv("DVC_ROOT", str(disk))
    recorder = Recorder(disk)
    with recorder.recording(monkeypatch):
        train(tmp_path, data, **changes)
    monkeypatch.setenv("DVC_ROOT", str(again))
    monkeypatch.setenv("MINIMIND_SAVE_SECONDS", "3600")
    first_steps = set()
    for tree, _ in list(cuts(recorder))[::40]:
        lay_out(tree, again)
        history, model = train(tmp_path, data, **changes)
        assert weights(model) == weights(whole)
        first_steps.add(history.resumes)
    assert first_steps == {0, 1}


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    _, whole = train(tmp_path, data)
    with pytest.raises(Stopped):
        train(tmp_path, data, stop_after=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(Exception, match="could not be saved") as error:
            train(tmp_path, data, stop_after=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    states = [path.name for path in tmp_path.glob(".resume/*/*/*-0*")]
    assert states == ["checkpoint-000000004"]
    history, model = train(tmp_path, data)
    assert history.resumes == 1
    assert weights(model) == weights(whole)
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_stopped_runs_left_is_listed_and_pruned(
    tmp_path: Path,
    data,  # noqa: F811
) -> None:
    for lr in (0.01, 0.02):
        with pytest.raises(Stopped):
            train(tmp_path, data, stop_after=4, lr=lr)
    listed = CliRunner().invoke(app, ["resume", str(tmp_path)])
    assert listed.exit_code == 0
    rows = [line.split("|")[1:-1] for line in listed.stdout.splitlines()[2:]]
    assert [(row[0].strip(), row[2].strip(), row[5].strip()) for row in rows] == [
        ("sft", "4", "kept")
    ] * 2
    assert len({row[1] for row in rows}) == 2
    arguments = ["resume", str(tmp_path), "--prune", "--older-than"]
    assert "nothing to resume" in CliRunner().invoke(app, [*arguments, "1"]).stdout
    first, second = sorted(tmp_path.glob(".resume/sft/*"))
    (second / "checkpoint-xyz").mkdir()  # not ours, and no reason to fail
    store = ResumeStore(first)  # a run that is going on
    pruned = CliRunner().invoke(app, [*arguments, "0"])
    assert pruned.exit_code == 1
    assert "is in use by process" in pruned.stderr
    assert list(tmp_path.glob(".resume/sft/*/")) == [first]
    store.close()
    assert CliRunner().invoke(app, [*arguments, "0"]).exit_code == 0
    assert not list(tmp_path.glob(".resume/sft/*"))
