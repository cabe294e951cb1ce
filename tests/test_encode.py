import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from typer.testing import CliRunner

from minimind.chat.template import Message
from minimind.chat.tokenizer import ChatTokenizer, EncodedRow
from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.datasets import encode
from minimind.datasets.augment import Augmentation, AugmentConfig
from minimind.datasets.batches import split_samples
from minimind.datasets.encode import Tally, encode_dataset, split_document
from minimind.datasets.encoded import EncodedDataset
from minimind.errors import UserError
from minimind.mini_world.rows import MiniWorldConfig, write_mini_world
from stages.encode import app
from tests.shipped import shipped_params

NO_COPIES = {"augment_copies": 0, "seed": 1, "word_dropout": 0.1, "synonym_share": 0.5}
SYSTEM: Message = {"role": "system", "content": "你是 helper"}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


CHATS = [
    [user("2+3?"), assistant("5")],
    [SYSTEM, user("小明有几个苹果？"), assistant("有15个。"), user("😀?"), assistant(" yes")],
    [user("7-2?"), assistant("<think>7-2=5</think>\n<answer>5</answer>")],
]
TEXTS = ["Tom has 12 apples.\n", "小明有12个苹果，又买了3个。" * 20, "3"]
PAIR_OF_LISTS = {
    "chosen": [SYSTEM, *CHATS[2], user("a"), assistant("good"), user("b"), assistant("fine")],
    "rejected": [SYSTEM, *CHATS[2], user("a"), assistant("bad")],
}
PAIRS = [{"prompt": "2+3?", "chosen": "It is 5.", "rejected": "5"}, PAIR_OF_LISTS]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([*TEXTS, "user assistant system tool"], 280), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> ChatTokenizer:
    return ChatTokenizer.load(directory)


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def chat_rows(chats: Sequence[Sequence[Message]]) -> list[Any]:
    return [{"conversations": list(chat)} for chat in chats]


def rows_of(dataset: EncodedDataset) -> list[tuple[list[int], list[int]]]:
    rows = [dataset.row(index) for index in range(dataset.rows)]
    return [(ids.tolist(), loss_mask.tolist()) for ids, loss_mask in rows]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Stage:
    """The encode stage on a folder of its own."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.output = folder / "encoded" / "sft"
        self.metrics_file = folder / "metrics" / "sft.json"

    def run(
        self,
        rows: Sequence[Any] | None,  # None: what is there
        data_format: str,
        max_length: int = 512,
        on_bad_row: str = "error",
        against: Path | None = None,
    ) -> Any:
        source = self.folder / "sft.jsonl"
        if rows is not None:
            write_rows(source, rows)
        nothing = write_rows(self.folder / "nothing.jsonl", [{"text": "what no row asks"}])
        evaluation = dict.fromkeys(["problems", "text"], str(against or nothing))
        params: dict[str, Any] = {
            "data": {"on_bad_row": on_bad_row, "sft": str(source), "synonyms": "not read"},
            "encode": {"tokenizer": str(self.tokenizer), "sft": {"max_length": max_length}},
        }
        params["data"] |= evaluation
        if data_format in ("chat", "reason"):
            params["encode"]["sft"] |= NO_COPIES
        (self.folder / "params.yaml").write_text(json.dumps(params))
        return CliRunner().invoke(
            app,
            [
                *("--format", data_format, "--name", "sft", "--output", str(self.output)),
                *("--metrics", str(self.metrics_file)),
                *("--params", str(self.folder / "params.yaml")),
            ],
        )

    def encode(self, *arguments: Any) -> tuple[EncodedDataset, dict[str, float]]:
        result = self.run(*arguments)
        assert result.exit_code == 0, result.output
        metrics = json.loads(self.metrics_file.read_text())["encode"]["sft"]
        return EncodedDataset.open(self.output), metrics


@pytest.fixture
def stage(tmp_path: Path, directory: Path) -> Stage:
    return Stage(tmp_path, directory)


def test_chats(stage: Stage, tokenizer: ChatTokenizer) -> None:
    dataset, metrics = stage.encode(chat_rows(CHATS), "chat")
    expected = [tokenizer.encode_chat(chat) for chat in CHATS]
    assert rows_of(dataset) == expected
    assert (dataset.format, dataset.num_samples, dataset.max_length) == ("chat", 3, 512)
    assert dataset.tokens.dtype == np.uint16
    trained = [sum(c > 0 for c in loss_mask) for _, loss_mask in expected]
    assert np.diff(dataset.trained_offsets).tolist() == trained
    num_tokens = sum(len(ids) for ids, _ in expected)
    assert metrics == {
        "rows": 3,
        "samples": 3,
        "tokens": num_tokens,
        "truncated_rows": 0,
        "skipped_rows": 0,
        "dropped_rows": 0,
        "duplicate_rows": 0,
        "eval_overlap_rows": 0,
        "lossy_rows": 0,
        "trained_share": float(f"{sum(trained) / num_tokens:.6g}"),
        "formats": {"minimind": 3},
    }


def test_what_became_of_the_rows_is_said_and_stands_in_the_metrics(
    stage: Stage, tokenizer: ChatTokenizer
) -> None:
    against = write_rows(stage.folder / "problems.jsonl", [{"prompt": "2+3?", "answer": "5"}])
    alpaca = {"instruction": "2+3?", "output": "5"}
    rows = [alpaca, *chat_rows(CHATS[1:2]), {"messages": []}, {"text": "a"}, "{", alpaca]
    max_length = len(tokenizer.encode_chat(CHATS[1])[0]) - 1
    result = stage.run([*rows, {"text": "b"}], "chat", max_length, "skip", against)
    file = stage.folder / "sft.jsonl"
    assert "encode: 7 rows (2 alpaca, 1 minimind), 3 samples, " in result.stderr
    why = f"encode: why: 2 schema (first {file}:4: conversations or messages or "
    assert why in result.stderr
    assert f"1 order (first {file}:3: messages has no assistant turn; " in result.stderr
    assert "encode: cut off the end of 1 rows longer than max_length" in result.stderr
    same, asks = f"{file}:6, the same as {file}:1", f"{file}:1, asks what {against}:1 asks"
    assert f"encode: 1 rows are the same as one before: first {same}" in result.stderr
    assert f"encode: 2 rows ask what evaluation data asks: first {asks}" in result.stderr
    metrics = json.loads(stage.metrics_file.read_text())["encode"]["sft"]
    assert metrics["formats"] == {"alpaca": 2, "minimind": 1}
    assert metrics["left_out"] == {"order": 1, "schema": 2, "json": 1}
    assert metrics["first_left_out"]["json"].startswith(f"{file}:5: broken JSON")


def test_thoughts_calls_and_tools_are_trained_on_and_their_results_are_not(
    stage: Stage, tokenizer: ChatTokenizer
) -> None:
    tools = json.dumps([{"type": "function", "function": {"name": "add"}}])
    spoken = assistant("") | {"tool_calls": '[{"name": "add", "arguments": {"a": 2}}]'}
    last = assistant("It is 5.") | {"reasoning_content": "so"}
    system, result = {"role": "system", "content": "", "tools": tools}, {"role": "tool"}
    chat = [system, user("2+3?"), spoken, result | {"content": "5"}, last]
    dataset, _ = stage.encode(chat_rows([chat]), "chat")
    ((ids, loss_mask),) = rows_of(dataset)
    trained = tokenizer.decode(id for id, c in zip(ids, loss_mask, strict=True) if c)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    assert trained == f"{call}<think>\nso\n</think>\n\nIt is 5."
    assert '<tools>\n{"type": "function", "function": {"name": "add"}}\n' in tokenizer.decode(ids)
    assert "<tool_response>\n5\n</tool_response>" in tokenizer.decode(ids)


@pytest.mark.parametrize("switch", [{"loss": False}, {"weight": 0}, {"train": False}])
def test_a_turn_whose_loss_is_off_is_context(
    stage: Stage, tokenizer: ChatTokenizer, switch: dict[str, Any]
) -> None:
    chat = [user("a"), assistant("b") | switch, user("c"), assistant("d") | {"weight": 1}]
    dataset, _ = stage.encode(chat_rows([chat]), "chat")
    ((ids, loss_mask),) = rows_of(dataset)
    assert ids == tokenizer.encode_chat(chat)[0]
    assert tokenizer.decode(id for id, c in zip(ids, loss_mask, strict=True) if c) == "d"


def test_a_mixture_says_what_it_has_of_each_part(stage: Stage) -> None:
    (stage.folder / "sft.jsonl").mkdir()
    folder = stage.folder / "sft.jsonl"
    write_rows(folder / "a.jsonl", [{"instruction": f"{n}?", "output": "a"} for n in range(9)])
    write_rows(folder / "b.jsonl", chat_rows(CHATS))
    parts = [{"path": "a.jsonl", "share": 0.5}, {"path": "b.jsonl", "share": 0.5}]
    (folder / "mix.yaml").write_text(json.dumps({"parts": parts}))
    result = stage.run(None, "chat")
    assert result.exit_code == 0, result.output
    assert "encode: a.jsonl: 3 of its 9 rows are in the mixture\n" in result.stderr
    metrics = json.loads(stage.metrics_file.read_text())["encode"]["sft"]
    assert (metrics["rows"], metrics["parts"]) == (6, {"a.jsonl": 3, "b.jsonl": 3})
    assert metrics["formats"] == {"alpaca": 3, "minimind": 3}


def test_doubtful_rows_are_counted_and_kept(stage: Stage, tokenizer: ChatTokenizer) -> None:
    problems = [{"prompt": "7-2?", "answer": "5"}, {"text": "有 15\n个"}, {"prompt": "8?"}]
    against = write_rows(stage.folder / "problems.jsonl", problems)
    chats = [*CHATS, CHATS[0], [user("8 ?"), assistant("8")], [user(" 7-2?\n"), assistant("5")]]
    dataset, metrics = stage.encode(chat_rows(chats), "chat", 512, "error", against)
    assert rows_of(dataset) == [tokenizer.encode_chat(chat) for chat in chats]
    assert (metrics["duplicate_rows"], metrics["eval_overlap_rows"]) == (1, 2)
    texts = [{"text": text} for text in ("有 15 个", "有15个", "7-2=5", "7-2=5")]
    _, metrics = stage.encode(texts, "text", 512, "error", against)
    assert (metrics["duplicate_rows"], metrics["eval_overlap_rows"]) == (1, 1)


def test_the_built_in_data_overlaps_in_nothing(stage: Stage, directory: Path) -> None:
    params = shipped_params()["mini_world"]
    sizes = {"num_tokenizer": 10, "num_pretrain": 1000, "num_sft": 600, "num_dpo": 400}
    sizes |= {"num_reason": 600, "num_distill": 400, "num_lora": 400, "num_prompts": 10}
    sizes |= {"num_eval_per_level": [200] * 4, "num_eval_text": 50}
    sizes |= {"num_eval_equation": 200, "num_eval_extraction": 200}
    world = stage.folder / "mini_world"
    write_mini_world(world, MiniWorldConfig(**params | sizes | {"seed": 1}))
    formats: dict[str, encode.Format] = {
        "pretrain": "text",
        "sft": "chat",
        "dpo": "preference",
        "reason": "reason",
        "lora": "chat",
    }
    for name, data_format in formats.items():
        source, output = world / f"{name}.jsonl", stage.folder / name
        counts = encode_dataset(
            source,
            output,
            ChatTokenizer.load(directory),
            data_format,
            1024,  # this tokenizer knows bytes and little else
            "error",
            evaluation=[world / "eval.jsonl", world / "eval_text.jsonl"],
        )
        assert counts.samples == counts.rows == sizes[f"num_{name}"]
        assert (counts.eval_overlap_rows, counts.lossy_rows) == (0, 0)


def test_characters_that_a_tokenizer_loses_are_counted(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    foreign = tokenizers.Tokenizer.from_str(tokenizer._tokenizer.to_str())
    foreign.normalizer = tokenizers.normalizers.NFKC()
    texts = ["2 apples", "２ apples", "caf\u00e9", "cafe\u0301", "２"]
    source = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    for kind, lossy_rows in ((tokenizer, 0), (ChatTokenizer(foreign), 3)):
        counts = encode_dataset(source, tmp_path / "encoded", kind, "text", 64, "error")
        assert counts.lossy_rows == lossy_rows


def test_documents_are_split_and_every_token_is_predicted_once(
    stage: Stage, tokenizer: ChatTokenizer
) -> None:
    dataset, metrics = stage.encode([{"text": text} for text in TEXTS], "text", 20)
    rows = rows_of(dataset)
    assert metrics["rows"] == 3 < metrics["samples"] == len(rows)
    assert metrics["truncated_rows"] == 0
    assert all(len(ids) <= 20 for ids, _ in rows)
    assert all(loss_mask == [0] + [1] * (len(ids) - 1) for ids, loss_mask in rows)
    predicted = [token for ids, _ in rows for token in ids[1:]]
    assert predicted == [t for text in TEXTS for t in tokenizer.encode_document(text)[0][1:]]


def test_samples_are_known_by_their_source_row(stage: Stage, tokenizer: ChatTokenizer) -> None:
    rows = [{"text": text} for text in TEXTS]
    dataset, metrics = stage.encode([rows[0], "{", *rows[1:]], "text", 20, "skip")
    assert dataset.num_sources == len(TEXTS) < metrics["samples"] == dataset.num_samples
    for text, first, end in zip(TEXTS, dataset.sources[:-1], dataset.sources[1:], strict=True):
        predicted = [token for index in range(first, end) for token in dataset.row(index)[0][1:]]
        assert predicted == tokenizer.encode_document(text)[0][1:]
    dataset, _ = stage.encode(PAIRS, "preference")
    assert dataset.sources.tolist() == [0, 1, 2]


@pytest.mark.parametrize("data_format", ["text", "chat", "reason", "preference"])
def test_nothing_of_a_row_is_both_trained_on_and_validated_on(
    tmp_path: Path, tokenizer: ChatTokenizer, data_format: encode.Format
) -> None:
    """Pieces of a text, variations of a chat and sides of a pair stay together."""
    marks = [f"the number ({n})" for n in range(30)]
    answer = assistant("<think>a</think><answer>b</answer>")
    rows: list[Any] = {
        "text": [{"text": mark * 9} for mark in marks],
        "preference": [{"prompt": mark, "chosen": "a", "rejected": "b"} for mark in marks],
    }.get(data_format, chat_rows([[user(mark), answer] for mark in marks]))
    source = write_rows(tmp_path / "rows.jsonl", rows)
    varied = Augmentation(AugmentConfig(**NO_COPIES | {"augment_copies": 2}), [["the", "this"]])
    augmentation = varied if data_format in ("chat", "reason") else None
    length, output = 30 if data_format == "text" else 200, tmp_path / "out"
    encode_dataset(source, output, tokenizer, data_format, length, "error", augmentation)
    dataset = EncodedDataset.open(output)
    found = []
    for samples in split_samples(dataset.sources, 0.3, 1, dataset.copies):
        numbers = (samples[:, None] * dataset.rows_per_sample + range(dataset.rows_per_sample)).flat
        text = "".join(tokenizer.decode(dataset.row(index)[0].tolist()) for index in numbers)
        found.append(set(re.findall(r"\((\d+)\)", text)))
    train, held_out = found
    assert (len(train), len(held_out)) == (21, 9)
    assert not train & held_out


@pytest.mark.parametrize("num_tokens", range(2, 60))
def test_split_pieces_overlap_by_their_context(num_tokens: int) -> None:
    ids = list(range(num_tokens))
    pieces = split_document(EncodedRow(ids, b"\0" + b"\1" * (num_tokens - 1)), 9)
    assert pieces[0].ids[0] == 0
    assert [token for piece in pieces for token in piece.ids[1:]] == ids[1:]
    lengths = [len(piece.ids) for piece in pieces]
    assert max(lengths) <= 9
    assert max(lengths) - min(lengths) <= 1


def test_long_chats_are_cut_at_their_end(stage: Stage, tokenizer: ChatTokenizer) -> None:
    whole = [tokenizer.encode_chat(chat) for chat in CHATS]
    max_length = len(whole[1][0]) - 5
    dataset, metrics = stage.encode(chat_rows(CHATS), "chat", max_length)
    assert rows_of(dataset) == [(ids[:max_length], c[:max_length]) for ids, c in whole]
    assert metrics["truncated_rows"] == 1


def test_a_thought_whose_answer_is_cut_off_is_dropped_counted_and_said(
    stage: Stage, tokenizer: ChatTokenizer
) -> None:
    long = [user("2+3?"), assistant(f"<think>{'so ' * 60}</think>\n<answer>5</answer>")]
    whole = tokenizer.encode_chat(long)
    for max_length, kept in ((len(whole[0]), 2), (len(whole[0]) - 1, 1)):
        dataset, metrics = stage.encode(chat_rows([long, CHATS[2]]), "reason", max_length)
        assert rows_of(dataset) == [whole, tokenizer.encode_chat(CHATS[2])][-kept:]
        assert (metrics["rows"], metrics["samples"]) == (2, kept)
        assert (metrics["dropped_rows"], metrics["skipped_rows"]) == (2 - kept, 0)
        assert metrics["truncated_rows"] == 0
    result = stage.run(chat_rows([long, CHATS[2]]), "reason", max_length)
    assert "encode: dropped 1 rows whose answer" in result.stderr
    (listed,) = map(json.loads, (stage.output / "skipped.jsonl").read_text().splitlines())
    assert (listed["line"], listed["fault"]) == (1, "length")
    assert f"within {max_length} tokens its answer is cut off" in listed["reason"]
    result = stage.run(chat_rows([long]), "reason", max_length)
    assert result.exit_code == 1
    assert f"none of its 1 rows can be used: 1 length (first {stage.folder}/" in result.stderr


def test_a_pair_that_is_equal_after_cutting_is_dropped(
    stage: Stage, tokenizer: ChatTokenizer
) -> None:
    equal = {"prompt": "2+3?", "chosen": "so " * 60 + "5", "rejected": "so " * 60 + "6"}
    dataset, metrics = stage.encode([equal, PAIRS[0]], "preference", 60)
    assert (dataset.num_samples, metrics["dropped_rows"]) == (1, 1)
    assert "5" in tokenizer.decode(rows_of(dataset)[0][0])
    dataset, metrics = stage.encode([equal, PAIRS[0]], "preference", 512)
    assert (dataset.num_samples, metrics["dropped_rows"]) == (2, 0)


def test_reasoning_has_its_tags_in_class_2(stage: Stage, tokenizer: ChatTokenizer) -> None:
    dataset, _ = stage.encode(chat_rows(CHATS[2:]), "reason")
    tags = dataset.tokens[dataset.loss_mask == 2].tolist()
    assert tokenizer.decode(tags) == "<think></think><answer></answer>"
    assert dataset.format == "chat"
    result = stage.run(chat_rows(CHATS), "reason")
    assert result.exit_code == 1
    assert "sft.jsonl:1: turn 2 has the tags none" in result.stderr


def test_preferences_compare_what_follows_the_shared_beginning(
    stage: Stage, tokenizer: ChatTokenizer
) -> None:
    dataset, metrics = stage.encode(PAIRS, "preference")
    assert (dataset.format, dataset.rows_per_sample) == ("preference", 2)
    assert (dataset.rows, dataset.num_samples, metrics["samples"]) == (4, 2, 2)
    compared = [
        tokenizer.decode(ids[i] for i, c in enumerate(loss_mask) if c)
        for ids, loss_mask in rows_of(dataset)
    ]
    # The assistant turn of the prompt is not compared, those after it are, all of them.
    assert compared == ["It is 5.", "5", "goodfine", "bad"]
    prompt = tokenizer.encode_prompt(PAIR_OF_LISTS["chosen"][:4])
    for ids, _ in rows_of(dataset)[2:]:
        assert ids[: len(prompt)] == prompt


def test_bad_rows_stop_the_stage_and_leave_nothing(stage: Stage) -> None:
    rows = [*chat_rows(CHATS), {"conversations": [user("a")]}]
    result = stage.run(rows, "chat")
    assert result.exit_code == 1
    assert result.stderr == (
        f"encode: {stage.folder / 'sft.jsonl'}:4: conversations has no assistant turn; there must "
        "be one to learn from (data.on_bad_row: skip leaves such rows out).\n"
    )
    assert list(stage.output.parent.iterdir()) == []
    assert not stage.metrics_file.exists()


def test_skipped_rows_are_counted_and_listed(stage: Stage, tokenizer: ChatTokenizer) -> None:
    too_long = [user("1" * 60), assistant("5")]
    rows = ["{", *chat_rows([CHATS[0], too_long]), {"text": "x"}, *chat_rows([CHATS[2]])]
    dataset, metrics = stage.encode(rows, "chat", 60, "skip")
    assert rows_of(dataset) == [tokenizer.encode_chat(CHATS[i]) for i in (0, 2)]
    assert (metrics["rows"], metrics["samples"], metrics["skipped_rows"]) == (5, 2, 3)
    assert metrics["truncated_rows"] == 0
    lines = (stage.output / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    listed = [json.loads(line) for line in lines]
    assert [row["line"] for row in listed] == [1, 3, 4]
    assert [row["fault"] for row in listed] == ["json", "length", "schema"]
    assert {row["file"] for row in listed} == {str(stage.folder / "sft.jsonl")}
    assert listed[1]["reason"].startswith("nothing to train on is left of it within 60 tokens")


def test_a_pair_needs_something_to_compare_on_both_sides(stage: Stage) -> None:
    pair = {"chosen": [user("a"), user("1" * 60), assistant("b")]}
    pair["rejected"] = [user("a"), assistant("b")]
    result = stage.run([pair], "preference", 60)
    assert result.exit_code == 1
    assert "sft.jsonl:1: nothing to train on is left" in result.stderr


def test_no_usable_row_is_an_error_even_when_skipping(stage: Stage) -> None:
    result = stage.run(["[]", *["{"] * 5], "chat", 60, "skip")
    assert result.exit_code == 1
    place = stage.folder / "sft.jsonl"
    most = f"none of its 6 rows can be used: 5 json (first {place}:2: broken JSON at column 2: "
    assert most in result.stderr
    assert f"), 1 schema (first {place}:1: the row is a list; it must" in result.stderr
    assert not stage.output.exists()


def test_keys_that_are_not_read_are_named_once_and_change_nothing(
    stage: Stage, tokenizer: ChatTokenizer
) -> None:
    rows = chat_rows([CHATS[0], *CHATS])
    dataset, metrics = stage.encode(rows, "chat")
    masked = {**CHATS[0][1], "mask": 0}
    rows[2] = {"conversations": [CHATS[0][0], masked], "source": "web"}
    rows[3] |= {"id": 3, "source": "web"}
    result = stage.run(["{", rows[0], *rows[1:]], "chat", 512, "skip")
    file = stage.folder / "sft.jsonl"
    said = [line for line in result.stderr.splitlines() if "not read" in line]
    assert sorted(said, reverse=True) == [
        f"encode: warning: keys that are not read: 'conversations.mask' in 1 rows, first "
        f"{file}:4 (elsewhere whether it is trained on)",
        f"encode: keys that are not read: 'source' in 2 rows, first {file}:4; "
        f"'id' in 1 rows, first {file}:5",
    ]
    found = json.loads(stage.metrics_file.read_text())["encode"]["sft"]
    assert found.keys() - metrics.keys() == {"left_out", "first_left_out"}
    assert rows_of(EncodedDataset.open(stage.output))[-1] == rows_of(dataset)[-1]


def test_names_of_files_may_hold_any_bytes(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    """They are neither shown as two lines, nor a crash when they cannot be written as UTF-8."""
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / os.fsdecode(b"\xff\n.jsonl")
    write_rows(file, [{"text": "a"}, "{"])
    with pytest.raises(UserError) as raised:
        encode_dataset(tmp_path / "data", tmp_path / "out", tokenizer, "text", 64, "error")
    assert str(raised.value).isprintable()
    encode_dataset(tmp_path / "data", tmp_path / "out", tokenizer, "text", 64, "skip")
    (listed,) = map(json.loads, (tmp_path / "out/skipped.jsonl").read_text().splitlines())
    assert (listed["file"], listed["line"]) == (str(file), 2)


def test_a_failed_run_keeps_what_was_there(stage: Stage) -> None:
    stage.encode(chat_rows(CHATS), "chat")
    before = contents(stage.output)
    assert stage.run(["{"], "chat").exit_code == 1
    assert contents(stage.output) == before


@pytest.mark.parametrize("batch_rows", [1, 2, 1000])
def test_neither_batches_nor_shards_change_a_byte(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    rows = chat_rows(CHATS * 7)
    shards = tmp_path / "shards"
    shards.mkdir()
    write_rows(shards / "1.jsonl", rows[:10])
    write_rows(shards / "2.jsonl", rows[10:])
    whole = write_rows(tmp_path / "whole.jsonl", rows)
    encode_dataset(whole, tmp_path / "whole", tokenizer, "chat", 64, "error")
    monkeypatch.setattr(encode, "BATCH_ROWS", batch_rows)
    encode_dataset(shards, tmp_path / "sharded", tokenizer, "chat", 64, "error")
    assert contents(tmp_path / "whole") == contents(tmp_path / "sharded")


def test_reading_stays_a_few_batches_ahead_of_writing(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read = num_written = most_ahead = 0
    read_rows, write = encode.read_rows_and_bad_rows, encode._ArrayWriter.write

    def counted_rows(*arguments: Any) -> Iterator[Any]:
        nonlocal num_read, most_ahead
        for row in read_rows(*arguments):
            num_read += 1
            most_ahead = max(most_ahead, num_read - num_written)
            yield row

    def counted_write(writer: Any, rows: Any) -> None:
        nonlocal num_written
        num_written += 1
        write(writer, rows)

    monkeypatch.setattr(encode, "read_rows_and_bad_rows", counted_rows)
    monkeypatch.setattr(encode._ArrayWriter, "write", counted_write)
    monkeypatch.setattr(encode, "BATCH_BYTES", 1000)
    source = write_rows(tmp_path / "data.jsonl", [{"text": "1" * 100}] * 1000)
    encode_dataset(source, tmp_path / "encoded", tokenizer, "text", 512, "error")
    assert num_written == 1000
    assert most_ahead <= 9 * (encode.BATCHES_AHEAD + 1)


def test_large_vocabularies_have_wider_tokens(tmp_path: Path) -> None:
    with encode._ArrayWriter(tmp_path, vocab_size=2**16 + 1, rows_per_sample=1) as arrays:
        arrays.write([EncodedRow([0, 2**16], b"\0\1")])
    assert arrays.token_dtype == "uint32"
    assert np.fromfile(tmp_path / "tokens.bin", np.uint32).tolist() == [0, 2**16]


def test_arrays_are_read_only(stage: Stage) -> None:
    dataset, _ = stage.encode(chat_rows(CHATS), "chat")
    ids, _ = dataset.row(0)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


@pytest.mark.parametrize("name", ["tokens", "loss_mask", "offsets", "trained_offsets", "sources"])
def test_a_file_cut_short_is_noticed(stage: Stage, name: str) -> None:
    stage.encode(chat_rows(CHATS), "chat")
    file = stage.output / f"{name}.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{name}\.bin has \d+ bytes, but meta\.json calls for"):
        EncodedDataset.open(stage.output)
    file.unlink()
    with pytest.raises(UserError, match=rf"{name}\.bin is missing"):
        EncodedDataset.open(stage.output)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": "3"},
        {"rows": 0},
        {"sources": 0},
        {"sources": 99},
        {"token_dtype": "object"},
        {"rows_per_sample": 3},
        {"tokens": None},
    ],
)
def test_a_damaged_meta_is_noticed(stage: Stage, change: dict[str, Any]) -> None:
    stage.encode(chat_rows(CHATS), "chat")
    file = stage.output / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=r"meta\.json is damaged"):
        EncodedDataset.open(stage.output)


def test_offsets_of_other_arrays_are_noticed(stage: Stage) -> None:
    dataset, _ = stage.encode(chat_rows(CHATS), "chat")
    offsets = dataset.offsets.copy()
    offsets[-1] -= 1
    (stage.output / "offsets.bin").write_bytes(offsets.tobytes())
    with pytest.raises(UserError, match="does not agree with its meta"):
        EncodedDataset.open(stage.output)


def test_source_rows_of_other_samples_are_noticed(stage: Stage) -> None:
    stage.encode(chat_rows(CHATS), "chat")
    for sources in ([1, 2, 3, 4], [0, 2, 2, 3], [0, 1, 2, 4]):
        np.array(sources).tofile(stage.output / "sources.bin")
        with pytest.raises(UserError, match="contradicts itself"):
            EncodedDataset.open(stage.output)


def test_another_tokenizer_is_noticed(stage: Stage) -> None:
    dataset, _ = stage.encode(chat_rows(CHATS), "chat")
    dataset.check_tokenizer_of(stage.tokenizer)
    other = stage.folder / "other"
    save_tokenizer(train_tokenizer(["another text"], 300), other)
    with pytest.raises(UserError, match=f"another tokenizer than that of {other}"):
        dataset.check_tokenizer_of(other)


def test_encoding_starts_without_torch_and_transformers() -> None:
    heavy = "{'torch', 'transformers', 'numpy'} & set(sys.modules)"
    code = f"import sys, stages.encode, stages.tokenizer; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reasons_that_are_not_shown_are_counted() -> None:
    tally = Tally()
    for kind, number in {"a": 4, "b": 3, "c": 2, "d": 1, "e": 1}.items():
        for _ in range(number):
            tally.add(kind, f"{kind}:1")
    assert str(tally) == "4 a (first a:1), 3 b (first b:1), 2 c (first c:1), 2 for other reasons"
