"""The history on each tracker, as its own library reads it. None sends anything.

`make test-more` installs all of them; without one its tests are skipped.
"""

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind.errors import Stopped, UserError
from minimind.terminal import trackers
from tests.test_fit import data, quiet_surroundings, train  # noqa: F401

LIBRARIES = ("wandb", "tensorboard", "swanlab", "trackio")


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))  # which it reads when it is imported
        yield folder


def read(library: str, root: Path) -> dict[int, float]:
    """The loss by step that a library has of the only run below `root`."""
    if library == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = (root / "runs" / "tensorboard").iterdir()
        events = EventAccumulator(str(folder)).Reload().Scalars("sft/loss")
        return {event.step: event.value for event in events}
    if library == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        (name,) = SQLiteStorage.get_runs(root.name)
        return {row["step"]: row["sft/loss"] for row in SQLiteStorage.get_logs(root.name, name)}
    if library == "swanlab":
        from swanlab.proto.swanlab.record.v1.record_pb2 import Record

        found = [Record.FromString(record) for record in records(root, "swanlog/*/run-*.swanlab")]
        scalars = [record.scalar for record in found if record.scalar.key == "sft/loss"]
        return {scalar.step: scalar.value.number for scalar in scalars}
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # as at the end of a process: only then is all of it on the disk
    losses = {}
    for content in records(root, "wandb/offline-run-*/run-*.wandb"):
        history = wandb_internal_pb2.Record.FromString(content).history
        values = {item.nested_key[0]: item.value_json for item in history.item}
        if "sft/loss" in values:
            losses[history.step.num] = float(values["sft/loss"])
    return losses


def records(root: Path, pattern: str) -> Iterator[bytes]:
    """Those of LevelDB's log format, in which wandb and SwanLab write; of one run, in its order."""
    files = sorted(root.glob(pattern))
    assert len({file.name for file in files}) == 1
    for file in files:
        content, position, record = file.read_bytes(), 7, b""
        while position < len(content):
            if (room := 2**15 - position % 2**15) < 7:
                position += room
                continue
            length, kind = struct.unpack_from("<HB", content, position + 4)
            record += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield record
                record = b""


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_tracker_has_the_history_of_a_run_that_was_stopped_and_went_on(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    trackio_folder: Path,
    library: str,
) -> None:
    pytest.importorskip(library)
    for name in ("WANDB_MODE", "SWANLAB_MODE"):
        monkeypatch.setenv(name, "offline")
    plain, _ = train(tmp_path, data)
    monkeypatch.setenv("MINIMIND_TRACKER", library)
    monkeypatch.setenv("MINIMIND_TRACKER_PROJECT", tmp_path.name)
    with pytest.raises(Stopped):
        train(tmp_path, data, stop_after=7)
    tracked, _ = train(tmp_path, data)
    assert tracked.rows == plain.rows
    losses = {int(row["step"]): row["loss"] for row in plain.rows if "loss" in row}
    assert read(library, tmp_path) == pytest.approx(losses)


def test_a_tracker_that_is_not_installed_is_one_line(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "swanlab", None)
    monkeypatch.setenv("MINIMIND_TRACKER", "swanlab")
    with pytest.raises(UserError, match=r"pip install 'minimind-dvc\[swanlab\]'"):
        train(tmp_path, data, max_steps=1)


def test_a_tracker_that_does_not_start_is_one_line_and_one_that_fails_later_is_left(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Failing:
        def __init__(self, run: trackers.TrackedRun) -> None:
            if run.project == "none":
                raise RuntimeError("no\nkey")

        def log(self, values: object, step: int) -> None:
            raise ConnectionError("no network")

        def close(self) -> None:
            raise AssertionError

    monkeypatch.setattr(trackers, "TRACKERS", {"wandb": Failing})
    monkeypatch.setenv("MINIMIND_TRACKER", "wandb")
    history, _ = train(tmp_path, data)
    assert history.step == 20
    assert capsys.readouterr().err.count("wandb gets no more of the history: no network") == 1
    monkeypatch.setenv("MINIMIND_TRACKER_PROJECT", "none")
    with pytest.raises(UserError, match="wandb did not start: no"):
        train(tmp_path, data)
