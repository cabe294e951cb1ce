"""Rejection sampling: what is kept and why, from a checkpoint and an endpoint on loopback."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minimind.chat.tokenizer import ChatTokenizer
from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.datasets.formats import parse_reasoning, read_rows
from minimind.model.checkpoint import save_checkpoint
from minimind.tasks.problem import Problem
from minimind.thinking import completions, endpoint
from minimind.thinking.completions import Completion
from minimind.thinking.rejection_sampling import RejectionSampling
from stages.rejection_sampling import app
from tests.tiny import tiny_model

KEY = "sk-secret-0123456789"
PROMPTS = [{"prompt": f"{a}+2?", "answer": str(a + 2)} for a in range(7)]


def trace(thought: str, answer: str) -> str:
    return f"<think>{thought}</think>\n<answer>{answer}</answer>"


# ---- what is kept ----

PROMPT = Problem.of("1,000 + 5 = ?", "1005")
SAID = [
    ("1000+5=1005", "1,005", True, "kept"),
    ("1000+5 =  1005\n", " 1005.0\n", True, "kept"),  # another spelling of the thought
    ("1000+5=1005 ", "1005", True, "duplicate"),
    ("1000+5=1006", "1006", True, "wrong_answer"),
    ("as ever", "1005 or 1006", True, "wrong_answer"),
    ("as ever", "1005", False, "unfinished"),
    ("", "1005", True, "incomplete"),
    ("5+1000=1005", "1005", True, "surplus"),
    ("5+1000=1005", "1005", True, "duplicate"),
]


def test_traces_are_kept_or_rejected_with_a_reason() -> None:
    sampled = RejectionSampling()
    said = [Completion(trace(thought, answer), ends) for thought, answer, ends, _ in SAID]
    said += [Completion("1005", True), Completion(said[0].text + " really", True)]
    sampled.add(PROMPT, said, max_kept=2)
    reasons = [reason for *_, reason in SAID if reason != "kept"] + ["incomplete"] * 2
    assert [row["reason"] for row in sampled.rejected] == reasons
    assert {row["prompt"] for row in sampled.rejected} == {PROMPT.prompt}
    contents = [row["conversations"][1]["content"] for row in sampled.kept]
    assert contents == [trace("1000+5=1005", "1005"), trace("1000+5 =  1005", "1005")]
    for row in sampled.kept:
        assert parse_reasoning(row)[0] == {"role": "user", "content": PROMPT.prompt}
    sampled.add(PROMPT, [Completion("no", True)], max_kept=2)
    assert sampled.metrics() == {
        "prompts": 2,
        "sampled": 12,
        "kept": 2,
        "kept_share": 2 / 12,
        "prompts_with_a_trace": 1,
        "distinct_traces": 1.5,
    }


# ---- the stage ----


class Stage:
    """Stage rejection_sampling in a folder of its own, with a tiny checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        directory = folder / "tokenizer"
        said = [trace("3+2=5", "5")] * 3 + ["user assistant 0123456789+?"]
        save_tokenizer(train_tokenizer(said, 280), directory)
        vocab_size = ChatTokenizer.load(directory).vocab_size
        model = tiny_model(0, vocab_size=vocab_size, max_positions=64)
        save_checkpoint(folder / "model", model, directory)

    def run(self, prompts: list[dict[str, Any]], **changes: Any) -> Any:
        values = {
            "init": "model",
            "num_prompts": 100,
            "num_samples": 3,
            "max_kept_per_prompt": 2,
            "temperature": 1.0,
            "top_p": 0.95,
            "max_new_tokens": 12,
            "batch_size": 6,
            "seed": 1,
            "dtype": "float32",
            "endpoint": None,
            "model": None,
            "instruction": "",
        }
        params = self.folder / "params.yaml"
        data = {"prompts": "prompts.jsonl"}
        params.write_text(json.dumps({"rejection_sampling": values | changes, "data": data}))
        lines = [json.dumps(row) + "\n" for row in prompts]
        (self.folder / "prompts.jsonl").write_text("".join(lines))
        return CliRunner().invoke(
            app,
            [
                *("--output", "data/rejection_sampling.jsonl", "--rejected", "data/rejected.jsonl"),
                *("--metrics", "metrics/rejection_sampling.json", "--params", "params.yaml"),
            ],
        )

    def results(self) -> tuple[bytes, bytes, bytes]:
        names = (
            "data/rejection_sampling.jsonl",
            "data/rejected.jsonl",
            "metrics/rejection_sampling.json",
        )
        first, second, third = ((self.folder / name).read_bytes() for name in names)
        return first, second, third

    def metrics(self) -> dict[str, float]:
        return json.loads((self.folder / "metrics/rejection_sampling.json").read_text())[
            "rejection_sampling"
        ]

    def rejected(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.results()[1].splitlines()]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.chdir(tmp_path)
    return Stage(tmp_path)


def test_a_checkpoint_thinks_the_same_every_time(stage: Stage) -> None:
    result = stage.run(PROMPTS)
    assert result.exit_code == 0, result.output
    first = stage.results()
    assert (stage.metrics()["prompts"], stage.metrics()["sampled"]) == (7, 21)
    assert [row["prompt"] for row in stage.rejected()] == [
        row["prompt"] for row in PROMPTS for _ in range(3)
    ]
    assert len({row["output"] for row in stage.rejected()}) > 10
    # A tiny untrained model keeps nothing, and that is said.
    assert stage.metrics()["kept"] == 0
    assert "no trace was kept" in result.stderr
    stage.run(PROMPTS)
    assert stage.results() == first
    stage.run(PROMPTS, batch_size=20)
    assert stage.results() == first
    stage.run(PROMPTS, num_prompts=2)
    assert stage.rejected() == [json.loads(line) for line in first[1].splitlines()[:6]]
    stage.run(PROMPTS[:1] * 2, seed=2)
    twice = [row["output"] for row in stage.rejected()]
    assert twice[:3] != twice[3:]
    assert twice[:3] != [json.loads(line)["output"] for line in first[1].splitlines()[:3]]


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.run(PROMPTS)
    expected = stage.results()
    for name in (
        "data/rejection_sampling.jsonl",
        "data/rejected.jsonl",
        "metrics/rejection_sampling.json",
    ):
        (stage.folder / name).unlink()
    generate = completions.generate
    batches: list[int] = []

    def killed_in_the_second(model: Any, prompts: Any, **options: Any) -> Any:
        batches.append(len(prompts))
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(model, prompts, **options)

    monkeypatch.setattr(completions, "generate", killed_in_the_second)
    result = stage.run(PROMPTS)
    assert result.exit_code == 128 + signal.SIGTERM
    assert "resume checkpoint saved after 4 of 7 prompts" in result.stderr
    assert not (stage.folder / "data/rejection_sampling.jsonl").exists()
    result = stage.run(PROMPTS)
    assert result.exit_code == 0
    assert "going on after 4 of 7 prompts" in result.stderr
    assert batches == [2, 2, 2, 1]
    assert stage.results() == expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([PROMPTS[0], {"prompt": "a"}], "prompts.jsonl:2: answer is missing"),
        ([PROMPTS[0], {"prompt": "1" * 70, "answer": "1"}], "prompts.jsonl:2: the prompt has"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(
    stage: Stage, prompts: list[dict[str, Any]], message: str
) -> None:
    result = stage.run(prompts)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"endpoint": "localhost:8000"},
            "rejection_sampling.endpoint is 'localhost:8000'; it must be like",
        ),
        ({"endpoint": "file:///etc/passwd"}, "it must be like http://"),
        ({"endpoint": "http://host:70000/v1", "model": "m"}, "whole number from 0 to 65535"),
        ({"endpoint": "http://me:key@host/v1", "model": "m"}, "set MINIMIND_API_KEY"),
        ({"endpoint": "http://host/v1"}, "rejection_sampling.model is None; it must name a model"),
        ({"temperature": 0}, "rejection_sampling.temperature is 0"),
    ],
)
def test_bad_parameters_are_an_error_of_one_line(
    stage: Stage, changes: dict[str, Any], message: str
) -> None:
    result = stage.run(PROMPTS, **changes)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


# ---- an endpoint ----


class Server(ThreadingHTTPServer):
    """Says `replies` to the requests in turn, the last of them for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[tuple[int, Any]] = []
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, body, dict(self.headers)))
            replies = self.server.replies
            status, reply = replies.pop(0) if len(replies) > 1 else replies[0]
        data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        if status == 302:
            self.send_header("Location", f"{self.server.url}/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("MINIMIND_API_KEY", f"{KEY}\n")
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def reply(text: str | None, finish_reason: str = "stop", **more: str) -> tuple[int, Any]:
    message = {"role": "assistant", "content": text, **more}
    return 200, {"choices": [{"message": message, "finish_reason": finish_reason}]}


def files_with(folder: Path, text: str) -> list[Path]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file for file in files if text.encode() in file.read_bytes()]


def test_an_endpoint_is_asked_as_openai_clients_ask(stage: Stage, server: Server) -> None:
    server.replies = [
        reply(trace("one and two", "2")),
        (429, {"error": "slow down"}),
        (503, "busy"),
        reply("<answer>2</answer>", reasoning_content="0+2=2"),
        reply("<think>0+2", "length"),
        reply(trace("1+2=3", "3")),
    ]
    changes = {"endpoint": f"{server.url}/", "model": "big", "instruction": "Think.", "seed": 3}
    result = stage.run(PROMPTS[:2], **changes, batch_size=1)
    assert result.exit_code == 0, result.output
    kept = [row.value for row in read_rows(Path("data/rejection_sampling.jsonl"), parse_reasoning)]
    assert [chat[0]["content"] for chat in kept] == ["0+2?", "0+2?", "1+2?"]
    assert kept[1][1]["content"] == trace("0+2=2", "2")
    assert [row["reason"] for row in stage.rejected()] == ["unfinished", "duplicate", "duplicate"]
    assert stage.metrics()["distinct_traces"] == 1.5
    assert len(server.requests) == 6 + 2  # two of them were asked again
    path, body, headers = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    seed = body.pop("seed")
    assert body == {
        "model": "big",
        "messages": [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": "0+2?"},
        ],
        "temperature": 1.0,
        "top_p": 0.95,
        "max_tokens": 12,
    }
    assert len({seed, *(body.get("seed") for _, body, _ in server.requests[1:])}) == 6
    assert not files_with(stage.folder, KEY)
    assert KEY not in result.output


def test_many_requests_at_a_time_keep_their_order(stage: Stage, server: Server) -> None:
    server.replies = [reply("no")]
    stage.run(PROMPTS, endpoint=server.url, model="m", batch_size=8)
    assert [row["prompt"] for row in stage.rejected()] == [
        row["prompt"] for row in PROMPTS for _ in range(3)
    ]
    assert all(len(body["messages"]) == 1 for _, body, _ in server.requests)


@pytest.mark.parametrize(
    ("answer", "message", "num_asked"),
    [
        ((401, f"bad key {KEY}"), "answered 401: bad key *** (the key is read from MINIMIND", 1),
        ((404, ""), "answered 404: Not Found.", 1),
        ((302, ""), "answered 302: Found.", 1),
        ((500, "broken\n\nserver"), "answered 500: broken server.", endpoint.ATTEMPTS),
        ((200, "<html>"), "answered what is no chat completion: <html>", 1),
        ((200, {"choices": []}), "answered what is no chat completion", 1),
        ((200, {"choices": [{"message": {"content": 3}}]}), "no chat completion", 1),
    ],
)
def test_what_a_server_says_amiss_is_one_line(
    stage: Stage, server: Server, answer: tuple[int, Any], message: str, num_asked: int
) -> None:
    server.replies = [reply(trace("0+2=2", "2")), answer]
    changes = {"endpoint": server.url, "model": "m", "batch_size": 1, "num_samples": 1}
    result = stage.run(PROMPTS, **changes)
    assert result.exit_code == 1
    assert f"rejection_sampling: {server.url}/chat/completions answered" in result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert KEY not in result.stderr
    assert len(server.requests) == 1 + num_asked
    # What was completed before is not asked for again.
    server.replies = [reply("no")]
    result = stage.run(PROMPTS, **changes)
    assert result.exit_code == 0
    assert "going on after 1 of 7 prompts" in result.stderr
    assert len(server.requests) == 1 + num_asked + 6
    assert stage.metrics()["kept"] == 1


def test_nobody_there_is_one_line(stage: Stage, server: Server) -> None:
    port = server.server_port
    server.server_close()
    result = stage.run(PROMPTS, endpoint=f"http://127.0.0.1:{port}", model="m", batch_size=1)
    assert result.exit_code == 1
    assert "chat/completions cannot be reached: " in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_key_that_is_none_is_not_shown(
    stage: Stage, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIMIND_API_KEY", "sk-first\nsk-second")
    result = stage.run(PROMPTS, endpoint=server.url, model="m")
    assert result.exit_code == 1
    assert "MINIMIND_API_KEY has characters that no key has" in result.stderr
    assert "sk-" not in result.stderr
    monkeypatch.delenv("MINIMIND_API_KEY")
    server.replies = [reply("no")]
    assert stage.run(PROMPTS, endpoint=server.url, model="m").exit_code == 0
    assert all("Authorization" not in headers for _, _, headers in server.requests)
