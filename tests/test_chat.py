"""`minimind chat`: what is streamed is what the model says, and bad input ends no session."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from typer.testing import CliRunner

from minimind.chat.template import THOUGHT_BEGUN
from minimind.chat.tokenizer import ChatTokenizer
from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.cli.chat import typed_lines
from minimind.cli.main import app
from minimind.datasets.encoded import EncodedDataset
from minimind.errors import UserError
from minimind.mini_world.tools import SPECS
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.model.reply import reply
from minimind.model.transformer import Transformer
from minimind.objectives.next_token import NextToken
from minimind.talk.conversation import Conversation, Settings
from minimind.talk.parts import Part, parts_of
from minimind.talk.session import Session
from minimind.talk.speaker import Speaker, open_speaker
from minimind.talk.stream import Stream, Token
from minimind.talk.web import messages
from minimind.training.fit import FitConfig, fit
from tests.graph import ROOT
from tests.project import dvc, git
from tests.test_generate import lively_model, logits_of, random_prompts
from tests.tiny import tiny_model

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "7*8"}}\n</tool_call>'
NO_THOUGHT = THOUGHT_BEGUN[False]
CHATS: list[list[dict[str, str]]] = [
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>1+1=2</think>\n<answer>2</answer>"},
    ],
    [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好😀！"}],
    [
        {"role": "user", "content": "7*8?"},
        {"role": "assistant", "content": CALL},
        {"role": "tool", "content": "56"},
        {"role": "assistant", "content": "It is 56."},
    ],
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows three chats by heart, and 128 positions."""
    folder = tmp_path_factory.mktemp("chat")
    texts = [turn["content"] for chat in CHATS for turn in chat]
    save_tokenizer(train_tokenizer([*texts * 2, "user", "assistant"], 330), folder / "tokenizer")
    tokenizer = ChatTokenizer.load(folder / "tokenizer")
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_positions=256)
    rows = EncodedDataset.from_rows(tokenizer.encode_chats(CHATS), tokenizer)
    fit(model, NextToken(), rows, FitConfig(epochs=150, lr=1e-2, batch_size=3, dtype="float32"))
    save_checkpoint(folder / "model", model, folder / "tokenizer")
    return folder / "model"


@pytest.fixture(scope="module")
def speaker(checkpoint: Path) -> Speaker:
    return open_speaker(str(checkpoint))


@pytest.fixture
def conversation(speaker: Speaker) -> Conversation:
    return Conversation(speaker, Settings())


def ask(conversation: Conversation, question: str) -> list[Part]:
    *_, said = conversation.ask(question)
    return said.parts


def streamed(model: Transformer, prompt: list[int], **options: Any) -> list[Token]:
    return list(Stream(model).tokens(prompt, max_new_tokens=8, end_ids=[], **options))


def test_a_stream_is_what_the_model_says_without_a_cache() -> None:
    model = lively_model()
    for prompt in random_prompts(6):
        tokens = streamed(model, prompt, num_alternatives=3)
        ids = [token.id for token in tokens]
        logprobs = logits_of(model, prompt + ids)[len(prompt) - 1 : -1].log_softmax(-1)
        assert ids == logprobs.argmax(-1).tolist()
        best = logprobs.topk(3)
        assert [[i for i, _ in token.alternatives] for token in tokens] == best.indices.tolist()
        found = torch.tensor([[p for _, p in token.alternatives] for token in tokens])
        torch.testing.assert_close(found, best.values, rtol=1e-4, atol=1e-4)
        assert all(token.logprob == token.alternatives[0][1] for token in tokens)


def test_of_a_text_that_goes_on_only_the_rest_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = lively_model(), Stream._read
    stream, num_read = Stream(model), 0

    def counting(self: Stream, ids: list[int]) -> torch.Tensor:
        nonlocal num_read
        num_read += len(ids) * (self is stream)
        return read(self, ids)

    monkeypatch.setattr(Stream, "_read", counting)
    monkeypatch.setattr("minimind.talk.stream.AT_A_TIME", 4)
    text = random_prompts(1)[0]
    for more in ([], [5, 6, 7, 8, 9, 10], [8]):
        text = text + more
        ids = [token.id for token in stream.tokens(text, max_new_tokens=8, end_ids=[])]
        assert ids == [token.id for token in streamed(model, text)]
        text = text + ids
    assert num_read == len(text) - 1  # the last token is read by nobody
    changed = [*text[:4], 77, *text[5:]]
    again = list(stream.tokens(changed, max_new_tokens=8, end_ids=[]))
    assert [token.id for token in again] == [token.id for token in streamed(model, changed)]


def test_noise_is_the_seeds_and_a_nucleus_of_one_token_is_greedy() -> None:
    model, prompt = lively_model(), random_prompts(1)[0]
    greedy, one, same, other, narrow = (
        [token.id for token in streamed(model, prompt, **options)]
        for options in (
            {},
            {"temperature": 1.0, "seed": 1},
            {"temperature": 1.0, "seed": 1},
            {"temperature": 1.0, "seed": 2},
            {"temperature": 1.0, "seed": 2, "top_p": 0.001},
        )
    )
    assert one == same != other
    assert narrow == greedy != one


def test_a_stopped_stream_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = lively_model(), random_prompts(1)[0]
    stream = Stream(model)
    logits = type(model).logits

    def stopping(*arguments: Any) -> torch.Tensor:
        raise KeyboardInterrupt  # keys and values are written by now

    monkeypatch.setattr(type(model), "logits", stopping)
    with pytest.raises(KeyboardInterrupt):
        next(stream.tokens(prompt, max_new_tokens=8, end_ids=[]))
    monkeypatch.setattr(type(model), "logits", logits)
    assert list(stream.tokens(prompt, max_new_tokens=8, end_ids=[])) == streamed(model, prompt)


@pytest.mark.parametrize(
    ("output", "parts"),
    [
        ("<think>a\nb</think>\n<answer>4</answer>", [("thought", "a\nb"), ("answer", "4")]),
        ("<think>\na\n</think>\n\nso 4", [("thought", "a"), ("answer", "so 4")]),
        ("a</think>4", [("thought", "a"), ("answer", "4")]),  # opened by the prompt
        (f"{NO_THOUGHT}4", [("answer", "4")]),
        ("<think>still", [("thought", "still")]),
        (f"wait\n{CALL}", [("answer", "wait"), ("call", CALL.split("\n")[1])]),
        ("", []),
    ],
)
def test_thought_answer_and_calls_are_told_apart(output: str, parts: list[Part]) -> None:
    assert parts_of(output) == parts


def test_a_conversation_is_what_reply_says(conversation: Conversation, checkpoint: Path) -> None:
    model, tokenizer = load_model(checkpoint), ChatTokenizer.load(checkpoint)
    for chat in CHATS[:2]:
        assert ask(conversation, chat[0]["content"])
        said = conversation.history[-1]["content"]
        assert said == reply(model, tokenizer, conversation.history[:-1])
    assert [turn["role"] for turn in conversation.history] == ["user", "assistant"] * 2


def test_text_grows_by_whole_characters(conversation: Conversation) -> None:
    texts = [said.messages[0]["content"] for said in conversation.ask("你好")]
    assert texts[-1] == "好😀！"
    assert all(texts[-1].startswith(text) for text in texts)
    assert len(texts) > len({*texts}), "a character of several tokens"


def test_calls_are_answered_and_told_to_the_model(conversation: Conversation) -> None:
    call = Part("call", CALL.split("\n")[1])
    assert ask(conversation, "7*8?") == [call, Part("result", "56"), Part("answer", "It is 56.")]
    assert conversation.history == CHATS[2]


def test_who_calls_for_ever_is_stopped(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind.talk.conversation.MOST_ROUNDS", 1)
    assert ask(conversation, "7*8?")[-1].kind == "result"
    assert conversation.reply is not None
    assert "1 rounds of calls" in conversation.reply.note


def test_without_room_nothing_changes(conversation: Conversation) -> None:
    ask(conversation, "1+1?")
    before = list(conversation.history)
    with pytest.raises(UserError, match="the model 256 positions"):
        ask(conversation, "x" * 10_000)
    assert conversation.history == before
    conversation.reset()
    assert ask(conversation, "1+1?") == [Part("thought", "1+1=2"), Part("answer", "2")]


def test_an_answer_that_fills_the_positions_says_so(conversation: Conversation) -> None:
    room = 256 - len(
        conversation.speaker.tokenizer.encode_prompt([{"role": "user", "content": ""}])
    )
    ask(conversation, "y" * (room - 1))
    assert conversation.reply is not None
    assert len(conversation.reply.tokens) == 1
    assert "positions are full" in conversation.reply.note
    conversation.settings.max_new_tokens = 3
    conversation.reset()
    ask(conversation, "1+1?")
    assert "cut off after 3 tokens" in conversation.reply.note


def test_an_answer_of_tags_alone_is_said_to_be_empty(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = conversation.speaker.tokenizer
    ids = [*tokenizer.encode_text("<think>\n</think>\n<answer></answer>"), tokenizer.end_id]
    tokens = [Token(id_, 0.0, ()) for id_ in ids]
    monkeypatch.setattr(conversation._stream, "tokens", lambda *_, **__: iter(tokens))
    assert ask(conversation, "1+1?") == []
    assert conversation.reply is not None
    assert conversation.reply.note == "an empty answer."
    assert [m["content"] for m in messages(conversation)] == ["1+1?", "—"]


def test_an_answer_without_a_thought_begins_with_an_empty_one(conversation: Conversation) -> None:
    conversation.settings.think = False
    ask(conversation, "1+1?")
    said = conversation.history[-1]["content"]
    assert said.startswith(NO_THOUGHT)
    assert "<think>" not in said.removeprefix(NO_THOUGHT)


def test_tools_are_described_in_the_system_prompt(conversation: Conversation) -> None:
    question, speaker = {"role": "user", "content": "7*8?"}, conversation.speaker
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        content = "".join(message["content"] for message in system)
        told = {"role": "system", "content": content, "tools": [*SPECS.values()]}
        expected = speaker.tokenizer.encode_prompt([told, question])
        assert speaker.prompt([*system, question], [*SPECS.values()], True)[0] == expected
    conversation.settings.tools = True
    with pytest.raises(UserError, match="positions"):  # their descriptions alone fill this model
        ask(conversation, "7*8?")


@pytest.fixture
def session(speaker: Speaker) -> Session:
    return Session(Console(file=StringIO(), width=100), [speaker], Settings(), open_speaker)


def printed(session: Session, *lines: str) -> str:
    for line in lines:
        session.handle(line)
    file = session.console.file
    assert isinstance(file, StringIO)
    return file.getvalue()


def test_commands(session: Session, tmp_path: Path, checkpoint: Path) -> None:
    shown = printed(session, "1+1?")
    assert "▾ 1+1=2\n2\n" in shown
    assert "tokens/s, first after" in shown
    assert "▸ 5 characters thought" in printed(session, "/fold")
    assert "instead, %" in printed(session, "/tokens")
    session.handle(f"/compare {checkpoint}")
    first, second = session.conversations
    assert first.history == second.history
    session.handle("/system Be brief.")
    session.handle("你好")
    assert first.messages[0] == {"role": "system", "content": "Be brief."}
    before = first.history[-1]["content"]
    assert printed(session, "/temperature 5", "/temperature").endswith("\n5\n")
    assert printed(session, "/seed 3", "/seed").endswith("\n3\n")
    printed(session, "/regenerate")
    assert first.history[-1]["content"] != before
    assert first.history[:-1] == second.history[:-1]
    session.handle(f"/save {tmp_path / 'chats.jsonl'}")
    rows = [json.loads(row) for row in (tmp_path / "chats.jsonl").read_text("utf-8").splitlines()]
    assert [row["conversations"] for row in rows] == [first.messages, second.messages]
    again = Session(session.console, [first.speaker], Settings(), open_speaker)
    again.load(tmp_path / "chats.jsonl")
    assert again.conversations[0].messages == second.messages
    session.handle("/reset")
    assert first.history == second.history == []
    for name in ("/help", "/fold"):
        session.handle(name)
    with pytest.raises(EOFError):
        session.handle("/exit")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/nix", "/nix is no command; there are /system"),
        ("/__init__", "is no command"),
        ("/temperature hot", "'hot' is no number that fits here; say one, as /temperature 0.7"),
        ("/temperature nan", "it must be 0, or from 0.01 to 10"),
        ("/seed -1", "whole number from 0"),
        ("/seed 1.5", "'1.5' is no number"),
        ("/save", "name a file"),
        ("/save /", "cannot be written"),
        ("/compare", "name a checkpoint"),
        ("/compare nix", "there is no checkpoint nix"),
        ("/compare .", "not a checkpoint"),
        ("x" * 10_000, "tokens, the model 256 positions"),
    ],
)
def test_what_cannot_be_done_leaves_the_session(
    session: Session, line: str, complaint: str
) -> None:
    session.handle("你好")
    before = session.rows()
    with pytest.raises(UserError) as raised:
        session.handle(line)
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)
    assert session.rows() == before
    assert "好😀！" in printed(session, "你好")


def test_nothing_was_said_yet(session: Session, tmp_path: Path) -> None:
    for line in ("/regenerate", f"/save {tmp_path / 'x'}"):
        with pytest.raises(UserError, match="yet"):
            session.handle(line)
    assert printed(session, "", "   ", "/tokens", "/fold") == ""
    assert session.keep() is None


def test_ctrl_c_ends_a_reply_and_no_more(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = Stream._read, 0

    def interrupted(self: Stream, ids: list[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return read(self, ids)

    monkeypatch.setattr(Stream, "_read", interrupted)
    assert "stopped." in printed(session, "1+1?")
    (chat,) = session.conversations
    assert chat.history[-1]["role"] == "assistant"
    assert "好😀！" in printed(session, "/reset", "你好")


def test_side_by_side_one_may_fail(session: Session, speaker: Speaker) -> None:
    session.conversations.append(Conversation(speaker, session.settings))
    session.conversations[0].history = [{"role": "user", "content": "x" * 300}]
    shown = printed(session, "你好")
    assert "好😀！" in shown
    assert "positions" in shown


def test_what_a_model_says_does_not_steer_the_terminal(session: Session) -> None:
    (chat,) = session.conversations
    session.handle("1+1?")
    assert chat.reply is not None
    chat.reply.messages[0]["content"] = "\x1b[2J\x07gone"
    assert "\x1b" not in printed(session, "/fold")


def test_lines_are_edited_and_ctrl_c_clears_one() -> None:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("小明有3盒\x7f个苹果\r/he\x03/seed 3\r\x04")
        assert list(typed_lines()) == ["小明有3个苹果", "/seed 3"]


def run(*arguments: str, given: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["chat", *arguments], input=given)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_for_scripts_the_answer_alone_is_printed(checkpoint: Path) -> None:
    assert run(str(checkpoint), "--ask", "1+1?") == (0, "2\n", "")
    code, printed, _ = run(str(checkpoint), str(checkpoint), "--ask", "你好", "--ask", "1+1?")
    assert code == 0
    assert [line.rpartition(": ")[2] for line in printed.splitlines()][:2] == ["好😀！"] * 2
    _, printed, _ = run(str(checkpoint), "--ask", "1+1?", "--json")
    found = json.loads(printed)
    assert (found["thought"], found["answer"], found["note"]) == ("1+1=2", "2", "")


def test_without_a_terminal_lines_are_read(checkpoint: Path) -> None:
    code, printed, complaint = run(str(checkpoint), given="你好\n/nix\n/reset\n1+1?\n/exit\n你好\n")
    assert (code, complaint) == (1, "")  # a script is told, and answered what can be
    assert printed.count("好😀！") == 1
    assert "/nix is no command" in printed
    assert run(str(checkpoint), given="你好\n/exit\n")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nix"], "there is no checkpoint nix; here are: none"),
        ([], "models/ has no checkpoint"),
        (["file"], "file is a file; a checkpoint is a folder"),
        (["adapter"], "adapter is an adapter; talk to what it is merged in"),
        (["reward"], "reward is a reward model"),
        (["a@nix"], "name a run of the graph"),
        (["CHECKPOINT", "--temperature", "nan"], "the temperature is nan"),
        (["CHECKPOINT", "--load", "nix"], "nix is missing"),
        (["CHECKPOINT", "--load", "file"], "file is not as /save writes it"),
        (["CHECKPOINT", "--ask", "x" * 10_000], "the model 256 positions"),
        (["CHECKPOINT", "--ask", "  "], "--ask of blanks alone asks nothing"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("{}\n")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    Path("reward").mkdir()
    Path("reward/config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    code, _, printed = run(*[str(checkpoint) if a == "CHECKPOINT" else a for a in arguments])
    assert code == 1
    assert complaint in printed
    assert printed.count("\n") == 1


OWN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture
def foreign(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "foreign")
    (tmp_path / "foreign/chat_template.jinja").write_text(OWN)
    return tmp_path / "foreign"


def test_a_model_is_asked_by_its_own_template(foreign: Path, checkpoint: Path) -> None:
    speaker = open_speaker(str(foreign))
    ids, _ = speaker.prompt([{"role": "user", "content": "你好"}], (), True)
    assert speaker.tokenizer.decode(ids) == "[user]你好[assistant]"
    assert not speaker.can_skip_thought
    code, _, printed = run(str(foreign), "--no-think", "--ask", "1+1?")
    assert code == 1
    assert "no enable_thinking" in printed
    # One that says the same in other words is ours.
    ours = (checkpoint / "chat_template.jinja").read_text("utf-8")
    (foreign / "chat_template.jinja").write_text(f"{{# ours #}}{ours}", encoding="utf-8")
    assert open_speaker(str(foreign)).template is None


def test_a_broken_template_is_one_line(foreign: Path) -> None:
    for text in ("{% for %}", "{{ raise_exception('never') }}"):
        (foreign / "chat_template.jinja").write_text(text)
        code, _, printed = run(str(foreign), "--ask", "1+1?")
        assert code == 1
        assert "its own chat template cannot take this conversation" in printed
        assert printed.count("\n") == 1


GRAPH = """
stages:
  train:
    cmd: mkdir -p models && cp -r ${from} models/a
    params: [from]
    outs: [models/a]
"""


def test_checkpoints_of_revisions_and_experiments(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the workspace has none, as when a stage makes it anew."""
    (tmp_path / "dvc.yaml").write_text(GRAPH)
    (tmp_path / "params.yaml").write_text(f"from: {checkpoint}\n")
    git(tmp_path, "init", "-q", "-b", "main")
    dvc(tmp_path, "init", "-q")
    dvc(tmp_path, "repro", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "a")
    shutil.rmtree(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    for said in ("a@main", "main:models/a", "a@HEAD"):
        assert run(said, "--ask", "1+1?") == (0, "2\n", "")
    code, _, printed = run("b@main", "--ask", "1+1?")
    assert code == 1
    assert "main has no 'b'; it has: models/a." in printed
    assert "'a@HEAD' is the last commit's" in run("a")[2].replace("`", "'")
    shutil.rmtree(tmp_path / ".dvc/cache")
    code, _, printed = run("a@main", "--ask", "1+1?")
    assert code == 1
    assert "models/a of main is in neither cache nor remote" in printed
    assert printed.count("\n") == 1


def read_until(terminal: int, text: str) -> str:
    seen = b""
    while text.encode() not in seen:
        seen += os.read(terminal, 1000)
    return seen.decode("utf-8", "replace")


@pytest.mark.parametrize("hung_up", [True, False])
def test_what_was_said_outlives_a_closed_terminal(
    checkpoint: Path, tmp_path: Path, hung_up: bool
) -> None:
    terminal, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-m", "minimind.cli.main", "chat", str(checkpoint)]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    os.close(theirs)
    read_until(terminal, ">")
    os.write(terminal, "你好\r".encode())
    read_until(terminal, "tokens/s")
    if hung_up:
        os.close(terminal)  # no signal: it is not the terminal that controls the process
    else:
        process.send_signal(signal.SIGHUP)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == (1 if hung_up else 128 + signal.SIGHUP)
    assert complaint.count("\n") == 1
    (kept,) = (tmp_path / "runs/chats").iterdir()
    assert f"--load runs/chats/{kept.name}" in complaint
    assert json.loads(kept.read_text("utf-8"))["conversations"] == CHATS[1]


def test_a_signal_while_the_prompt_is_being_made_is_one_line(tmp_path: Path) -> None:
    """An event loop that is freed before it is whole complains with a traceback."""
    script = """
import asyncio, signal
from types import SimpleNamespace
from rich.console import Console
from minimind.cli.chat import converse

def lines():
    loop = asyncio.SelectorEventLoop.__new__(asyncio.SelectorEventLoop)
    signal.raise_signal(signal.SIGHUP)
    yield ""

try:
    converse(SimpleNamespace(console=Console(), conversations=[], keep=lambda: "a.jsonl"), lines())
except Exception as error:
    raise SystemExit(error.exit_code)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 128 + signal.SIGHUP
    assert done.stderr == "chat: closed; `--load a.jsonl` goes on with it.\n"
