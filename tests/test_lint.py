"""Each kind of finding is shown by a row that has it, with its line; memory does not grow."""

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from typer.testing import CliRunner, Result

from minimind.chat.template import Message
from minimind.chat.tokenizer import ChatTokenizer
from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.cli.main import app
from minimind.datasets.formats import parse_chat
from minimind.datasets.near_duplicates import NearDuplicates, jaccard, numbers, shingles
from minimind.datasets.row_checks import FirstSeen, questions
from minimind.datasets.sources import Place
from minimind.errors import UserError
from minimind.lint import Against, LintFormat, detect_format, lint
from minimind.tasks.problem import read_problems

NOTHING = Against.read([], 0.7)
CAT = "Amy's cat sleeps all day; in the night it hunts mice behind the house."
STORY = "Tom has 12 apples and 5 pears. He gives 3 apples to Amy. How many apples does Tom have?"
THOUGHT = "<think>12-3=9</think>\n<answer>9</answer>"


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def user(content: str) -> Message:
    return turn("user", content)


def assistant(content: str) -> Message:
    return turn("assistant", content)


def chat(*turns: Any) -> dict[str, Any]:
    return {"conversations": list(turns)}


def write(path: Path, rows: Sequence[Any]) -> Path:
    """One row a line; bytes as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["user assistant"], 267), folder)
    return folder


GOOD: dict[LintFormat, Any] = {
    "text": {"text": "Tom has 12 apples. 小明有3个。"},
    "chat": chat(turn("system", "Be brief."), user("2+3?"), assistant("5")),
    "reason": chat(user(STORY), assistant(THOUGHT)),
    "preference": {"prompt": STORY, "chosen": "He has 9.", "rejected": "9"},
    "prompts": {"prompt": STORY, "answer": None},
}
A, B = user("a"), assistant("b")
PAIR = {"chosen": [A, assistant("<think>x")], "rejected": [A, assistant("y</answer>")]}

# What a row is, the row, and the findings it must have.
FINDINGS: list[tuple[LintFormat, Any, list[tuple[str, str, str]]]] = [
    ("text", b'{"text": "a"', [("error", "json", "broken JSON at column 13")]),
    ("text", b"[1]", [("error", "schema", "the row is a list")]),
    ("text", b'{"text": "\xe9"}', [("error", "encoding", "not UTF-8 (0xe9 at byte 11)")]),
    ("text", b'{"text": "\\ud83d"}', [("error", "encoding", "half a character")]),
    ("text", {"txt": "a"}, [("error", "schema", "text is missing; the keys found are 'txt'")]),
    ("text", {"text": " \n"}, [("error", "empty", "text is empty")]),
    ("chat", chat(A, assistant("")), [("error", "empty", "turn 2: content is empty")]),
    ("chat", chat(A, turn("bot", "b")), [("error", "role", "turn 2: role is 'bot'")]),
    ("chat", chat(A, turn("system", "s"), B), [("error", "order", "only the first turn")]),
    ("chat", chat(turn("tool", "5"), B), [("error", "order", "a chat begins with")]),
    ("chat", chat(A), [("error", "order", "no assistant turn")]),
    ("chat", {"conversations": "a"}, [("error", "schema", "must be a list of messages")]),
    ("reason", chat(A, B), [("error", "tags", "turn 2 has the tags none")]),
    (
        "reason",
        chat(A, assistant("<answer>5</answer><think>x</think>")),
        [("error", "tags", "has the tags <answer> </answer> <think> </think>")],
    ),
    ("reason", chat(A, assistant(f"So: {THOUGHT}")), [("error", "tags", "outside its tags")]),
    (
        "reason",
        chat(A, assistant("<think> </think><answer>5</answer>")),
        [("error", "empty", "an empty thought")],
    ),
    (
        "preference",
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        [("error", "identical", "chosen and rejected are identical")],
    ),
    (
        "preference",
        {"chosen": [A, B, A], "rejected": [A, B, user("c")]},
        [("error", "order", "chosen has no assistant turn after the 2 turns")],
    ),
    ("prompts", {"prompt": "", "answer": "5"}, [("error", "schema", "prompt")]),
    (
        "prompts",
        {"prompt": "a", "answer": "B+", "scoring": "letter"},
        [("error", "schema", "letter")],
    ),
    ("prompts", {"prompt": "a", "answer": "5", "choices": ["5"]}, [("error", "schema", "two or")]),
    (
        "prompts",
        {"prompt": "a", "answer": "b</answer>"},
        [("warning", "gold", "no 'b</answer>'")] * 2,
    ),
    (
        "prompts",
        {"prompt": "a", "answer": "5", "full": "There are 5 or 6."},
        [("warning", "gold", "'There are 5 or 6.' should be right, but answers no '5'")],
    ),
    ("chat", chat(A, A, B), [("warning", "order", "turn 2 is user; after user comes assistant")]),
    ("chat", chat(B, A, B), [("warning", "order", "turn 1 is assistant; first comes system")]),
    ("chat", chat(A, B, A), [("warning", "order", "the last turn is user; it is not trained")]),
    ("chat", chat(A, turn("tool", "5"), B), [("warning", "order", "turn 2 is tool; after user")]),
    (
        "reason",
        chat(A, A, assistant(THOUGHT)),
        [("warning", "order", "turn 2 is user; after user comes assistant")],
    ),
    (
        "chat",
        chat(A, assistant("<answer>5</answer><think>x</think>")),
        [("warning", "tags", "turn 2 has the tags <answer> </answer> <think> </think>")],
    ),
    ("preference", PAIR, [("warning", "tags", "chosen, turn 2 has the tags <think>")]),
    (
        "preference",
        {"chosen": [A, B], "rejected": [A, assistant("c"), A]},
        [("warning", "order", "rejected, the last turn is user")],
    ),
    ("text", {"text": "caf\ufffd"}, [("warning", "damaged", "U+FFFD \ufffd at character 4")]),
    ("text", {"text": "cafÃ©"}, [("warning", "damaged", "U+00C3 Ã, U+00A9 © at character 4")]),
    ("text", {"text": "a\0b"}, [("warning", "damaged", "U+0000 at character 2")]),
    (
        "chat",
        chat(A, assistant("b<|im_end|>")),
        [("warning", "control", "<|im_end|> is no token there")],
    ),
]


def found(
    source: Path, data_format: LintFormat, against: Against = NOTHING
) -> list[tuple[int, str, str, str]]:
    return [
        (finding.place.line, finding.level, finding.kind, finding.message)
        for findings in lint(source, data_format, against, None, None)
        for finding in findings
    ]


@pytest.mark.parametrize(("data_format", "row", "expected"), FINDINGS)
def test_each_kind_of_finding_has_its_line(
    tmp_path: Path, data_format: LintFormat, row: Any, expected: list[tuple[str, str, str]]
) -> None:
    file = write(tmp_path / "data.jsonl", [GOOD[data_format], b"", row])
    findings = found(file, data_format)
    assert [finding[:3] for finding in findings] == [(3, *one[:2]) for one in expected]
    for (*_, message), (*_, part) in zip(findings, expected, strict=True):
        assert part in message
        assert message.isprintable()


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": "a",
            "answer": 5,
            "level": 1,
            "choices": ["5", "6"],
            "label": 0,
            "full": "It is 5.",
        },
        {"prompt": "a", "answer": "D", "scoring": "letter", "language": "en"},
        chat(user("a"), assistant("<think>2+3</think><answer>5</answer>")) | {"level": 2},
        chat(user("a"), assistant("Nobody knows.")),
        chat(user("a"), assistant("5")) | {"prompt": ["not looked at"]},
    ],
)
def test_lint_reads_problems_as_the_stages_do(tmp_path: Path, row: Any) -> None:
    file = write(tmp_path / "data.jsonl", [row])
    assert found(file, "prompts") == []
    read_problems(file, needs_answers=False, say=pytest.fail)


def test_keys_of_problems_that_are_not_known_are_told_once_a_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "anwser": "5", "lable": n} for n in range(3)]
    file, told = write(tmp_path / "data.jsonl", rows), list[str]()
    read_problems(file, needs_answers=False, say=told.append)
    result = run(file, "--show", 1)
    (line,) = [line for line in result.stdout.splitlines() if "warning: unread: " in line]
    assert told == [line.replace("warning: unread: ", "")]
    assert all(part in line for part in ("'anwser' in 3 rows", "'lable' in 3 rows", " label,"))
    assert run(file, "--strict").exit_code == 1


@pytest.mark.parametrize("data_format", GOOD)
def test_good_rows_have_no_findings(tmp_path: Path, data_format: LintFormat) -> None:
    file = write(tmp_path / "data.jsonl", [GOOD[data_format]])
    assert found(file, data_format) == []
    assert detect_format(file) == data_format


def test_turns_with_tools_and_reasoning_are_fine(tmp_path: Path) -> None:
    chats = [
        chat(A, assistant("call"), turn("tool", "1"), turn("tool", "2"), assistant("3"), A, B),
        chat(A, assistant(THOUGHT), user("c"), assistant("<answer>9</answer>")),
        chat(user("What is <think>?"), B),
    ]
    assert found(write(tmp_path / "data.jsonl", chats), "chat") == []


def test_duplicates_name_the_first_one_in_any_shard(tmp_path: Path) -> None:
    one, other = chat(A, B), chat(A, assistant("c"))
    folder = tmp_path / "shards"
    folder.mkdir()
    first = write(folder / "1.jsonl", [one, b'{"conversations": 1}', other, one])
    # The same row, whatever the order of its keys and those that no format names.
    again = {"id": 7, "conversations": [dict(reversed(message.items())) for message in (A, B)]}
    second = write(folder / "2.jsonl", [chat(A, B, A, B), again])
    expected = [(first, 4), (second, 2)]
    findings = [one for found in lint(folder, "chat", NOTHING, None, None) for one in found]
    duplicates = [finding for finding in findings if finding.kind == "duplicate"]
    assert [finding.place for finding in duplicates] == [Place(*place) for place in expected]
    assert {finding.message for finding in duplicates} == {f"the same as {first}:1"}


def test_a_table_of_hashes_grows_and_forgets_nothing() -> None:
    first_seen = FirstSeen()
    places = [Place(Path(f"{number // 9000}.jsonl"), number) for number in range(20_000)]
    assert all(first_seen.place_of(place.line, place) is None for place in places)
    assert len(first_seen._keys) == 2**15
    for place in places[::7]:
        assert first_seen.place_of(place.line, Place(Path("other.jsonl"), 1)) == place


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    rows = [
        {"prompt": STORY, "answer": 9, "id": "l1"},
        {"text": CAT},
        chat(A, B, user("And c?"), B),
    ]
    return write(tmp_path / "problems.jsonl", rows)


def test_evaluation_questions_are_found_in_every_format(tmp_path: Path, problems: Path) -> None:
    rows: list[tuple[LintFormat, Any, int | None]] = [
        ("text", {"text": f"  {STORY}\n"}, 1),
        ("chat", chat(A, B, user(STORY.replace(" ", "\n")), B), 1),
        ("reason", chat(turn("system", "s"), user(STORY), assistant(THOUGHT)), 1),
        ("preference", {"prompt": STORY, "chosen": "9.", "rejected": "9"}, 1),
        ("prompts", {"prompt": STORY}, 1),
        ("text", {"text": CAT}, 2),
        # A conversation's last question alone is not the conversation.
        ("chat", chat(A, B, user("And c?"), B), 3),
        ("chat", chat(user("And c?"), B), None),
        ("chat", chat(A, assistant(STORY)), None),
    ]
    against = Against.read([problems], 0.7)
    for data_format, row, line in rows:
        file = write(tmp_path / "data.jsonl", [GOOD[data_format] | {"prompt": "x"}, row])
        findings = [one for one in found(file, data_format, against) if one[0] == 2]
        message = f"asks what {problems}:{line} asks, which is for evaluation"
        assert findings == ([] if line is None else [(2, "warning", "overlap", message)])


@pytest.mark.parametrize(
    ("text", "is_near"),
    [
        (STORY.upper().replace("?", " ?!"), True),  # neither case nor punctuation counts
        (STORY.replace("pears", "plums"), True),
        (STORY.replace("12", "14"), False),  # much the same, but another problem
        (STORY.replace("Tom", "Ben").replace("apples", "stones"), False),
        (STORY[:40], False),
        ("Something else " + "".join(map(str, range(3000))), False),
        ("...", False),
    ],
)
def test_near_duplicates_of_evaluation_questions(
    tmp_path: Path, problems: Path, text: str, is_near: bool
) -> None:
    similarity = jaccard(shingles(text) or {""}, shingles(STORY))
    assert (similarity >= 0.7 and numbers(text) == numbers(STORY)) == is_near, "the example itself"
    file = write(tmp_path / "data.jsonl", [chat(A, B, user(text), B)])
    findings = found(file, "chat", Against.read([problems], 0.7))
    message = (
        f"asks nearly what {problems}:1 asks ({similarity:.0%} the same), which is for evaluation"
    )
    assert findings == ([(1, "warning", "near_overlap", message)] if is_near else [])


def test_chinese_questions_are_near_each_other_too(tmp_path: Path) -> None:
    story = (
        "小明有12个苹果，妈妈又给他买了3个苹果，后来他送给小红5个苹果，弟弟吃掉了两个。"
        "小明现在还有几个苹果？"
    )
    against = Against.read([write(tmp_path / "eval.jsonl", [{"prompt": story}])], 0.7)
    near = story.replace("，", ", ").replace("还有", "有")
    file = write(tmp_path / "data.jsonl", [{"prompt": near}, {"prompt": "小红有几个苹果？"}])
    assert [finding[:3] for finding in found(file, "prompts", against)] == [
        (1, "warning", "near_overlap")
    ]


def test_the_nearest_is_named_and_few_are_missed(tmp_path: Path) -> None:
    """Every question a word away from one of 200 is found, and that one is what is named."""
    words = ["apples", "pears", "boxes", "shells", "stamps", "cards", "coins", "books"]
    asked = [
        f"Person {n} of house {n * 7} has {words[n % 8]} and {words[n * 3 % 8]} in room {n * 11}, "
        f"takes {n * 13} of them to town {n * 17} and sells them. How many are there in the end?"
        for n in range(200)
    ]
    near = NearDuplicates(
        [write(tmp_path / "eval.jsonl", [{"prompt": text} for text in asked])], 0.7
    )
    for number, text in enumerate(asked[:50]):
        found_near = near.find([user(text.replace("sells", "trades"))])
        assert found_near is not None
        assert found_near[0].line == number + 1
        assert near.find([user(text.replace(f"house {number * 7} ", "house 5 "))]) is None


def test_lengths_and_lost_characters_need_a_tokenizer(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_folder)
    long = chat(user("1" * 20), assistant("2" * 80))
    rows = [chat(A, B), long, chat(user("1" * 80), B), b"{"]
    file = write(tmp_path / "data.jsonl", rows)
    findings = [one for found in lint(file, "chat", NOTHING, tokenizer, 60) for one in found]
    assert [(one.place.line, one.level, one.kind) for one in findings] == [
        (2, "warning", "truncated"),
        (3, "error", "length"),
        (4, "error", "json"),
    ]
    # Texts are split, not cut; prompts are no rows to train on.
    texts = write(tmp_path / "texts.jsonl", [{"text": "1" * 100}])
    assert list(lint(texts, "text", NOTHING, tokenizer, 60)) == [[]]
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "1" * 100}])
    assert list(lint(prompts, "prompts", NOTHING, tokenizer, 60)) == [[]]


def test_characters_that_do_not_come_back_are_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    foreign = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    foreign.normalizer = tokenizers.normalizers.NFKC()
    rows = [GOOD["chat"], chat(user("２个😀"), assistant("cafe\u0301 ①")), chat(A, B)]
    file = write(tmp_path / "data.jsonl", rows)
    findings = list(lint(file, "chat", NOTHING, ChatTokenizer(foreign), None))
    assert [len(one) for one in findings] == [0, 1, 0]
    assert findings[1][0].kind == "lossy"
    message = "the tokenizer does not give back U+0301 \u0301, U+2460 ①, U+FF12 ２"
    assert findings[1][0].message == message
    whole = ChatTokenizer.load(tokenizer_folder)
    assert list(lint(file, "chat", NOTHING, whole, None)) == [[], [], []]


def test_what_is_for_reinforcement_is_a_file_of_prompts(tmp_path: Path) -> None:
    asked = [user(text) for text in "abcd"]
    placeholder = chat(asked[0], assistant("空"))
    agent = chat(asked[1], assistant("")) | {"gt": ["5"]}
    openai = {"messages": [asked[2], assistant("<think>b</think>c")], "answer": "5"}
    rows = [placeholder, agent, openai, {"prompt": [asked[3]], "answer": 5}]
    file = write(tmp_path / "a.jsonl", rows)
    assert detect_format(file) == "prompts"
    assert found(file, "prompts") == []
    problems = read_problems(file, needs_answers=False, say=pytest.fail)
    assert [problem.messages for problem in problems] == [[turn] for turn in asked]
    assert [problem.answer for problem in problems] == [None, "5", "5", "5"]


def test_a_format_is_told_by_the_first_row_that_has_one(tmp_path: Path) -> None:
    assert detect_format(write(tmp_path / "a.jsonl", [b"{", {"x": 1}, GOOD["reason"]])) == "reason"
    assert detect_format(write(tmp_path / "b.jsonl", [{"chosen": 1, "prompt": 2}])) == "preference"
    with pytest.raises(UserError, match=r"c\.jsonl:1: its format cannot be told .* 'x'; there"):
        detect_format(write(tmp_path / "c.jsonl", [{"x": 1}] * 200))


def test_a_conversation_asks_each_of_its_questions_and_all() -> None:
    messages = parse_chat(chat(turn("system", "s"), A, B, user("c"), B))
    assert questions(messages) == ["a", "c", "a\nc"]
    assert questions([A, B]) == ["a"]
    assert questions([B]) == []


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["lint", *map(str, arguments)])


def table_rows(result: Result) -> list[list[str]]:
    lines = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"\xff\xfe{\x00}\x00", ":1: not UTF-8"), (b'[\n{"text": "a"},\n{"b": 2}\n]\n', ":1: ")],
)
def test_a_file_of_another_kind_is_told_as_what_it_is(
    content: bytes, why: str, tmp_path: Path
) -> None:
    file = tmp_path / "file.jsonl"
    file.write_bytes(content)
    result = run(file)
    assert result.exit_code == 1
    assert f"cannot be read is {file}{why}" in result.stdout


def test_exit_codes(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", [GOOD["chat"]])
    doubtful = write(tmp_path / "doubtful.jsonl", [GOOD["chat"]] * 2)
    bad = write(tmp_path / "bad.jsonl", [chat(A, B), chat(A)])
    assert run(good).exit_code == run(good, "--strict").exit_code == 0
    assert (run(doubtful).exit_code, run(doubtful, "--strict").exit_code) == (0, 1)
    assert run(bad, good).exit_code == run(good, bad).exit_code == 1


def test_findings_then_a_table_of_them(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", [chat(A, B), *[b"{"] * 5, chat(A), chat(A, B)])
    text = write(tmp_path / "text.jsonl", [{"text": "a"}])
    result = run(bad, text, "--show", 2)
    *lines, _header, _rule, _, _, _, _ = result.stdout.splitlines()
    assert [line.split(" ", 3)[:3] for line in lines if "rows that are read" not in line] == [
        [f"{bad}:2:", "error:", "json:"],
        [f"{bad}:3:", "error:", "json:"],
        [f"{bad}:7:", "error:", "order:"],
        [f"{bad}:8:", "warning:", "duplicate:"],
        [f"{bad}:", "error:", "json:"],
    ]
    assert f"{bad}: rows that are read: 2 minimind" in lines
    assert "json: 3 more (--show)" in lines[-2]
    assert table_rows(result) == [
        [str(bad), "chat", "error", "json", "5", "8", "62.50%"],
        [str(bad), "chat", "error", "order", "1", "8", "12.50%"],
        [str(bad), "chat", "warning", "duplicate", "1", "8", "12.50%"],
        [str(text), "text", "-", "nothing found", "0", "1", ""],
    ]


def test_keys_that_mean_something_elsewhere_are_warned_of_once_a_file(tmp_path: Path) -> None:
    rows = [chat(A, assistant(text)) for text in "abc"]
    harmless = write(tmp_path / "harmless.jsonl", [row | {"id": 1, "x\n": 2} for row in rows])
    result = run(harmless, "--strict")
    assert result.exit_code == 0
    said = f"{harmless}: keys that are not read: 'id' in 3 rows, first {harmless}:1; 'x\\n' in"
    assert said in result.stdout
    weighted = write(tmp_path / "weighted.jsonl", [rows[0], *[row | {"weight": 0} for row in rows]])
    result = run(weighted, "--show", 1)
    assert (result.exit_code, run(weighted, "--strict").exit_code) == (0, 1)
    assert [line for line in result.stdout.splitlines() if "unread:" in line] == [
        f"{weighted}: warning: unread: keys that are not read: 'weight' in 3 rows, first "
        f"{weighted}:2 (elsewhere how much it counts)"
    ]
    assert ["warning", "unread", "3", "4", "75.00%"] in [row[2:] for row in table_rows(result)]


def test_what_is_for_kto_is_no_file_of_prompts(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "label": True}
    result = run(write(tmp_path / "kto.jsonl", [row]))
    assert result.exit_code == 1
    assert "kto.jsonl:1: error: schema: the row is KTO's, half a pair with a label" in result.stdout


def test_a_file_that_cannot_be_read_is_an_error_and_the_others_are_checked(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl", [])
    missing, bad = tmp_path / "missing.jsonl", write(tmp_path / "bad.jsonl", [chat(A, B), b"{"])
    result = run(empty, missing, bad)
    assert result.exit_code == 1
    assert f"{empty}: error: unreadable: {empty} has no rows" in result.stdout
    assert f"{missing}: error: unreadable: {missing} is missing" in result.stdout
    assert [row[3] for row in table_rows(result)] == ["unreadable", "unreadable", "json"]


def test_the_command_passes_its_options_on(
    tmp_path: Path, problems: Path, tokenizer_folder: Path
) -> None:
    rows = [chat(user(STORY), B), chat(user(STORY + "!"), B), chat(A, assistant("2" * 200))]
    file = write(tmp_path / "data.jsonl", rows)
    result = run(
        *(file, "--against", problems, "--tokenizer", tokenizer_folder),
        *("--max-length", 150, "--format", "chat"),
    )
    assert result.exit_code == 0
    kinds = [row[3] for row in table_rows(result)]
    assert kinds == ["near_overlap", "overlap", "truncated"]
    assert run(file, "--format", "text").exit_code == 1
    result = run(file, "--max-length", 60)
    assert (result.exit_code, result.stderr.strip()) == (
        1,
        "minimind: --max-length counts tokens; give --tokenizer, too.",
    )


def test_memory_grows_by_hashes_alone(tmp_path: Path) -> None:
    """Of 20,000 rows of 2 kB each, 40 MB, a hash and a place of each are kept, and a batch."""
    file, num_rows = tmp_path / "data.jsonl", 20_000
    filling = "1" * 2000
    with file.open("w") as out:
        for number in range(num_rows):
            out.write(f'{{"text": "{number} {filling}"}}\n')

    def peak_of(rows: Iterator[Any]) -> int:
        tracemalloc.reset_peak()
        assert sum(1 for _ in rows) == num_rows
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        peak = peak_of(lint(file, "text", NOTHING, None, None))
    finally:
        tracemalloc.stop()
    assert peak - before < 8 * 2**20
