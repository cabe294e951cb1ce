"""`minimind get` against a hub of our own: pinned, checked, resumed, tracked by DVC."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from dvc.repo import Repo
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.project import hub as hub_module
from tests.hub import COMMIT, Hub

ROWS = b"".join(b'{"text": "row %d"}\n' % n for n in range(2000))
DATA = {"sft.jsonl": ROWS, "dpo.jsonl": ROWS[::-1], "README.md": b"data", ".gitattributes": b"x"}
MODEL = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": ROWS,
    "model-00002-of-00002.safetensors": ROWS[:5000],
    "model.safetensors.index.json": b"[]",
    "pytorch_model.bin": b"pickled",
    "onnx/model.onnx": b"large",
    "tokenizer.json": "分词".encode(),
}
HUBS = ["huggingface", "modelscope"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and a DVC project to bring things to."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.chdir(tmp_path)
    Repo.init(no_scm=True).close()
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        server.files[("dataset", "somebody/chats")] = dict(DATA)
        server.files[("model", "somebody/small")] = dict(MODEL)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["get", *arguments])


def succeeds(*arguments: str) -> str:
    result = get(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def complains(*arguments: str) -> str:
    result = get(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result
    assert result.stderr.splitlines()[-1].startswith("minimind: ")
    assert "Traceback" not in result.output
    return result.stderr.splitlines()[-1]


def sources(folder: str) -> dict[str, dict[str, str]]:
    return yaml.safe_load(Path(f"{folder}.dvc").read_text())["meta"]["files"]


@pytest.mark.parametrize("name", HUBS)
def test_a_file_comes_whole_and_dvc_tracks_it(hub: Hub, name: str) -> None:
    said = succeeds("somebody/chats", "sft.jsonl", "--hub", name, "--rev", COMMIT)
    assert [file.name for file in Path("data/chats").iterdir()] == ["sft.jsonl"]
    assert Path("data/chats/sft.jsonl").read_bytes() == ROWS
    assert sources("data/chats") == {
        "sft.jsonl": {
            "from": f"{name}:datasets/somebody/chats@{COMMIT}",
            "sha256": hashlib.sha256(ROWS).hexdigest(),
        }
    }
    assert "1 files" in said and not Path("data/chats.partial").exists()
    with Repo() as repo:
        assert not repo.status()
    asked = len(hub.asked)
    assert "0 new" in succeeds("somebody/chats", "sft.jsonl", "--hub", name, "--rev", COMMIT)
    assert len(hub.asked) == asked
    succeeds("somebody/chats", "dpo*", "--hub", name, "--rev", COMMIT)
    assert set(sources("data/chats")) == {"sft.jsonl", "dpo.jsonl"}


@pytest.mark.parametrize("name", HUBS)
def test_of_a_model_comes_what_is_read(hub: Hub, name: str) -> None:
    said = succeeds("somebody/small", "--hub", name, "--output", "foreign/small")
    wanted = MODEL.keys() - {"pytorch_model.bin", "onnx/model.onnx"}
    assert {file.name for file in Path("foreign/small").iterdir()} == wanted
    assert all(Path("foreign/small", path).read_bytes() == MODEL[path] for path in wanted)
    assert "left out, unless you name them: pytorch_model.bin, onnx/model.onnx" in said
    assert f"--rev {COMMIT if name == 'huggingface' else 'master'} brings the same" in said
    succeeds("somebody/small", "onnx/*", "--hub", name, "--output", "foreign/small")
    assert Path("foreign/small/onnx/model.onnx").read_bytes() == b"large"


@pytest.mark.parametrize("name", HUBS)
def test_a_download_that_was_cut_goes_on_where_it_was(hub: Hub, name: str) -> None:
    hub.cut = 20_000
    said = complains("somebody/chats", "sft.jsonl", "--hub", name)
    assert "the same command goes on from here" in said
    assert not Path("data/chats").exists() and not Path("data/chats.dvc").exists()
    hub.is_broken = False
    hub.asked.clear()
    succeeds("somebody/chats", "sft.jsonl", "--hub", name)
    ((path, asked),) = hub.asked
    assert path == "sft.jsonl" and asked is not None
    assert 0 < int(asked.removeprefix("bytes=").partition("-")[0]) <= 20_000
    assert Path("data/chats/sft.jsonl").read_bytes() == ROWS


@pytest.mark.parametrize("name", HUBS)
def test_what_is_not_what_the_hub_says_is_refused(
    hub: Hub, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = hub_module._download

    def damaged(repository, file, folder) -> None:  # type: ignore[no-untyped-def]
        original(repository, file, folder)
        content = (folder / file.path).read_bytes()
        (folder / file.path).write_bytes(b"X" + content[1:])

    with monkeypatch.context() as patch:
        patch.setattr(hub_module, "_download", damaged)
        for file in ("sft.jsonl", "README.md"):  # with a SHA-256, and with git's hash alone
            said = complains("somebody/chats", file, "--hub", name)
            assert f"{file} is not what the hub says it is" in said
    assert not Path("data/chats").exists()
    succeeds("somebody/chats", "--hub", name)
    assert {file.name for file in Path("data/chats").iterdir()} == DATA.keys() - {".gitattributes"}


@pytest.mark.parametrize("name", HUBS)
def test_what_is_not_there_is_one_line(hub: Hub, name: str) -> None:
    assert "is no data set or model" in complains("somebody/else", "--hub", name)
    said = complains("somebody/chats", "sft2.jsonl", "--hub", name)
    assert "has no file sft2.jsonl; it has: sft.jsonl, dpo.jsonl" in said
    hub.files[("model", "somebody/chats")] = dict(MODEL)
    assert "both a data set and a model: say --kind" in complains("somebody/chats", "--hub", name)
    succeeds("somebody/chats", "dpo.jsonl", "--hub", name, "--kind", "dataset")
    hub.files[("dataset", "somebody/evil")] = {"../../evil.jsonl": ROWS}
    assert "would lie elsewhere" in complains("somebody/evil", "--hub", name)


def test_what_others_have_written_is_left_alone(hub: Hub) -> None:
    Path("data/chats").mkdir(parents=True)
    for name in ("tokens.bin", "sft.jsonl"):  # of a stage, or of the user
        Path("data/chats", name).write_bytes(b"mine")
        said = complains("somebody/chats", "sft.jsonl")
        assert f"data/chats/{name} is there, and not as a hub has it" in said
        assert Path("data/chats", name).read_bytes() == b"mine" and not hub.asked
        Path("data/chats", name).unlink()
    succeeds("somebody/chats", "sft.jsonl")
    Path("data/chats/sft.jsonl").write_bytes(b"mine")  # edited since
    assert "sft.jsonl is there, and not as" in complains("somebody/chats")
    assert Path("data/chats/sft.jsonl").read_bytes() == b"mine"
    Path("data/chats/sft.jsonl").unlink()
    succeeds("somebody/chats")
    hub.files[("dataset", "somebody/chats")]["sft.jsonl"] = ROWS[:-5]  # a newer revision
    succeeds("somebody/chats")
    assert Path("data/chats/sft.jsonl").read_bytes() == ROWS[:-5]
    said = succeeds("somebody/small", "config.json", "--output", "data/chats")
    assert "beside them, from elsewhere or another revision: sft.jsonl, dpo.jsonl" in said


def test_a_command_that_died_before_dvc_had_its_files_is_run_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Repo, "add", lambda *_: 1 / 0)
        complains("somebody/chats")
    assert Path("data/chats/sft.jsonl").exists() and not Path("data/chats.dvc").exists()
    assert "0 new" in succeeds("somebody/chats")
    assert len(sources("data/chats")) == 3


def test_a_revision_that_is_not_there_is_one_line(hub: Hub) -> None:
    assert "Revision" in complains("somebody/chats", "--rev", "v9")


def test_outside_of_a_project_nothing_is_brought(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path.parent / f"{tmp_path.name} elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert "this is no DVC project" in complains("somebody/chats")
    assert not list(elsewhere.iterdir())


def test_a_long_list_of_modelscope_has_pages(hub: Hub) -> None:
    hub.files[("dataset", "somebody/chats")] |= {f"{n:03}.jsonl": b"{}\n" for n in range(250)}
    assert "254 files" not in succeeds("somebody/chats", "2*", "--hub", "modelscope")
    assert len(list(Path("data/chats").iterdir())) == 50
