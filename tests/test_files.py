"""What is written is there whole, or as it was, and an error says where."""

import errno
import os
from pathlib import Path

import pytest

from minimind.files import replacing
from minimind.lineage.resume import ResumeStore


def fill_the_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write() does: without a name


def test_a_full_disk_leaves_what_was_there_and_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")

    def write_half() -> None:
        with replacing(file) as partial:
            partial.write_text("half")
            fill_the_disk()

    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "before"


def test_a_full_disk_below_resume_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResumeStore(tmp_path / ".resume" / "sft" / "run")
    monkeypatch.setattr(os, "fsync", fill_the_disk)
    with pytest.raises(
        OSError, match=r"No space left on device: '.*/sft/run/partial-finished\.json'"
    ):
        store.finish({})
    assert not (store.directory / "finished.json").exists()
