"""`minimind publish` against a hub on this machine: what is sent; by default nothing is."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from minimind.exports.folder import write_export
from minimind.exports.receipt import Receipt
from minimind.model.checkpoint import save_checkpoint
from tests.graph import ROOT
from tests.tiny import TOKENIZER_SIZE, tiny_model, tiny_tokenizer


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a small upload needs; it knows one token."""

    requests: ClassVar[list[str]] = []
    sent: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append(self.path)
        place = f"http://{self.headers['Host']}/user/it"
        answer: dict[str, Any] = {}
        status = 200
        if self.headers.get("Authorization") != "Bearer hf_right":
            status, answer = 401, {"error": "who are you?"}
        elif "/preupload/" in self.path:
            kind = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            answer = {"files": [{"path": f["path"]} | kind for f in json.loads(body)["files"]]}
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.sent.update({f["path"]: base64.b64decode(f["content"]) for f in files})
            answer = {"commitUrl": f"{place}/commit/1", "commitOid": "1", "success": True}
        elif self.path == "/api/repos/create":
            answer = {"url": place, "private": json.loads(body).get("visibility")}
        self._reply(status, answer)

    def do_GET(self) -> None:
        self._reply(200, {})

    def _reply(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.requests, Hub.sent = [], {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    model = tiny_model(vocab_size=TOKENIZER_SIZE)
    save_checkpoint(base, model, tiny_tokenizer(tmp_path / "tokenizer"))
    nothing = Receipt(checkpoint="base", checkpoint_md5=None, command="", ancestors=[])
    write_export(tmp_path / "it", base, nothing)
    return tmp_path / "it"


def publish(folder: Path, hub: str, *more: str, token: str = "hf_right") -> tuple[int, str, str]:
    """The client reads its settings when it is imported: so in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "minimind.cli.main", "publish", str(folder), "user/it", *more],
        env=os.environ | {"HF_ENDPOINT": hub, "HF_TOKEN": token, "HF_HOME": str(folder.parent)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_nothing_is_sent_unless_it_is_asked_for(folder: Path, hub: str) -> None:
    code, said, _ = publish(folder, hub)
    assert code == 0
    assert "model.safetensors: " in said
    assert "nothing was sent" in said
    assert Hub.requests == []


def test_what_the_receipt_has_is_sent_as_it_is(folder: Path, hub: str) -> None:
    beside = {"it-f16.gguf": b"GGUF", "it-f16.Modelfile": b"FROM x"}
    for name, content in beside.items():
        (folder.parent / name).write_bytes(content)
    (folder / ".secret").write_text("not this")
    code, said, _ = publish(folder, hub, "--upload")
    assert code == 0
    assert f"{hub}/user/it/commit/1" in said
    expected = {f.name: f.read_bytes() for f in folder.iterdir() if f.name != ".secret"}
    assert Hub.sent == expected | beside


def test_a_folder_that_was_changed_and_one_without_a_receipt_stay_here(
    folder: Path, hub: str
) -> None:
    (folder / "config.json").write_text("{}")
    code, _, complaint = publish(folder, hub, "--upload")
    assert (code, complaint.count("\n")) == (1, 1)
    assert "config.json" in complaint
    code, _, complaint = publish(folder.parent / "base", hub, "--upload")
    assert (code, complaint.count("\n")) == (1, 1)
    assert "lineage.json is missing" in complaint
    assert Hub.requests == []


@pytest.mark.parametrize("token", ["hf_wrong", ""])
def test_what_the_hub_says_is_one_line(folder: Path, hub: str, token: str) -> None:
    code, _, complaint = publish(folder, hub, "--upload", token=token)
    assert code == 1
    assert complaint.splitlines()[-1].startswith("minimind: user/it was not published: ")
    assert Hub.sent == {}
