"""Variations of chats: what may change, what must not, and that they are the same every time."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from minimind.chat.template import Message
from minimind.chat.tokenizer import ChatTokenizer
from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.datasets import encode
from minimind.datasets.augment import Augmentation, AugmentConfig, load_synonyms
from minimind.datasets.encode import encode_dataset
from minimind.datasets.encoded import EncodedDataset
from minimind.errors import UserError
from stages.encode import app
from tests.graph import ROOT

SHIPPED = ROOT / "minimind" / "datasets" / "synonyms.json"
TABLE = [["gives away", "hands out"], ["friend", "pal"], ["现在", "目前"], ["钱", "银子"]]


def augmentation(
    copies: int = 1, dropout: float = 0.0, synonyms: float = 0.0, seed: int = 1
) -> Augmentation:
    config = AugmentConfig(
        augment_copies=copies, seed=seed, word_dropout=dropout, synonym_share=synonyms
    )
    return Augmentation(config, TABLE)


def chat(question: str, answer: str = "5") -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def varied(text: str, row: int = 0, **shares: float) -> str:
    ((question, _),) = augmentation(**shares).copies(chat(text), row)  # type: ignore[arg-type]
    return question["content"]


def almost_all_dropped(text: str) -> str:
    return varied(text, dropout=1 - 1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tom gives away 3.", "Tom hands out 3."),
        ("Gives away, GIVES AWAY", "Hands out, Hands out"),
        (
            "a friend, a friendship, a friend's, my-friend",
            "a pal, a friendship, a friend's, my-friend",
        ),
        ("你的friend说", "你的pal说"),
        ("小明现在有3元钱。", "小明目前有3元银子。"),
        ("目前现在", "现在目前"),
        ("<friend> x<friend>", "<friend> x<friend>"),
        ("none of these", "none of these"),
    ],
)
def test_words_of_the_table_are_replaced_as_wholes(text: str, expected: str) -> None:
    assert varied(text, synonyms=1.0) == expected


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Tom has 12 apples and 3.5 pears. He eats x2 now", "12 3.5. x2"),
        ("小明有12个苹果，又买了三个。", "12，三。"),
        ("Do not, don't, never say twenty-one or nothing at all!", "not, don't, never twenty-one!"),
        ("a <think> b </think> <b>c</b> d e f g", "<think> </think> <b></b>"),
        ("a b c d (e) - 7 * f =?", "() - 7 * =?"),
        ("one two three", "one two three"),
    ],
)
def test_numbers_negations_and_tags_are_never_dropped(text: str, left: str) -> None:
    assert almost_all_dropped(text) == left


def test_of_a_few_words_none_is_dropped_and_no_turn_becomes_empty() -> None:
    assert almost_all_dropped("what is your full name?") == "what is your full name?"
    assert almost_all_dropped("苹果多少钱？") == "苹果多少钱？"
    assert almost_all_dropped("a b c d e f g") == "a b c d e f g"


def test_a_chinese_word_of_the_table_is_dropped_as_one() -> None:
    texts = {varied("小明现在有很多苹果", row, dropout=0.3) for row in range(200)}
    assert len(texts) > 50
    assert all(("现" in text) == ("在" in text) == ("现在" in text) for text in texts)
    assert any("苹" in text and "果" not in text for text in texts)


def test_the_shares_are_what_is_asked_for() -> None:
    words = " ".join(["word"] * 2000)
    assert varied(words, dropout=0.1).count("word") == pytest.approx(1800, abs=40)
    friends = " ".join(["friend"] * 2000)
    assert varied(friends, synonyms=0.3).count("pal") == pytest.approx(600, abs=70)


def test_only_what_users_say_changes() -> None:
    turns = ["system", "user", "assistant", "user", "tool", "assistant"]
    said = "my friend has 5 apples now, says another friend"
    messages = [{"role": role, "content": said} for role in turns]
    changed = set()
    for copy in augmentation(copies=20, dropout=0.3, synonyms=0.5).copies(messages, 7):
        assert [turn["role"] for turn in copy] == turns
        changed |= {place for place, turn in enumerate(copy) if turn["content"] != said}
    assert changed == {1, 3}


def test_a_copy_depends_on_seed_row_and_number_alone() -> None:
    messages = chat("my friend has 5 apples now, says another friend of yours and mine")
    copies = augmentation(copies=3, dropout=0.2, synonyms=0.5).copies(messages, 4)
    more = augmentation(copies=9, dropout=0.2, synonyms=0.5).copies(messages, 4)
    assert more[:3] == copies
    assert len({str(copy) for copy in more}) > 6
    assert augmentation(3, 0.2, 0.5).copies(messages, 5) != copies
    assert augmentation(3, 0.2, 0.5, seed=2).copies(messages, 4) != copies


def framed(messages: list[Message], num_rows: int = 200, **keys: float) -> list[list[Message]]:
    """The chat as each of many rows."""
    made = Augmentation(AugmentConfig(**keys), TABLE)  # type: ignore[arg-type]
    return [chat for row in range(num_rows) for chat in made.variants(messages, row)]


def test_a_share_of_chats_begins_with_a_system_prompt() -> None:
    messages = chat("how many?")
    begun = framed(messages, system_share=0.2, augment_copies=1)
    with_prompt = [chat[0]["content"] for chat in begun if chat[0]["role"] == "system"]
    assert len(with_prompt) == pytest.approx(80, abs=25)
    assert len({*with_prompt}) > 4
    assert all(chat[-2:] == messages for chat in begun)
    assert begun == framed(messages, system_share=0.2, augment_copies=1)
    assert begun != framed(messages, system_share=0.2, augment_copies=1, seed=2)
    of_its_own = [{"role": "system", "content": "Be brief."}, *messages]
    assert framed(of_its_own, system_share=1.0) == [of_its_own] * 200
    assert framed(messages) == [messages] * 200


def test_a_share_of_chats_loses_its_empty_thoughts() -> None:
    empty = "<think>\n\n</think>\n\n"
    answers = [f"{empty}5", "<think>\nso\n</think>\n\n5", empty, f"5 {empty}", "5"]
    messages = [turn for answer in answers for turn in chat(f"{empty}how?", answer)]
    without = [turn for answer in ["5", *answers[1:]] for turn in chat(f"{empty}how?", answer)]
    thought = framed(messages, empty_thought_dropout=0.8)
    assert thought.count(without) == pytest.approx(160, abs=25)
    assert thought.count(messages) == 200 - thought.count(without)
    call = [*chat("?", empty)[:1], {**chat("?", empty)[1], "tool_calls": [{"name": "add"}]}]
    assert framed(call, 1, empty_thought_dropout=1.0)[0][1]["content"] == ""


@given(st.text(max_size=60), st.integers(0, 10))
@settings(deadline=None, max_examples=150)
def test_numbers_stay_in_any_text(text: str, row: int) -> None:
    result = varied(text, row, dropout=0.5, synonyms=0.5)
    assert re.findall(r"\d", result) == re.findall(r"\d", text)
    assert result.strip() or not text.strip()


# ---- the table ----


def test_the_shipped_table_can_be_read() -> None:
    table = load_synonyms(SHIPPED)
    assert ["你好", "您好"] in table
    # A bare digit or measure word in it would make answers wrong.
    assert all(len(word) > 1 or word == "请" for group in table for word in group)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": "b"}', "must be a list of groups"),
        ("[", "cannot be read"),
        ('[["a", "b"], ["c"]]', "group 2 is ['c']"),
        ('[["two", "2"]]', "group 1 has '2'; digits"),
        ('[["<think>", "hm"]]', "group 1 has '<think>'"),
        ('[["a", "b"], ["c", "A"]]', "group 2 has 'A', which stands in the table before"),
        ('[["a", " "]]', "without outer space"),
        ('[["a", 3]]', "group 1 has 3"),
    ],
)
def test_a_bad_table_is_an_error_of_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "synonyms.json"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_synonyms(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is missing"):
        load_synonyms(tmp_path / "none.json")


# ---- the encode stage ----

QUESTIONS = [f"my friend Tom has {n} apples now; how many does he have?" for n in range(30)]


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([*QUESTIONS, "user assistant"], 300), directory)
    return directory


def write_chats(path: Path) -> Path:
    lines = [json.dumps({"conversations": chat(text)}) for text in QUESTIONS]
    lines.insert(3, "{")
    path.write_text("\n".join(lines))
    return path


def run(folder: Path, tokenizer: Path, data_format: str, **keys: Any) -> Any:
    nothing = folder / "nothing.jsonl"
    nothing.write_text('{"text": "what no row asks"}\n')
    data = {"on_bad_row": "skip", "x": str(write_chats(folder / "chats.jsonl"))}
    data |= {"synonyms": str(SHIPPED), "problems": str(nothing), "text": str(nothing)}
    encode = {"tokenizer": str(tokenizer), "x": {"max_length": 512, **keys}}
    sections = {"data": data, "encode": encode}
    (folder / "params.yaml").write_text(json.dumps(sections))
    return CliRunner().invoke(
        app,
        [
            *("--name", "x", "--format", data_format, "--output", str(folder / "encoded")),
            *("--metrics", str(folder / "metrics.json")),
            *("--params", str(folder / "params.yaml")),
        ],
    )


KEYS = {"augment_copies": 2, "seed": 1, "word_dropout": 0.2, "synonym_share": 0.5}


def test_every_chat_is_followed_by_its_copies(tmp_path: Path, tokenizer_directory: Path) -> None:
    result = run(tmp_path, tokenizer_directory, "chat", **KEYS)
    assert result.exit_code == 0, result.stderr
    dataset = EncodedDataset.open(tmp_path / "encoded")
    metrics = json.loads((tmp_path / "metrics.json").read_text())["encode"]["x"]
    assert (metrics["rows"], metrics["skipped_rows"], metrics["samples"]) == (31, 1, 90)
    tokenizer = ChatTokenizer.load(tokenizer_directory)
    rows = [dataset.row(index) for index in range(dataset.rows)]
    originals = [tokenizer.encode_chat(chat(text)) for text in QUESTIONS]
    assert [(ids.tolist(), loss_mask.tolist()) for ids, loss_mask in rows[::3]] == originals
    assert dataset.sources.tolist() == list(range(0, 91, 3))
    texts = [tokenizer.decode(ids) for ids, _ in rows]
    for index, text in enumerate(texts):
        assert re.findall(r"\d+", text) == re.findall(r"\d+", texts[index - index % 3])
    assert sum(text == texts[index - index % 3] for index, text in enumerate(texts)) < 40


def test_without_copies_not_a_byte_changes(tmp_path: Path, tokenizer_directory: Path) -> None:
    run(tmp_path, tokenizer_directory, "chat", **KEYS | {"augment_copies": 0})
    tokenizer = ChatTokenizer.load(tokenizer_directory)
    encode_dataset(tmp_path / "chats.jsonl", tmp_path / "plain", tokenizer, "chat", 512, "skip")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "encoded" / file.name).read_bytes()


def test_system_prompts_are_encoded_without_copies(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    keys = {"seed": 1, "system_share": 1.0, "system_prompts": ["Tom."]}
    result = run(tmp_path, tokenizer_directory, "chat", **keys)
    assert result.exit_code == 0, result.stderr
    dataset = EncodedDataset.open(tmp_path / "encoded")
    tokenizer = ChatTokenizer.load(tokenizer_directory)
    begun = [{"role": "system", "content": "Tom."}, *chat(QUESTIONS[0])]
    assert dataset.rows == 30
    assert dataset.row(0)[0].tolist() == tokenizer.encode_chat(begun)[0]


@pytest.mark.parametrize("batch_rows", [1, 7])
def test_batches_change_no_byte(
    tmp_path: Path,
    tokenizer_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_rows: int,
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    run(tmp_path / "one", tokenizer_directory, "chat", **KEYS)
    monkeypatch.setattr(encode, "BATCH_ROWS", batch_rows)
    run(tmp_path / "other", tokenizer_directory, "chat", **KEYS)
    for file in (tmp_path / "one" / "encoded").iterdir():
        if file.suffix == ".bin":
            assert file.read_bytes() == (tmp_path / "other" / "encoded" / file.name).read_bytes()


def test_a_copy_too_long_to_train_on_gives_way_to_its_original(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_directory)
    source = tmp_path / "chats.jsonl"
    source.write_text(json.dumps({"conversations": chat("friend " * 20)}))
    longer = AugmentConfig(augment_copies=1, seed=1, word_dropout=0, synonym_share=1)
    ids, _ = tokenizer.encode_chat(chat("friend " * 20))
    encode_dataset(
        source,
        tmp_path / "encoded",
        tokenizer,
        "chat",
        len(ids),
        "error",
        Augmentation(longer, [["friend", "q" * 30]]),
    )
    dataset = EncodedDataset.open(tmp_path / "encoded")
    assert dataset.rows == 2
    np.testing.assert_array_equal(dataset.row(0)[0], dataset.row(1)[0])


@pytest.mark.parametrize("data_format", ["text", "preference"])
def test_only_chats_can_have_copies(
    tmp_path: Path, tokenizer_directory: Path, data_format: str
) -> None:
    result = run(tmp_path, tokenizer_directory, data_format, **KEYS)
    assert result.exit_code == 1
    assert "encode.x.augment_copies is not a known key; allowed are max_length" in result.stderr
    assert result.stderr.count("\n") == 1
