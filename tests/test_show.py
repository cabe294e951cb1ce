"""Rows as tokens: what is trained on, and what the chat template adds."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from minimind.chat.tokenizer import ChatTokenizer
from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.cli.main import app
from minimind.cli.show import LEGEND, print_rows
from minimind.datasets.formats import parse_chat, read_rows_and_bad_rows

USER = {"role": "user", "content": "小 a\nb"}
THOUGHT = {"role": "assistant", "content": "<think>c</think>d", "loss": True}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one file of two rows, in which each character is a token."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(train_tokenizer(["x"], 267), Path("tokenizer"))
    rows = [{"messages": [USER, THOUGHT]}, {"conversations": []}, {"messages": [USER, THOUGHT]}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("params.yaml").write_text(
        "{data: {sft: rows.jsonl}, encode: {tokenizer: tokenizer, sft: {max_length: 512}}}"
    )
    Path("dvc.yaml").write_text("{stages: {encode: {foreach: {sft: {format: chat}}}}}")
    return tmp_path


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(app, ["show", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_rows_are_tokens_with_their_mask_and_the_templates_parts_apart(folder: Path) -> None:
    header, assistant = "│".join("user"), "│".join("assistant")
    expected = [
        "rows.jsonl:1 (openai): 34 tokens, 5 trained on",
        f"  <|im_start|>│{header}│⏎",
        "  小│ │a│⏎",
        "  b",
        "  <|im_end|>│⏎",
        f"  <|im_start|>│{assistant}│⏎",
        "+ <think>",
        "+ c",
        "+ </think>",
        "+ d",
        "+ <|im_end|>",
        "  ⏎",
        "left out: rows.jsonl:2: conversations has no assistant turn; there must be one to learn "
        "from",
        LEGEND,
    ]
    said = run("data.sft", "--rows", 2).splitlines()
    assert said[1:] == expected[1:]
    assert run("rows.jsonl", "--rows", 2, "--tokenizer", "tokenizer").splitlines() == said
    assert run("data.sft", "--first", 3).startswith("rows.jsonl:3 (openai)")


def test_what_is_longer_than_max_length_is_shown_as_it_is_trained_on(folder: Path) -> None:
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("512", "30"))
    assert "(openai): 30 tokens, " in run("data.sft", "--rows", 1)
    assert "(openai): 30 tokens, " not in run("rows.jsonl", "--rows", 1)


def test_pairs_texts_and_prompts_are_shown_too(folder: Path) -> None:
    for row, said in (
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "(preference, 2 of 2)"),
        ({"text": "<|im_end|>\x1b[2J"}, "+ <│|│i│m│_│e│n│d│|│>│'\\x1b'│[│2│J"),
        ({"prompt": "a", "answer": 5}, " tokens, 0 trained on"),
    ):
        Path("rows.jsonl").write_text(json.dumps(row))
        assert said in run("rows.jsonl")


def test_colours_are_for_terminals_that_want_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(read_rows_and_bad_rows(Path("rows.jsonl"), parse_chat))
    printed = {}
    for no_color in (False, True):
        console = Console(file=StringIO(), force_terminal=True, no_color=no_color, width=999)
        print_rows(console, rows, ChatTokenizer.load("tokenizer"), "chat", None)
        printed[no_color] = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[32md" in printed[False]  # trained on: green
    assert "\x1b[1;35m<think>" in printed[False]  # a tag: magenta
    assert "\x1b[32m" not in printed[True] and "+ " in printed[True]
