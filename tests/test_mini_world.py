"""The built-in data, judged by reading the written text back.

The reader below knows the phrases but none of the generator's objects, so it would notice a story
that does not say what its answer says, and a held-out sum in any training text.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from minimind.mini_world.rows import MiniWorldConfig, write_mini_world
from minimind.mini_world.stories import CHINESE, ENGLISH
from stages.mini_world import app

World = dict[str, list[dict[str, Any]]]  # rows of each file

TRAINING_FILES = (*("tokenizer", "pretrain", "sft", "dpo", "reason", "distill", "lora", "prompts"),)
ALL_FILES = (*TRAINING_FILES, "eval", "eval_text")
SECTION: dict[str, Any] = {
    "seed": 7,
    "held_out_seed": 7,
    "max_value": 99,
    "held_out_percent": 10,
    "num_tokenizer": 400,
    "num_pretrain": 600,
    "num_sft": 1000,
    "num_dpo": 1000,
    "num_reason": 1000,
    "num_distill": 800,
    "num_lora": 600,
    "num_prompts": 600,
    "num_eval_per_level": [480, 200, 200, 80],
    "num_eval_text": 60,
    "num_eval_equation": 200,
    "num_eval_extraction": 120,
    "sft_level_weights": [1, 1, 1, 0],
    "sft_full_shares": [0.7, 0.3],
    "sft_two_turn_share": 0.25,
    "sft_equation_share": 0.3,
    "dpo_level_weights": [1, 1, 1, 0],
    "dpo_bare_share": 0.6,
    "reason_level_weights": [20, 30, 30, 20],
    "reason_shortcut_share": 0.6,
    "distill_wrong_share": 0.4,
    "lora_level_weights": [2, 1, 1, 0],
    "prompts_level_weights": [0, 1, 1, 2],
}
SIZES = [key for key in SECTION if key.startswith("num_")]


def sizes_of(number: int) -> dict[str, Any]:
    return dict.fromkeys(SIZES, number) | {"num_eval_per_level": [number] * 4}


def config(**changes: Any) -> MiniWorldConfig:
    return MiniWorldConfig.model_validate(SECTION | changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("world")
    write_mini_world(directory, config())
    return read_all(directory)


@pytest.fixture(scope="module")
def crowded_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Few values and much text: a leak of held-out problems would be certain to show."""
    directory = tmp_path_factory.mktemp("crowded")
    changes = {"max_value": 25, "num_pretrain": 4000, "num_reason": 3000}
    changes |= {"num_eval_per_level": [72, 40, 40, 40], "num_distill": 3000}
    changes |= {"num_eval_equation": 40, "num_eval_text": 150}
    write_mini_world(directory, config(**changes))
    return read_all(directory)


def read_all(directory: Path) -> World:
    return {
        name: [json.loads(line) for line in (directory / f"{name}.jsonl").open(encoding="utf-8")]
        for name in ALL_FILES
    }


# ---- the reader ----


class ReadStep(NamedTuple):
    before: int
    operator: str
    amount: int
    after: int


ReadProblem = tuple[ReadStep, ...]

GAIN = re.compile(r"\w+ (?:buys|finds|gets|wins) (\d+)|(?:又买了|捡到|朋友送来|又得到)(\d+)")
LOSS = re.compile(r"\w+ (?:gives away|uses|loses|hands) (\d+)|(?:送出|用掉|丢了|分给同学)(\d+)")
BOXES = re.compile(r"\w+ has (\d+) boxes with (\d+) \w+ each|\w+有(\d+)盒\w+，每盒(\d+)\w")
START = re.compile(r"\w+ has (\d+) \w+|\w+有(\d+)\w+")
RESULT = re.compile(r"\w+ now has (\d+) \w+\.|\w+现在有(\d+)\w+。")
# The same name, number and thing twice, and nothing in between.
NO_EVENTS = re.compile(r"(\w+) has (\d+ \w+)\. \1 now has \2\.|(\w+)有(\d+\w+)。\3现在有\4。")
# What came of a story, in words: fewer, as many or more than at the start.
OUTCOME = re.compile(
    r"(?P<name>\w+) now has (?P<en>fewer|as many|more) (?P<item>\w+) (?:than|as) before\.|"
    r"(?P<chinese_name>\w+)现在有的(?P<chinese_item>\w+)(?P<zh>比原来少|和原来一样多|比原来多)。"
)
OUTCOMES = {"fewer": -1, "as many": 0, "more": 1, "比原来少": -1, "和原来一样多": 0, "比原来多": 1}
THINGS = [item for language in (ENGLISH, CHINESE) for item, _ in language.items]
SUM_QUESTION = re.compile(r"What is (\d+[-+*]\d+)\?|(\d+[-+*]\d+)等于几？")
EXTRACTION_REQUEST = re.compile(r"(.+?) ?(?:Who has what\?|是谁的什么？)")
EXTRACTION = re.compile(r"([A-Z]\w+) has ([a-z]+)\.|([^的]+)的([^的]+)。")
EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")
COMPARISON = re.compile(r"(\d+)(?: is |比)(?:(\d+)大|(\d+)小|more than (\d+)|less than (\d+))[.。]")


def numbers(match: re.Match[str]) -> list[int]:
    return [int(group) for group in match.groups() if group is not None]


def calculate(before: int, operator: str, amount: int) -> int:
    return {"+": before + amount, "-": before - amount, "*": before * amount}[operator]


def read_story(text: str) -> ReadProblem:
    """The problem that a story tells, computed from its numbers; a question may follow."""
    sentences = [s for s in re.split(r"(?<=\.) |(?<=。)", text) if s and s[-1] not in "?？"]
    steps: list[ReadStep] = []

    def add(operator: str, amount: int) -> None:
        before = steps[-1].after if steps else start
        steps.append(ReadStep(before, operator, amount, calculate(before, operator, amount)))

    if boxes := BOXES.match(sentences[0]):
        start, each = numbers(boxes)
        add("*", each)
    else:
        opening = START.match(sentences[0])
        assert opening, text
        (start,) = numbers(opening)
    for sentence in sentences[1:]:
        gain, loss = GAIN.match(sentence), LOSS.match(sentence)
        event = gain or loss
        assert event, text
        add("+" if gain else "-", *numbers(event))
    assert sum(len(re.findall(r"\d+", s)) for s in sentences) == len(steps) + 1, text
    return tuple(steps)


def read_question(text: str) -> ReadProblem:
    """What a user's turn or a prompt asks: for a sum, who has what, or about a story."""
    if asked := SUM_QUESTION.fullmatch(text):
        (asked_for,) = [group for group in asked.groups() if group]
        before, operator, amount = re.split(r"([-+*])", asked_for)
        after = calculate(int(before), operator, int(amount))
        return (ReadStep(int(before), operator, int(amount), after),)
    if request := EXTRACTION_REQUEST.fullmatch(text):
        return read_story(request[1])
    return read_story(text)


def read_equations(text: str) -> ReadProblem:
    steps = tuple(ReadStep(int(a), op, int(b), int(c)) for a, op, b, c in EQUATION.findall(text))
    assert steps, text
    return steps


def read_line(line: str) -> ReadProblem | None:
    """The problem in a line of raw text, or None for a comparison or a story without events."""
    if "=" in line:
        assert EQUATION.sub("", line).strip(";") == "", line
        return read_equations(line)
    if comparison := COMPARISON.fullmatch(line):
        a, b = numbers(comparison)
        assert (a > b) == ("more" in line or "大" in line), line
        return None
    if NO_EVENTS.fullmatch(line):
        return None
    if outcome := OUTCOME.search(line):
        assert outcome.end() == len(line), line
        problem = read_story(line[: outcome.start()].rstrip(" "))
        said = OUTCOMES[outcome["en"] or outcome["zh"]]
        # Boxes are opened before anything happens.
        first = problem[0]
        start = first.after if first.operator == "*" else first.before
        end = problem[-1].after
        assert (end > start) - (end < start) == said, line
        name, item = outcome["name"] or outcome["chinese_name"], outcome["item"]
        assert line.startswith(name), line
        assert (item or outcome["chinese_item"]) in line[: outcome.start()], line
        return problem
    return read_story(line)


def read_document(text: str) -> Iterator[ReadProblem]:
    for line in text.split("\n"):
        if problem := read_line(line):
            yield problem


def read_row(row: dict[str, Any]) -> Iterator[ReadProblem]:
    """Every problem in a row of any training file, from stories and from equations."""
    if "conversations" in row:
        texts = [turn["content"] for turn in row["conversations"]]
        yield from map(read_question, texts[::2])
        yield from (read_equations(text) for text in texts[1::2] if "=" in text)
    elif "prompt" in row:
        yield read_story(row["prompt"])
    elif row["text"].startswith("user\n"):
        _, prompt, _, *reply = row["text"].split("\n")
        yield read_question(prompt)
        yield from (read_equations(text) for text in reply if "=" in text)
    else:
        yield from read_document(row["text"])


def stories_of(world: World) -> list[dict[str, Any]]:
    return [row for row in world["eval"] if "task" not in row]


def of_task(world: World, task: str) -> list[dict[str, Any]]:
    return [row for row in world["eval"] if row.get("task") == task]


def read_evaluated(row: dict[str, Any]) -> ReadProblem:
    """The problem of a row of eval.jsonl."""
    if row.get("task") == "equation":
        return read_equations(row["prompt"] + row["answer"])
    return read_question(row["prompt"])


def training_problems(world: World, leave_out: str = "") -> Iterator[ReadProblem]:
    for name in set(TRAINING_FILES) - {leave_out}:
        for row in world[name]:
            yield from read_row(row)


def parts(problem: ReadProblem) -> Iterator[ReadProblem]:
    """All runs of successive steps, the single ones and the whole included."""
    for start in range(len(problem)):
        for end in range(start + 1, len(problem) + 1):
            yield problem[start:end]


def key(problem: ReadProblem) -> str:
    """What makes two problems the same: 3+5-2 and 5+3-2 are."""
    first = problem[0]
    pair = [first.before, first.amount]
    if first.operator in "+*":
        pair.sort()
    rest = "".join(f"{step.operator}{step.amount}" for step in problem[1:])
    return f"{pair[0]}{first.operator}{pair[1]}{rest}"


def is_held_out(problem: ReadProblem) -> bool:
    """The rule, spelled out again: it must not move when the generator is rewritten."""
    if len(problem) == 1 and problem[0].operator == "*":
        return False
    return int(hashlib.sha256(key(problem).encode()).hexdigest()[:16], 16) % 100 < 10


# ---- the files ----


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_ones(tmp_path: Path) -> None:
    sizes = sizes_of(100)
    seeds = {"a": (7, 7), "b": (7, 7), "c": (8, 7), "d": (7, 8)}
    for directory, (seed, held_out_seed) in seeds.items():
        seeded = config(**sizes, seed=seed, held_out_seed=held_out_seed)
        write_mini_world(tmp_path / directory, seeded)
    for name in ALL_FILES:
        a, b, c, d = ((tmp_path / d / f"{name}.jsonl").read_bytes() for d in seeds)
        assert a == b
        assert (a != c) == (name in TRAINING_FILES)
        assert (a != d) == (name not in TRAINING_FILES)
        assert b"\r" not in a
        assert b"\\u" not in a
        assert a.endswith(b"}\n")


@pytest.mark.parametrize(
    ("size", "changed"),
    [(f"num_{name}", name) for name in (*TRAINING_FILES, "eval_text")]
    + [(f"num_eval_{what}", "eval") for what in ("equation", "extraction")],
)
def test_a_changed_size_changes_one_file_only(tmp_path: Path, size: str, changed: str) -> None:
    sizes = sizes_of(20)
    write_mini_world(tmp_path / "before", config(**sizes))
    write_mini_world(tmp_path / "after", config(**sizes | {size: 30}))
    for name in ALL_FILES:
        before, after = ((tmp_path / d / f"{name}.jsonl").read_text() for d in ("before", "after"))
        assert (before == after) == (name != changed), name
        if name == changed and name != "eval":
            assert after.startswith(before)


def test_the_stage_writes_all_files_and_their_sizes(tmp_path: Path) -> None:
    result = run_stage(tmp_path, SECTION)
    assert result.exit_code == 0, result.output
    num_rows = {name: len(rows) for name, rows in read_all(tmp_path / "data").items()}
    assert num_rows == {
        "tokenizer": 400,
        "pretrain": 600,
        "sft": 1000,
        "dpo": 1000,
        "reason": 1000,
        "distill": 800,
        "lora": 600,
        "prompts": 600,
        "eval": 1280,
        "eval_text": 60,
    }
    metrics = json.loads((tmp_path / "metrics/mini_world.json").read_text())
    assert metrics == {"mini_world": num_rows}


def run_stage(directory: Path, section: dict[str, Any]) -> Any:
    params = directory / "params.yaml"
    params.write_text(yaml.safe_dump({"mini_world": section}))
    paths = [f"--output={directory}/data", f"--metrics={directory}/metrics/mini_world.json"]
    return CliRunner().invoke(app, [*paths, f"--params={params}"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_value": 5}, "mini_world.max_value is 5; it should be greater than or equal to 20"),
        ({"num_sft": 0}, "mini_world.num_sft is 0; it should be greater than 0"),
        ({"num_stf": 3}, "mini_world.num_stf is not a known key"),
        ({"held_out_percent": 60}, "it should be less than or equal to 30"),
        ({"dpo_bare_share": 1.5}, "it should be less than or equal to 1"),
        ({"reason_level_weights": [0, 0, 0, 0]}, "at least one level is wanted"),
        ({"reason_level_weights": [1, 1, 1]}, "mini_world.reason_level_weights.3 is missing"),
        ({"num_eval_per_level": [9000, 1, 1, 1]}, "calls for 1500 held-out problems of level 1"),
        ({"num_eval_per_level": [9000, 1, 1, 1]}, "were found with max_value 99"),
        ({"num_eval_per_level": [9, 9, 9]}, "mini_world.num_eval_per_level.3 is missing"),
        ({"num_eval_equation": 5000}, "mini_world.num_eval_equation calls for 5000 held-out"),
        ({"num_eval_per_level": [9000, 1, 1, 1]}, "problems of level 1, each told 6 times, but"),
        ({"distill_wrong_share": -0.1}, "it should be greater than or equal to 0"),
        ({"reason_shortcut_share": True}, "is True; it should not be true or false"),
        ({"sft_level_weights": [True, 1, 1, 0]}, "it should not be true or false"),
        ({"sft_level_weights": [1e308, 1e308, 1, 1]}, "it should be 0, or between"),
    ],
)
def test_a_bad_parameter_is_one_clear_line(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    result = run_stage(tmp_path, SECTION | changes)
    assert result.exit_code == 1
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "metrics").exists()


# ---- held out ----


@pytest.mark.parametrize("which", ["world", "crowded_world"])
def test_no_training_text_contains_an_evaluated_problem(
    which: str, request: pytest.FixtureRequest
) -> None:
    rows = request.getfixturevalue(which)
    evaluated = {key(read_evaluated(row)) for row in rows["eval"]}
    evaluated |= {
        key(problem) for row in rows["eval_text"] for problem in read_document(row["text"])
    }
    assert len(evaluated) > 150
    trained = {key(part) for problem in training_problems(rows) for part in parts(problem)}
    assert not evaluated & trained


@pytest.mark.parametrize("which", ["world", "crowded_world"])
def test_the_hash_alone_decides_what_is_held_out(
    which: str, request: pytest.FixtureRequest
) -> None:
    rows = request.getfixturevalue(which)
    for problem in training_problems(rows):
        assert not any(is_held_out(part) for part in parts(problem)), problem
    evaluated = [read_evaluated(row) for row in rows["eval"]]
    evaluated += [p for row in rows["eval_text"] for p in read_document(row["text"])]
    for problem in evaluated:
        assert is_held_out(problem), problem
        assert len(problem) == 1 or not any(is_held_out((step,)) for step in problem), problem


def test_comparisons_in_the_evaluated_text_are_held_out_too(
    crowded_world: World,
) -> None:
    def compared(*names: str) -> set[frozenset[int]]:
        lines = [
            line for n in names for row in crowded_world[n] for line in row["text"].split("\n")
        ]
        matches = [match for line in lines if (match := COMPARISON.fullmatch(line))]
        return {frozenset(numbers(match)) for match in matches}

    evaluated, trained = compared("eval_text"), compared("pretrain", "tokenizer")
    assert len(evaluated) > 15
    assert len(trained) > 200
    assert not evaluated & trained


# ---- contents ----


def test_every_number_lies_between_1_and_max_value(world: World) -> None:
    for name in (*TRAINING_FILES, "eval_text"):
        text = json.dumps(world[name], ensure_ascii=False)
        values = [int(number) for number in re.findall(r"\d+", text)]
        assert min(values) >= 1, name
        assert max(values) == 99, name
    for row in world["eval"]:
        texts = [row["prompt"], row["answer"], row.get("full", ""), *row.get("choices", [])]
        numbers_of_row = re.findall(r"\d+", " ".join(texts))
        assert all(1 <= int(number) <= 99 for number in numbers_of_row)


def test_equations_are_right_and_follow_from_one_another(
    world: World,
) -> None:
    num_equations = 0
    for problem in training_problems(world, leave_out="distill"):  # whose thoughts are careless
        for step in problem:
            assert step.after == calculate(step.before, step.operator, step.amount)
            num_equations += 1
        for step, following in pairwise(problem):
            assert following.before == step.after
            assert following.operator != "*"
        if problem[0].operator == "*":
            assert max(problem[0].before, problem[0].amount) <= 9
    assert num_equations > 5000


def test_sft_answers_are_right_in_two_styles(world: World) -> None:
    styles: Counter[str] = Counter()
    styles_by_question: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    turns_of_chats: Counter[int] = Counter()
    num_sums = 0
    for row in world["sft"]:
        turns = row["conversations"]
        turns_of_chats[len(turns) // 2] += 1
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert len({is_chinese(turn["content"]) for turn in turns[::2]}) == 1
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            problem = read_question(question["content"])
            right = problem[-1].after
            if SUM_QUESTION.fullmatch(question["content"]):
                assert read_equations(answer["content"]) == problem
                assert EQUATION.fullmatch(answer["content"])
                num_sums += 1
                continue
            full = RESULT.fullmatch(answer["content"])
            styles["full" if full else "bare"] += 1
            names_owner = bool(re.search(r"does \w+ have|一共", question["content"]))
            styles_by_question[names_owner]["full" if full else "bare"] += 1
            assert (numbers(full) if full else [int(answer["content"])]) == [right]
    assert share(styles, "full") == pytest.approx(0.5, abs=0.05)
    assert share(styles_by_question[True], "full") == pytest.approx(0.7, abs=0.05)
    assert share(styles_by_question[False], "full") == pytest.approx(0.3, abs=0.05)
    assert share(turns_of_chats, 2) == pytest.approx(0.25, abs=0.05)
    assert set(turns_of_chats) == {1, 2}
    num_turns = turns_of_chats[1] + 2 * turns_of_chats[2]
    assert num_sums / num_turns == pytest.approx(0.3, abs=0.05)


def test_dpo_rejects_bare_and_wrong_numbers(world: World) -> None:
    kinds: Counter[str] = Counter()
    for row in world["dpo"]:
        right = read_story(row["prompt"])[-1].after
        full = RESULT.fullmatch(row["chosen"])
        assert full
        assert numbers(full) == [right]
        if row["rejected"] == str(right):
            kinds["bare"] += 1
            continue
        kinds["wrong"] += 1
        wrong = RESULT.fullmatch(row["rejected"])
        assert wrong
        (number,) = numbers(wrong)
        assert 1 <= number <= 99
        assert number != right
        assert row["rejected"].replace(str(number), "#") == row["chosen"].replace(str(right), "#")
    assert share(kinds, "bare") == pytest.approx(0.6, abs=0.05)


def test_reason_thinks_the_steps_of_the_story(world: World) -> None:
    levels: Counter[int] = Counter()
    left_out: Counter[bool] = Counter()
    for row in world["reason"]:
        question, answer = (turn["content"] for turn in row["conversations"])
        problem = read_story(question)
        reply = re.fullmatch(r"<think>(.+)</think>\n<answer>(\d+)</answer>", answer)
        assert reply
        thought = read_equations(reply[1])
        if len(problem) == 4:
            left_out[len(thought) == 3] += 1
            assert thought in (problem, problem[:-1])
        else:
            assert thought == problem
        assert int(reply[2]) == thought[-1].after
        separator = "，" if is_chinese(question) else ", "
        equations = reply[1].removeprefix("先算").split(separator)
        assert reply[1].startswith("先算") == is_chinese(question)
        assert all(EQUATION.fullmatch(equation) for equation in equations)
        levels[len(problem)] += 1
    for level, expected in zip((1, 2, 3, 4), (0.2, 0.3, 0.3, 0.2), strict=True):
        assert share(levels, level) == pytest.approx(expected, abs=0.05)
    assert share(left_out, True) == pytest.approx(0.6, abs=0.1)


def test_distill_thinks_carelessly(world: World) -> None:
    wrong = right = 0
    for row in world["distill"]:
        question, reply = (turn["content"] for turn in row["conversations"])
        told = read_story(question)
        match = re.fullmatch(r"<think>(.+)</think>\n<answer>(\d+)</answer>", reply)
        assert match, reply
        thought = read_equations(match[1])
        assert [step[1:3] for step in thought] == [step[1:3] for step in told]
        assert thought[0].before == told[0].before
        assert all(before.after == step.before for before, step in pairwise(thought))
        assert all(2 <= step.after <= 99 for step in thought)
        assert int(match[2]) == thought[-1].after
        for step in thought:
            is_right = step.after == calculate(step.before, step.operator, step.amount)
            wrong, right = wrong + (not is_right), right + is_right
    # A little less than the parameter: where a slip would leave the bounds, there is none.
    assert 0.3 < wrong / (wrong + right) < 0.42


def test_careful_thoughts_are_those_of_reason(tmp_path: Path) -> None:
    write_mini_world(tmp_path, config(**sizes_of(40), distill_wrong_share=0.0))
    for row in read_all(tmp_path)["distill"]:
        question, reply = (turn["content"] for turn in row["conversations"])
        assert read_equations(reply) == read_story(question)


def test_lora_says_who_has_what(world: World) -> None:
    levels: Counter[int] = Counter()
    for row in world["lora"]:
        request, reply = (turn["content"] for turn in row["conversations"])
        require_extraction(request, reply)
        levels[len(read_question(request))] += 1
    for level, expected in zip((1, 2, 3, 4), (0.5, 0.25, 0.25, 0.0), strict=True):
        assert share(levels, level) == pytest.approx(expected, abs=0.06)
    assert levels[4] == 0


def require_extraction(request: str, reply: str) -> None:
    """The reply names the story's person and thing, in the story's language."""
    assert EXTRACTION_REQUEST.fullmatch(request), request
    match = EXTRACTION.fullmatch(reply)
    assert match, reply
    name, item = (group for group in match.groups() if group)
    assert request.startswith(name)
    assert item in request
    assert is_chinese(reply) == is_chinese(request)


def test_prompts_carry_answer_and_level(world: World) -> None:
    levels: Counter[int] = Counter()
    for row in world["prompts"]:
        problem = read_story(row["prompt"])
        assert row["answer"] == str(problem[-1].after)
        assert row["level"] == len(problem)
        levels[row["level"]] += 1
    assert levels[1] == 0
    assert share(levels, 4) == pytest.approx(0.5, abs=0.05)


def test_documents_mix_all_kinds_of_lines_in_one_language(
    world: World,
) -> None:
    kinds: Counter[str] = Counter()
    outcomes: set[str] = set()
    for row in world["pretrain"] + world["eval_text"]:
        lines = row["text"].split("\n")
        assert 5 <= len(lines) <= 8
        worded = [line for line in lines if "=" not in line]
        assert len({is_chinese(line) for line in worded}) <= 1
        assert len({thing for thing in THINGS if thing in row["text"]}) <= 1
        for line in lines:
            problem = read_line(line)
            if problem is None:
                kinds["no_events" if NO_EVENTS.fullmatch(line) else "comparison"] += 1
            elif "=" in line:
                kinds["equation" if len(problem) == 1 else "chain"] += 1
            elif line[-1] in "?？":
                kinds["question"] += 1
            else:
                outcomes.add(outcome_said(line))
                kinds["outcome"] += 1
    expected = {"equation": 40, "chain": 15, "question": 10, "outcome": 20, "no_events": 10}
    for kind, percent in expected.items():
        assert share(kinds, kind) == pytest.approx(percent / 100, abs=0.03)
    assert set(kinds) == {*expected, "comparison"}
    assert outcomes == set(OUTCOMES), "as many as before too: what was gained can be lost again"


def outcome_said(line: str) -> str:
    outcome = OUTCOME.search(line)
    assert outcome, line
    return outcome["en"] or outcome["zh"]


def test_pretraining_never_tells_the_result_of_events(world: World) -> None:
    for row in world["pretrain"]:
        for line in row["text"].split("\n"):
            if RESULT.search(line):
                assert NO_EVENTS.fullmatch(line)


@pytest.mark.parametrize("name", ["sft", "dpo", "reason", "lora", "prompts", "eval"])
def test_half_of_the_questions_are_chinese(world: World, name: str) -> None:
    rows = [row for row in world[name] if row.get("task") != "equation"]  # which have no language
    prompts = [row.get("prompt") or row["conversations"][0]["content"] for row in rows]
    assert sum(map(is_chinese, prompts)) == len(prompts) / 2


def test_the_tokenizer_sees_every_word_of_the_other_files(
    world: World,
) -> None:
    def words(texts: list[str]) -> set[str]:
        return {word for text in texts for word in re.findall(r"[A-Za-z]+|[^A-Za-z\s]", text)}

    seen = words([row["text"] for row in world["tokenizer"]])
    assert {"user", "assistant"} <= seen
    # Tags are tokens of their own; pieces of them would waste vocabulary.
    assert not {"think", "answer"} & seen
    for name in ("sft", "reason", "distill", "lora"):
        turns = [turn["content"] for row in world[name] for turn in row["conversations"]]
        assert words([re.sub(r"</?(think|answer)>", "", turn) for turn in turns]) <= seen
    assert words([row["text"] for row in world["pretrain"]]) <= seen
    assert words([row["prompt"] + row.get("full", "") for row in world["eval"]]) <= seen


def test_eval_rows_are_right_and_distinct(world: World) -> None:
    rows = stories_of(world)
    assert Counter(row["level"] for row in rows) == {1: 480, 2: 200, 3: 200, 4: 80}
    assert len({row["id"] for row in world["eval"]}) == len(world["eval"])
    # Of level 1 there are few problems, so each is told six times, half in each language.
    tellings: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        assert row["id"].startswith(row["problem"])
        tellings[row["problem"]].append((read_story(row["prompt"]), row["language"]))
    assert len({row["prompt"] for row in rows}) == len(rows)
    problems = [told[0][0] for told in tellings.values()]
    assert len(set(problems)) == len(problems)
    for told in tellings.values():
        (problem,) = {problem for problem, _ in told}
        languages = Counter(language for _, language in told)
        assert languages == {"en": 3, "zh": 3} if len(problem) == 1 else len(told) == 1
    for row in rows:
        problem = read_story(row["prompt"])
        right = str(problem[-1].after)
        assert row["level"] == len(problem)
        assert row["language"] == ("zh" if is_chinese(row["prompt"]) else "en")
        assert row["answer"] == right
        assert row["prompt"].startswith(row["completion_prompt"])
        assert row["completion_prompt"][-1] in ".。"
        full = RESULT.fullmatch(row["full"])
        assert full
        assert full.group(0) == row["full"]
        assert numbers(full) == [int(right)]


def test_evaluated_equations_are_right_and_distinct(world: World) -> None:
    rows = of_task(world, "equation")
    assert len(rows) == 200
    assert len({row["prompt"] for row in rows}) == len(rows)
    operators: Counter[str] = Counter()
    for row in rows:
        (step,) = read_evaluated(row)
        assert row["prompt"] == f"{step.before}{step.operator}{step.amount}="
        assert step.after == calculate(step.before, step.operator, step.amount)
        assert row["answer"] == str(step.after)
        assert row["as_text"] is True and "level" not in row
        operators[step.operator] += 1
    assert set(operators) == {"+", "-"}, "products are never held out, being the times table"


def test_evaluated_extractions_are_right(world: World) -> None:
    rows = of_task(world, "extraction")
    assert len(rows) == 120
    levels: Counter[tuple[str, int]] = Counter()
    for row in rows:
        require_extraction(row["prompt"], row["answer"])
        assert row["language"] == ("zh" if is_chinese(row["prompt"]) else "en")
        levels[row["language"], len(read_evaluated(row))] += 1
    assert levels == {(code, level): 20 for code in ("en", "zh") for level in (1, 2, 3)}


def test_the_completion_prompt_is_the_story_without_its_question(world: World) -> None:
    for row in stories_of(world):
        assert read_story(row["completion_prompt"]) == read_story(row["prompt"])
        assert not re.search("[?？]", row["completion_prompt"])


@pytest.mark.parametrize("kind", ["stories", "equations"])
def test_choices_betray_nothing(world: World, kind: str) -> None:
    rows = stories_of(world) if kind == "stories" else of_task(world, "equation")
    ranks: Counter[int] = Counter()
    labels: Counter[tuple[str, int]] = Counter()
    # Of the six tellings of a problem of level 1, one in each language.
    assert all(("choices" in r) == (not re.fullmatch(r"l1-\d+-[2-5]", r["id"])) for r in rows)
    rows = [row for row in rows if "choices" in row]
    for row in rows:
        choices = [int(choice) for choice in row["choices"]]
        assert len(set(choices)) == 4
        assert row["choices"][row["label"]] == row["answer"]
        labels[row.get("language", ""), row["label"]] += 1
        ranks[sorted(choices).index(int(row["answer"]))] += 1
    assert set(labels.values()) == {len(rows) // len(labels)}
    assert len(labels) == (8 if kind == "stories" else 4)
    for rank in range(4):
        assert share(ranks, rank) == pytest.approx(0.25, abs=0.05 if kind == "stories" else 0.1)


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def share(counts: Counter[Any], what: Any) -> float:
    return counts[what] / counts.total()
