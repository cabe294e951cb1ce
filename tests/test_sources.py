"""The same rows from every container, and from mixtures of them."""

import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from minimind.datasets.formats import BadRowError, parse_chat, read_rows, read_rows_and_bad_rows
from minimind.datasets.sources import count_rows, mixture, unread_files
from minimind.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"instruction": "2+3?", "input": "", "output": "5"},
    {"instruction": "小明有几个苹果？\n", "input": 'a, "b"', "output": "15, 16\n17"},
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": "2+3?", "reasoning_content": None, "tool_calls": None},
            {"role": "assistant", "content": "5", "reasoning_content": "2+3=5", "tool_calls": []},
        ],
        "tools": None,
    },
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]


def lines(rows: list[Any]) -> bytes:
    return b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows)


def write_csv(file: Path, rows: list[Any]) -> None:
    with file.open("w", encoding="utf-8-sig", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(file: Path, rows: list[Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(rows)
    match file.name:
        case "rows.parquet":
            pytest.importorskip("pyarrow.parquet").write_table(table, file)
        case "stream.arrow":
            with pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        case "file.arrow":
            with pyarrow.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        case "rows.jsonl.zst":
            with pyarrow.output_stream(file, compression="zstd") as out:
                out.write(lines(rows))


CONTAINERS: dict[str, Callable[[Path, list[Any]], object]] = {
    "rows.jsonl": lambda file, rows: file.write_bytes(lines(rows)),
    "rows.txt": lambda file, rows: file.write_bytes(lines(rows)),
    "rows.json": lambda file, rows: file.write_text(json.dumps(rows, indent=2)),
    "lines.json": lambda file, rows: file.write_bytes(lines(rows)),
    "rows.JSONL.GZ": lambda file, rows: file.write_bytes(gzip.compress(lines(rows))),
    "rows.json.gz": lambda file, rows: file.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "rows.csv": write_csv,
    **dict.fromkeys(["rows.parquet", "stream.arrow", "file.arrow", "rows.jsonl.zst"], write_arrow),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    kinds = [ROWS] if name.endswith("csv") else [ROWS, CHATS]  # in cells there is text alone
    for rows in kinds:
        CONTAINERS[name](tmp_path / name, rows)
        found = list(read_rows(tmp_path / name, parse_chat))
        assert [row.value for row in found] == [parse_chat(row) for row in rows]
        assert not any(row.unread for row in found)
        assert count_rows(tmp_path / name) == len(rows)


def test_a_row_may_be_all_of_a_json_file(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    file.write_text(json.dumps(CHATS[0], indent=2))
    assert [row.value for row in read_rows(file, parse_chat)] == [parse_chat(CHATS[0])]
    file.write_text(file.read_text() + "{}")
    with pytest.raises(UserError, match=r"one\.json: broken JSON at line \d+, column"):
        list(read_rows(file, parse_chat))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'[\n{"a": 1},\n{"a" 2}]', "a.json: broken JSON at line 3, column 6"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.json", b'[{"a": 1, "a": 2}]', "a.json: the key 'a' stands there twice"),
        ("a.csv", b"", "a.csv has no rows"),
        ("a.csv", b"prompt,prompt\nb,c\n", "the key 'prompt' stands there twice"),
        ("a.csv", b'prompt,completion\n"b,c\n', "a.csv cannot be read as .csv: unexpected end"),
        ("a.csv", b"prompt,completion\n\xff,c\n", "a.csv cannot be read as .csv: 'utf-8' codec"),
        ("a.jsonl.gz", b"{}\n", "a.jsonl.gz cannot be read as .jsonl.gz: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"[1]" * 99, mtime=0)[:-9], "cannot be read as .jsonl.gz"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read as .parquet"),
        ("a.arrow", b"ARROW1", "a.arrow cannot be read as .arrow"),
        ("a.arrow", b"[1]", "a.arrow cannot be read as .arrow"),
        ("a.jsonl.zst", b"{}", "a.jsonl.zst cannot be read as .jsonl.zst"),
    ],
)
def test_a_broken_container_is_one_line(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    if name.endswith(("parquet", "arrow", "zst")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        list(read_rows(tmp_path / name, parse_chat))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rows_without_lines_are_named_by_their_number(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ROWS[0], {"x": 1}, [2], ROWS[1]], indent=1))
    rows = list(read_rows_and_bad_rows(tmp_path / "a.json", parse_chat))
    bad = [str(row) for row in rows if isinstance(row, BadRowError)]
    assert bad[0].startswith(f"{tmp_path / 'a.json'}, row 2: conversations or messages or")
    assert bad[1].startswith(f"{tmp_path / 'a.json'}, row 3: the row is a list")
    (tmp_path / "a.csv").write_text('prompt,completion\n"a\nb",c\nd,e,f\n,g\n')
    rows = list(read_rows_and_bad_rows(tmp_path / "a.csv", parse_chat))
    assert [row.place.line for row in rows] == [3, 4, 5]
    assert "1 cells more than the first line has" in str(rows[1])
    assert "prompt is empty" in str(rows[2])


def test_what_needs_pyarrow_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for name in ("a.parquet", "a.arrow", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=rf"{name} needs pyarrow; `pip install .*\[data\]'"):
            count_rows(tmp_path / name)


def test_a_folder_is_all_of_its_files_of_rows(tmp_path: Path) -> None:
    write_csv(tmp_path / "b.csv", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(CHATS))
    (tmp_path / "state.json").write_text("{}")
    found = [row.format for row in read_rows(tmp_path, parse_chat)]
    assert found == ["openai", "openai", "alpaca", "alpaca"]
    assert unread_files(tmp_path) == [f"{tmp_path / 'state.json'} (no file of rows)"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "more").mkdir()
    for name, letter, number in (("a", "a", 60), ("b", "b", 40), ("more/c", "c", 10)):
        rows = [{"instruction": f"{letter}{n}", "output": "x"} for n in range(number)]
        (tmp_path / f"{name}.jsonl").write_bytes(lines(rows))
    return tmp_path


def mixed(folder: Path, mix: Any) -> list[str]:
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    return [row.value[0]["content"] for row in read_rows(folder, parse_chat)]


def test_a_mixture_takes_its_shares_each_row_once(folder: Path) -> None:
    parts: list[Any] = [{"path": "a.jsonl", "share": 0.25}, {"path": "b.jsonl", "share": 0.75}]
    asked = mixed(folder, {"parts": parts})
    counts = Counter(text[0] for text in asked)
    # b is the scarcer one: all of it, and a third as many of a.
    assert (counts["a"], counts["b"], len(set(asked))) == (13, 40, 53)
    assert asked == mixed(folder, {"parts": parts})
    assert asked != mixed(folder, {"parts": parts, "seed": 2})
    assert [(taken.taken, taken.rows) for taken in mixture(folder)] == [(13, 60), (40, 40)]
    parts[1]["max_rows"] = 20
    assert Counter(text[0] for text in mixed(folder, {"parts": parts})) == {"a": 6, "b": 20}


def test_a_mixture_without_shares_takes_all_in_its_order(folder: Path) -> None:
    parts: list[Any] = [{"path": "more"}, {"path": "a.jsonl", "max_rows": 5}]
    asked = mixed(folder, {"parts": parts})
    assert [text[0] for text in asked] == ["c"] * 10 + ["a"] * 5
    assert unread_files(folder) == [f"{folder / 'b.jsonl'} (no part of mix.yaml)"]
    outer = folder.rename(folder.parent / "moved")
    (folder / "inside").parent.mkdir()
    outer.rename(folder / "inside")
    (said,) = unread_files(folder)
    assert said.startswith(f"{folder / 'inside/mix.yaml'} (the mix.yaml of a folder inside")
    (folder / "inside").rename(outer)
    folder.rmdir()
    outer.rename(folder)
    parts[0]["format"] = "openai"
    with pytest.raises(UserError, match=r"more/c.jsonl:1: messages is missing"):
        mixed(folder, {"parts": parts})
    parts[0]["format"] = "opanai"
    with pytest.raises(UserError, match="says the format 'opanai'; allowed are sharegpt, minimind"):
        mixed(folder, {"parts": parts})


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ({}, "parts: Field required"),
        (None, "should be a valid"),
        ({"parts": []}, "parts: "),
        ({"parts": [{"path": "a.jsonl", "shares": 1}]}, "parts.0.shares"),
        ({"parts": [{"path": "a.jsonl", "share": 0.5}]}, "1 of 1 parts have shares, of 0.5 in all"),
        ({"parts": [{"path": "a.jsonl", "share": 1}, {"path": "b.jsonl"}]}, "1 of 2 parts have"),
        ({"parts": [{"path": "../a.jsonl"}]}, "is not inside its folder"),
        ({"parts": [{"path": "."}]}, "is not inside its folder"),
        ({"parts": [{"path": "d.jsonl"}]}, "d.jsonl is missing"),
        ({"parts": [{"path": "a.jsonl", "max_rows": "many"}]}, "parts.0.max_rows"),
    ],
)
def test_a_broken_mixture_is_one_line(folder: Path, mix: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        mixed(folder, mix)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
