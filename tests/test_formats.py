import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.datasets import sources
from minimind.datasets.formats import (
    BadRowError,
    Preference,
    Row,
    parse_chat,
    parse_preference,
    parse_reasoning,
    parse_text,
    read_rows,
    read_rows_and_bad_rows,
)
from minimind.errors import UserError

Parse = Callable[[dict[str, Any]], Any]
PARSERS: list[Parse] = [parse_text, parse_chat, parse_reasoning, parse_preference]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def chat(*messages: Any) -> dict[str, Any]:
    return {"conversations": list(messages)}


def call(arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"id": "1", "function": {"name": "add", "arguments": arguments}}]}


def reasoning(content: str) -> dict[str, Any]:
    return chat(user("2+3?"), assistant(content))


def test_rows_of_every_format() -> None:
    assert parse_text({"text": " 你好\n", "source": "web"}) == " 你好\n"
    turns = [{"role": "system", "content": "s"}, user("u"), assistant("a"), user("u2")]
    assert parse_chat(chat(*turns)) == turns
    strings = {"prompt": "hi", "chosen": "hello", "rejected": "no"}
    assert parse_preference(strings) == Preference(
        [user("hi")], [assistant("hello")], [assistant("no")]
    )


def test_prompt_of_two_lists_is_their_shared_beginning() -> None:
    shared = [user("a"), assistant("b"), user("c")]
    pair = {"chosen": [*shared, assistant("d")], "rejected": [*shared, assistant("e")]}
    assert parse_preference(pair) == Preference(shared, [assistant("d")], [assistant("e")])


def test_two_lists_may_differ_before_their_last_turn() -> None:
    chosen = [user("a"), assistant("b"), user("c"), assistant("d")]
    rejected = [user("a"), assistant("x"), user("y"), assistant("z")]
    pair = parse_preference({"chosen": chosen, "rejected": rejected})
    assert pair == Preference(chosen[:1], chosen[1:], rejected[1:])


@pytest.mark.parametrize(
    "content",
    [
        "<think>2+3=5</think>\n<answer>5</answer>",
        "<think>2+3=5</think><answer>5</answer>",
        "<think>\n2+3\n\n=5\n</think>\n\n<answer>\n5\n</answer>\n",
        "<think>a < b and b > c</think> <answer>1,000</answer>",
    ],
)
def test_accepted_reasoning(content: str) -> None:
    assert parse_reasoning(reasoning(content))[1]["content"] == content


TOOL = {"type": "function", "function": {"name": "add"}}
SYSTEM = {"role": "system", "content": "s"}
CALLED = {"tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
HELLO = [user("a"), assistant("b")]
# The name of a format, a row of it, and the messages that it is.
CHATS: list[tuple[str, Any, list[Any]]] = [
    ("minimind", chat(*HELLO), HELLO),
    (
        "minimind",
        chat(
            {"role": "system", "content": "", "tools": json.dumps([TOOL])},
            user("a"),
            assistant("") | {"tool_calls": json.dumps([{"name": "add", "arguments": {"a": 1}}])},
            {"role": "tool", "content": "5"},
            assistant("b") | {"reasoning_content": "so", "tools": "", "tool_calls": None},
        ),
        [
            {"role": "system", "content": "", "tools": [TOOL]},
            user("a"),
            assistant("") | CALLED,
            {"role": "tool", "content": "5"},
            assistant("b") | {"reasoning_content": "so"},
        ],
    ),
    (
        "openai",
        {
            "tools": [TOOL],
            "messages": [
                {"role": "developer", "content": "s"},
                user([{"type": "text", "text": "a"}, {"type": "text", "text": "?"}]),
                {"role": "assistant", "content": None, **call('{"a":1}')},
                {"role": "tool", "tool_call_id": "1", "content": ""},
                assistant("b") | {"weight": 1},
            ],
        },
        [
            SYSTEM | {"tools": [TOOL]},
            user("a?"),
            assistant("") | CALLED,
            {"role": "tool", "content": ""},
            assistant("b"),
        ],
    ),
    (
        "sharegpt",
        {
            "system": "s",
            "tools": json.dumps([TOOL]),
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "5"},
                {"from": "gpt", "value": "b", "loss": False},
            ],
        },
        [
            SYSTEM | {"tools": [TOOL]},
            user("a"),
            assistant("") | CALLED,
            {"role": "tool", "content": "5"},
            assistant("b") | {"loss": False},
        ],
    ),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}, HELLO),
    (
        "alpaca",
        {
            "instruction": "c",
            "input": "d",
            "output": "e",
            "system": "s",
            "history": [["a", "b"]],
        },
        [SYSTEM, *HELLO, user("c\nd"), assistant("e")],
    ),
    ("prompt-completion", {"prompt": "a", "completion": "b"}, HELLO),
    (
        "prompt-completion",
        {"prompt": [SYSTEM, HELLO[0]], "completion": HELLO[1:]},
        [SYSTEM, *HELLO],
    ),
]


@pytest.mark.parametrize(("name", "record", "messages"), CHATS)
def test_chats_of_every_format(name: str, record: Any, messages: list[Any]) -> None:
    assert parse_chat.of(record).name == name
    assert parse_chat(record) == messages


def test_each_row_is_told_by_itself(tmp_path: Path) -> None:
    """Whatever stands before it, also what is no row, and of the same format otherwise spelt."""
    rows = [record for _, record, _ in CHATS]
    file = tmp_path / "mixed.jsonl"
    for order in (rows, rows[::-1]):
        file.write_text("\n".join(["{", *map(json.dumps, order)]))
        bad, *good = read_rows_and_bad_rows(file, parse_chat)
        assert isinstance(bad, BadRowError)
        found = [(row.format, row.value) for row in good if isinstance(row, Row)]
        assert sorted(found, key=str) == sorted([(n, m) for n, _, m in CHATS], key=str)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("preference", {"prompt": "p", "chosen": "b", "rejected": "c"}),
        ("preference", {"prompt": [user("p")], "chosen": "b", "rejected": "c"}),
        ("preference", {"prompt": "p", "chosen": [assistant("b")], "rejected": [assistant("c")]}),
        (
            "preference",
            {
                "prompt": [{"from": "human", "value": "p"}],
                "chosen": [{"from": "gpt", "value": "b"}],
                "rejected": [assistant("c")],
            },
        ),
        (
            "implicit-preference",
            {"chosen": [user("p"), assistant("b")], "rejected": [user("p"), assistant("c")]},
        ),
        ("implicit-preference", {"chosen": "p b", "rejected": "p c"}),
        (
            "sharegpt-preference",
            {
                "conversations": [{"from": "human", "value": "p"}],
                "chosen": {"from": "gpt", "value": "b"},
                "rejected": {"from": "gpt", "value": "c"},
            },
        ),
    ],
)
def test_preferences_of_every_format(name: str, record: Any) -> None:
    assert parse_preference.of(record).name == name
    assert parse_preference(record) == Preference([user("p")], [assistant("b")], [assistant("c")])


def test_a_thought_may_stand_beside_its_answer() -> None:
    thought = assistant("5") | {"reasoning_content": "2+3"}
    assert parse_reasoning(chat(user("2+3?"), thought)) == [user("2+3?"), thought]


TAGS_NEEDED = "it must have <think> </think> <answer> </answer>, each once"
BAD_RECORDS: list[tuple[Parse, Any, str]] = [
    (parse_text, {}, "text is missing; the keys found are none"),
    (parse_text, {"content": "x"}, "text is missing; the keys found are 'content'"),
    (parse_text, {"text": 3}, "text is the number 3; it must be a string"),
    (parse_text, {"text": None}, "text is null; it must be a string"),
    (parse_text, {"text": " \n"}, "text is empty; it must hold text"),
    (parse_text, {"text": "a\ud83d"}, r"text has half a character (\ud83d)"),
    (parse_chat, {"chat": []}, "completion with prompt is missing; the keys found are 'chat'"),
    (parse_chat, {"messages": []}, "messages has no assistant turn"),
    (parse_chat, {"conversations": "hi"}, "conversations is the string 'hi'; it must be a list"),
    (parse_chat, chat(), "conversations has no assistant turn"),
    (parse_chat, chat(user("a")), "conversations has no assistant turn; there must be one"),
    (parse_chat, chat("hi"), "turn 1 is the string 'hi'; it must be {"),
    (parse_chat, chat({"from": "human"}), "turn 1: value is missing; the keys found are 'from'"),
    (parse_chat, chat({"rôle": "user"}), "turn 1: role is missing; the keys found are 'rôle'"),
    (parse_chat, chat({"role": "user"}), "turn 1: content is missing"),
    (
        parse_chat,
        chat(user("a"), {"role": "bot", "content": "b"}),
        "turn 2: role is 'bot'; allowed are system, user, assistant, tool",
    ),
    (
        parse_chat,
        chat({"from": "user", "value": "a"}, {"from": "bot", "value": "b"}),
        "turn 2: from is 'bot'; allowed are system, human, gpt, function_call, observation",
    ),
    (parse_chat, chat({"role": ["user"], "content": "b"}), "turn 1: role is ['user']; allowed"),
    (parse_chat, chat(user(""), assistant("b")), "turn 1: content is empty"),
    (parse_chat, chat(user("a"), {"role": "assistant", "content": True}), "is the boolean true"),
    (
        parse_chat,
        chat(user("a"), {"role": "system", "content": "s"}, assistant("b")),
        "turn 2: role is 'system'; only the first turn may be",
    ),
    (parse_chat, chat({"role": "tool", "content": "5"}, assistant("b")), "turn 1: role is 'tool'"),
    (parse_reasoning, reasoning("5"), f"turn 2 has the tags none; {TAGS_NEEDED}"),
    (parse_reasoning, reasoning("<think>x<answer>5</answer>"), "tags <think> <answer> </answer>;"),
    (parse_reasoning, reasoning("<answer>5</answer><think>x</think>"), TAGS_NEEDED),
    (parse_reasoning, reasoning("<think>x</think><answer>5</answer><answer>"), TAGS_NEEDED),
    (
        parse_reasoning,
        reasoning("so <think>x</think><answer>5</answer>"),
        "turn 2 has text outside its tags",
    ),
    (parse_reasoning, reasoning("<think>x</think>!<answer>5</answer>"), "text outside its tags"),
    (parse_reasoning, reasoning("<think> </think><answer>5</answer>"), "has an empty thought"),
    (parse_reasoning, reasoning("<think>x</think><answer></answer>"), "has an empty answer"),
    (
        parse_reasoning,
        chat(user("a"), assistant("<think>x</think><answer>5</answer>"), assistant("b")),
        "turn 3 has the tags none",
    ),
    (parse_preference, {"prompt": "a"}, "chosen with rejected is missing; the keys found are"),
    (parse_preference, {"chosen": 1, "rejected": 2}, "chosen is the number 1; it must be a string"),
    (parse_preference, {"chosen": "a", "rejected": "b"}, "share no beginning"),
    (parse_preference, {"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
    (
        parse_preference,
        {"prompt": "a", "chosen": "b", "rejected": [assistant("c")]},
        "rejected is a list; it must be a string",
    ),
    (parse_preference, {"prompt": "a", "chosen": "b", "rejected": "b"}, "are identical"),
    (
        parse_preference,
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]},
        "chosen and rejected are identical; a pair must differ",
    ),
    (
        parse_preference,
        {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("b")]},
        "share no beginning",
    ),
    (
        parse_preference,
        {
            "chosen": [user("a"), assistant("b")],
            "rejected": [user("a"), assistant("b"), assistant("c")],
        },
        "chosen has no assistant turn after the 2 turns that both sides share",
    ),
    (
        parse_preference,
        {
            "chosen": [user("a"), assistant("b"), assistant("c")],
            "rejected": [user("a"), assistant("b"), user("c")],
        },
        "rejected has no assistant turn",
    ),
    (parse_preference, {"prompt": "a", "completion": "b", "label": True}, "the row is KTO's"),
    (parse_chat, {"prompt": "a", "completion": "b", "label": True}, "the row is KTO's"),
    (parse_chat, {"messages": [user("a"), assistant("b")], "label": False}, "the row is KTO's"),
    (parse_chat, chat(user("a"), assistant("")) | {"gt": ["5"]}, "it is for data.prompts"),
    (parse_chat, chat(user("a"), assistant("空")), "it is for data.prompts"),
    (parse_chat, {"instruction": "", "output": "b"}, "instruction is empty"),
    (
        parse_chat,
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "history, pair 1 is a li",
    ),
    (parse_chat, {"prompt": [], "completion": "b"} | {"tools": "[x"}, "tools: broken JSON at col"),
    (
        parse_chat,
        chat(user("a"), assistant("b")) | {"tools": 5},
        "tools is the number 5; it must be",
    ),
    (parse_chat, chat(user("a"), assistant("b") | {"tool_calls": [{}]}), "name is missing"),
    (
        parse_chat,
        chat(user("a"), assistant("b") | {"tool_calls": '["a"]'}),
        "tool_calls is the str",
    ),
    (
        parse_chat,
        chat(user("a"), assistant("b") | call("[1]")),
        "arguments is a list; it must be an",
    ),
    (parse_chat, chat(user("a"), assistant("b") | call('{"a": "\\ud800"}')), "is no JSON in UTF-8"),
    (
        parse_chat,
        chat(user("a") | call("{}"), assistant("b")),
        "tool_calls is there, but role is 'u",
    ),
    (
        parse_chat,
        chat(user("a"), assistant("b") | {"weight": 0.5}),
        "weight is the number 0.5; it mu",
    ),
    (
        parse_chat,
        chat(user("a"), assistant("b") | {"loss": False}),
        "no assistant turn whose loss is",
    ),
    (parse_chat, {"messages": [user([{"type": "image_url"}]), assistant("b")]}, "text is missing"),
    (
        parse_chat,
        chat({"role": "system", "content": "s"}, assistant("b")) | {"system": "t"},
        "content of system stands twice",
    ),
]


@pytest.mark.parametrize(("parse", "record", "reason"), BAD_RECORDS)
def test_bad_records_name_file_line_and_reason(
    tmp_path: Path, parse: Parse, record: dict[str, Any], reason: str
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n" + json.dumps(record) + "\n")
    with pytest.raises(BadRowError) as raised:
        list(read_rows(file, parse))
    assert str(raised.value).startswith(f"{file}:2: ")
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "broken JSON at column 13"),
        (b'{"text": "a"\r\n', "broken JSON at column 13"),
        (b"{'text': 'a'}", "broken JSON at column 2"),
        (b'[{"text": "a"}]', "the row is a list; it must be a JSON object"),
        (b'"a"', "the row is the string 'a'"),
        (b"null", "the row is null"),
        ('{"text": "é"}'.encode("latin-1"), "not UTF-8 (0xe9 at byte 11)"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8 (0xff at byte 1)"),
        (b"[" * 100_000, "JSON that cannot be read: brackets too deep"),
        (b'{"text": ' + b"1" * 10_000 + b"}", "JSON that cannot be read: a number too long"),
        (b'{"text": "a", "text": "b"}', "the key 'text' stands there twice"),
        (b'{"text": "a", "by": {"x": 1, "x": 1}}', "the key 'x' stands there twice"),
    ],
)
def test_broken_lines_name_file_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line)
    with pytest.raises(BadRowError) as raised:
        list(read_rows(file, parse_text))
    assert str(raised.value).startswith(f"{file}:2: {reason}")


@pytest.mark.parametrize(
    ("parse", "record", "unread"),
    [
        (parse_text, {"text": "a"}, []),
        (parse_text, {"text": "a", "weight": 2, "id": None}, ["id", "weight"]),
        (parse_chat, chat(user("a"), assistant("b")), []),
        (
            parse_chat,
            {**chat({**user("a"), "x": 1}, {**assistant("b"), "x": 2, "loss": 1}), "label": []},
            ["conversations.x", "label"],
        ),
        (
            parse_preference,
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1},
            ["margin"],
        ),
        (
            parse_preference,  # two lists begin with the prompt that is read
            {
                "prompt": "a",
                "chosen": [user("a"), assistant("b")],
                "rejected": [user("a"), {**assistant("c"), "score": 0}],
            },
            ["prompt", "rejected.score"],
        ),
    ],
)
def test_a_row_lists_each_key_that_is_not_read(
    tmp_path: Path, parse: Parse, record: Any, unread: list[str]
) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    (row,) = read_rows(tmp_path, parse)
    assert list(row.unread) == unread
    assert row.value == parse(record)


def test_windows_files_and_blank_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\xe2\x80\xa8c"}')
    rows = list(read_rows(file, parse_text))
    assert [(row.place.line, row.value) for row in rows] == [(1, "a"), (3, "b\u2028c")]


def test_reading_goes_on_after_bad_rows(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n{"text": 1}\nx\n{"text": "d"}\n')
    rows = list(read_rows_and_bad_rows(file, parse_text))
    assert [row.place.line for row in rows] == [1, 2, 3, 4]
    assert [isinstance(row, BadRowError) for row in rows] == [False, True, True, False]


def test_a_folder_is_its_shards_by_name(tmp_path: Path) -> None:
    for name, text in (("b", "2"), ("a", "1"), ("c", "3")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "README.md").write_text("not a shard")
    (tmp_path / ".c.jsonl").write_text("not one either")
    assert [row.value for row in read_rows(tmp_path, parse_text)] == ["1", "2", "3"]
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"b\.jsonl:1: text is missing"):
        list(read_rows(tmp_path, parse_text))


def test_sources_without_rows_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing; correct the path"):
        list(read_rows(tmp_path / "none.jsonl", parse_text))
    with pytest.raises(UserError, match=r"is a folder without \*\.jsonl files"):
        list(read_rows(tmp_path, parse_text))
    (tmp_path / "empty.jsonl").write_text("\n \n")
    for source in (tmp_path, tmp_path / "empty.jsonl"):
        with pytest.raises(UserError, match=r"empty\.jsonl has no rows"):
            list(read_rows(source, parse_text))


def test_a_line_without_end_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 2**20)
    (tmp_path / "data.jsonl").write_bytes(b"\0" * (2**20 + 1))
    with pytest.raises(UserError, match="longer than 1 MiB"):
        list(read_rows(tmp_path, parse_text))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "text",
                    "role",
                    "content",
                    "conversations",
                    "prompt",
                    "answer",
                    "chosen",
                    "rejected",
                    "messages",
                    "tool_calls",
                    "instruction",
                    "output",
                ]
            ),
            inner | st.sampled_from(["user", "assistant", "<think>", "</think>\n<answer>5"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(line=st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_a_line_holds_is_a_row_or_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, line: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(b'{"text": "first"}\n' + line)
    for parse in PARSERS:
        for row in read_rows_and_bad_rows(file, parse):
            if isinstance(row, BadRowError):
                assert str(row).startswith(f"{file}:")
                assert str(row).isprintable()
                assert len(row.reason) < 500
