"""`minimind web` without a browser; tests/browser has the page."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.talk.about import about
from minimind.talk.conversation import Conversation, Settings
from minimind.talk.speaker import Speaker, open_speaker
from minimind.talk.web import messages, tokens_html
from tests.graph import ROOT
from tests.test_chat import checkpoint  # noqa: F401


@pytest.fixture(scope="module")
def speaker(checkpoint: Path) -> Speaker:  # noqa: F811
    return open_speaker(str(checkpoint))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_others_need_a_password(host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("minimind.cli.web.find_spec", lambda name: name)
    monkeypatch.chdir(tmp_path)
    complaints = []
    for password in ("", "secret"):
        monkeypatch.setenv("MINIMIND_PASSWORD", password)
        result = CliRunner().invoke(app, ["web", "--host", host])
        assert result.exit_code == 1
        complaints.append(result.stderr)
    assert "set MINIMIND_PASSWORD" in complaints[0]
    assert "models/ has no checkpoint" in complaints[1]


def test_without_gradio_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimind.cli.web.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["web"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "pip install 'minimind-dvc[web]'" in result.stderr


def test_thoughts_and_calls_are_folded_apart(speaker: Speaker) -> None:
    chat = Conversation(speaker, Settings())
    for question in ("1+1?", "7*8?"):
        list(chat.ask(question))
    shown = [(m["content"], m.get("metadata", {}).get("title", "")[:4]) for m in messages(chat)]
    assert ("1+1=2", "Thou") in shown
    assert ("2", "") in shown


def test_what_is_said_is_text_and_loads_nothing(speaker: Speaker) -> None:
    """Gradio's Chatbot takes its messages for HTML, even where it is told not to format them."""
    chat = Conversation(speaker, Settings())
    said = '<img src="http://elsewhere/x.png"> & 1 < 2'
    chat.history = [{"role": role, "content": said} for role in ("user", "assistant")]
    escaped = '&lt;img src="http://elsewhere/x.png"&gt; &amp; 1 &lt; 2'
    assert [message["content"] for message in messages(chat)] == [escaped] * 2


def test_tokens_are_text_whatever_they_say(speaker: Speaker) -> None:
    chat = Conversation(speaker, Settings())
    assert tokens_html(chat) == ""
    list(chat.ask("7*8?"))
    html = tokens_html(chat)
    assert "&lt;tool_call&gt;" in html
    assert "<tool_call>" not in html
    assert chat.reply is not None
    assert html.count('class="token"') == len(chat.reply.tokens)


def test_scores_and_ancestry_are_those_of_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = about("reason")
    assert found == about("models/reason")
    assert "| exact_l1 " in found
    stages = [line.split()[1] for line in found.rpartition("made by")[2].splitlines()[2:]]
    assert stages[0] == "reason"
    assert {"dpo", "sft", "pretrain"} < {*stages}
    assert "grpo" not in stages
    assert about("nix") == ""


@pytest.mark.parametrize("is_chinese", [False, True])
def test_titles_and_headings_are_of_one_language(
    is_chinese: bool, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    chat = Conversation(speaker, Settings())
    list(chat.ask("7*8?"))
    shown = messages(chat, is_chinese)
    titles = [said["metadata"]["title"] for said in shown if "metadata" in said]
    assert {*titles} == ({"调用工具", "工具结果"} if is_chinese else {"Call", "Result"})
    headings = about("reason", is_chinese)
    assert "·" not in headings
    assert ("made by" in headings, "来自" in headings) == (not is_chinese, is_chinese)
