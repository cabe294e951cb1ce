"""The world of tools: what they say, chats about them, and how calls and answers are scored."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from minimind.chat.calls import Call, calls_in
from minimind.chat.template import Message, turns
from minimind.chat.tokenizer import ChatTokenizer
from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.evaluation.evaluate import evaluate
from minimind.mini_world.tool_rows import BY_HAND, NO_TOOL, ToolWorldConfig, write_tool_world
from minimind.mini_world.tools import CITIES, DAYS, SPECS, TOOLS, run_tool
from minimind.model.generate import Completions
from minimind.orchestrate.graph import load_graph
from minimind.report.explain import outdated
from minimind.tasks.problem import Problem
from minimind.tasks.task import task_of
from tests.graph import ROOT
from tests.tiny import tiny_model, tiny_tokenizer

TASK = task_of("tool_use")


def gold(call: Call, said: str) -> str:
    return f"<tool_call>\n{json.dumps(call._asdict())}\n</tool_call>\n{said}"


# ---- what tools say ----


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("calculator", {"expression": "2+3*4"}, "14"),
        ("calculator", {"expression": " (7 - 9) / 4"}, "-0.5"),
        ("calculator", {"expression": "1/3"}, "1/3"),
        ("clock", {"time": "23:50", "from": "London", "to": "德里"}, "05:20"),
        ("convert", {"value": 250, "from": "cm", "to": "m"}, "2.5"),
        ("convert", {"value": "3", "from": "h", "to": "s"}, "10800"),
    ],
)
def test_a_tool_says(name: str, arguments: dict[str, Any], said: str) -> None:
    assert run_tool(name, arguments) == said


def test_the_weather_is_the_same_in_both_languages() -> None:
    english = json.loads(run_tool("weather", {"city": "Oslo", "day": "Friday"}))
    chinese = json.loads(run_tool("weather", {"city": "奥斯陆", "day": "星期五"}))
    assert (english["sky"], chinese["sky"]) == ("snowy", "有雪")
    assert english["celsius"] == chinese["celsius"]


BAD_CALLS = [
    ("nothing", {}),
    ("calculator", {}),
    ("calculator", {"expression": "9**9**9"}),
    ("calculator", {"expression": "__import__('os')"}),
    ("calculator", {"expression": "1/0"}),
    ("calculator", {"expression": "True+1"}),
    ("calculator", {"expression": "1" * 200}),
    ("calculator", {"expression": ["2+3"]}),
    ("clock", {"time": "noon", "from": "London", "to": "Paris"}),
    ("clock", {"time": "09:00", "from": "London"}),
    ("convert", {"value": 3, "from": "km", "to": "kg"}),
    ("convert", {"value": "much", "from": "km", "to": "m"}),
    ("weather", {"city": "Atlantis", "day": "Monday"}),
    ("weather", {"city": "Oslo", "day": 3}),
]


@pytest.mark.parametrize(("name", "arguments"), BAD_CALLS)
def test_a_call_that_cannot_be_answered_is_told_so(name: str, arguments: dict[str, Any]) -> None:
    assert run_tool(name, arguments).startswith("error: ")


@given(
    st.sampled_from([*TOOLS]),
    st.dictionaries(st.text(max_size=8) | st.sampled_from(["expression", "city"]), st.text()),
)
def test_no_call_is_an_exception(name: str, arguments: dict[str, str]) -> None:
    assert isinstance(run_tool(name, arguments), str)


# ---- calls ----


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"name": "add", "arguments": {"a": 2}}', Call("add", {"a": 2})),
        ('\n{"name": "add", "arguments": "{\\"a\\": 2}"}\n', Call("add", {"a": 2})),
        ('{"name": "add"}', Call("add", {})),
        ('{"name": 3}', None),
        ('{"name": "add", "arguments": [2]}', None),
        ('["add"]', None),
        ("add", None),
    ],
)
def test_calls_are_read(text: str, found: Call | None) -> None:
    assert calls_in(f"so <tool_call>{text}</tool_call>!") == [found or Call("", {})]


def test_calls_are_what_the_template_writes() -> None:
    made = [Call("add", {"数": "<2>", "b": [1, None]}), Call("x", {})]
    said: Message = {"role": "assistant", "content": "", "tool_calls": [c._asdict() for c in made]}
    (turn,) = turns([said])
    assert calls_in(turn.text) == made


# ---- scores ----

SUM = Call("calculator", {"expression": "37*12"})
RIGHT = gold(SUM, "444")


@pytest.mark.parametrize(
    ("output", "tool", "calls", "answer"),
    [
        (RIGHT, True, True, True),
        (gold(SUM, "It is 444."), True, True, True),
        (gold(Call("calculator", {"expression": "12 * 37"}), "It is 444."), True, True, True),
        (gold(Call("calculator", {"expression": "37+12"}), "It is 49."), True, False, False),
        (gold(Call("calculator", {"expression": "444"}), "It is 444."), True, False, True),
        (gold(Call("clock", {"expression": "37*12"}), "444"), False, False, True),
        (f"{gold(SUM, '')}\n{RIGHT}", False, False, True),
        ("It is 444.", False, False, True),
        (gold(SUM, ""), True, True, False),
        (gold(SUM, "444 or 445"), True, True, False),
        ("<tool_call>37*12</tool_call>444", False, False, True),
        (f"<think>{gold(SUM, '445')}</think>\n\n{RIGHT}", True, True, True),
        ("", False, False, False),
    ],
)
def test_calls_and_answers_are_scored(output: str, tool: bool, calls: bool, answer: bool) -> None:
    problem = Problem.of("37*12?", RIGHT)
    expected = problem.expected
    assert TASK.parts(expected, output) == {"tool_choice": tool, "calls": calls}
    assert TASK.score(expected, output).correct == answer


@pytest.mark.parametrize(
    ("expected", "said", "is_right"),
    [
        ("16:40", "It is 16:40 in Tokyo.", True),
        ("16:40", "16:40 or 17:40", False),
        ("sunny", "It will be Sunny.", True),
        ("sunny", "sunny or rainy", False),
        ("有雨", "天气有雨。", True),
        (NO_TOOL[0], "I have no tool for that", True),
        (NO_TOOL[1], "没有能用的工具。", True),
        (NO_TOOL[0], "It is 5.", False),
    ],
)
def test_an_answer_that_is_no_number(expected: str, said: str, is_right: bool) -> None:
    wanted = Problem.of("?", expected).expected
    assert TASK.score(wanted, said).correct == is_right


@pytest.mark.parametrize("expected", ["<tool_call>x</tool_call>5", RIGHT[: -len("444")]])
def test_what_cannot_be_expected_is_told(expected: str) -> None:
    assert TASK.fault(expected) == "it must be calls, then an answer"
    assert TASK.fault(RIGHT) is TASK.fault("5") is None


# ---- evaluation: a model that says what it is told to ----


def evaluated(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outputs: Sequence[str],
    finished: bool = True,
    max_positions: int = 512,
) -> tuple[dict[str, Any], str, list[str]]:
    """Metrics, the whole output, and what the model was asked in turn."""
    tokenizer = ChatTokenizer.load(tiny_tokenizer(tmp_path / "tokenizer"))
    said, asked = iter(outputs), []

    def generate(model: Any, prompts: Sequence[Sequence[int]], **_: Any) -> Completions:
        asked.extend(map(tokenizer.decode, prompts))
        return Completions([tokenizer.encode_text(next(said)) for _ in prompts], [finished], None)

    monkeypatch.setattr("minimind.evaluation.evaluate.generate", generate)
    problem = replace(Problem.of("37*12?", RIGHT), scoring="tool_use", task="x")
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_positions=max_positions)
    metrics, (prediction,) = evaluate(model, tokenizer, [problem])
    assert prediction.prompt == "37*12?"
    return metrics, prediction.output, asked


CALL = RIGHT.removesuffix("\n444")


def test_a_call_is_answered_and_the_model_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, output, asked = evaluated(tmp_path, monkeypatch, [CALL, "It is 444."])
    response = "<tool_response>\n444\n</tool_response>\n"
    assert output == f"{CALL}\n{response}It is 444."
    assert asked[1] == f"{asked[0]}{CALL}\nuser\n{response}assistant\n"
    assert metrics == {"exact_x": 1.0, "tool_choice_x": 1.0, "calls_x": 1.0}


def test_what_tools_said_is_not_the_models_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, _, _ = evaluated(tmp_path, monkeypatch, [CALL, ""])
    assert metrics == {"exact_x": 0.0, "tool_choice_x": 1.0, "calls_x": 1.0}


@pytest.mark.parametrize(
    ("outputs", "options", "num_asked"),
    [
        ([RIGHT], {}, 1),  # it did not wait
        ([CALL], {"finished": False}, 1),
        ([CALL], {"max_positions": 60}, 1),  # no room to go on
        ([CALL] * 9, {}, 3),
    ],
)
def test_a_chat_with_tools_comes_to_an_end(
    outputs: list[str],
    options: dict[str, Any],
    num_asked: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(evaluated(tmp_path, monkeypatch, outputs, **options)[2]) == num_asked


# ---- the data ----


def rows(directory: Path, name: str) -> list[dict[str, Any]]:
    text = (directory / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tools") / "world"
    config = ToolWorldConfig(seed=1, num_sft=600, num_eval=200, missing_share=0.2)
    assert write_tool_world(directory, config) == {"sft": 600, "eval": 200 + 20}
    return directory


def test_equal_seeds_write_equal_bytes(world: Path, tmp_path: Path) -> None:
    config = ToolWorldConfig(seed=1, num_sft=600, num_eval=200, missing_share=0.2)
    write_tool_world(tmp_path / "again", config)
    write_tool_world(tmp_path / "other", config.model_copy(update={"seed": 2}))
    for name, are_same in (("sft", False), ("eval", True)):
        file = f"{name}.jsonl"
        assert (tmp_path / "again" / file).read_bytes() == (world / file).read_bytes()
        same = (tmp_path / "other" / file).read_bytes() == (world / file).read_bytes()
        assert same is are_same


def test_chats_call_tools_that_are_there_and_end_with_what_they_say(world: Path) -> None:
    called = set()
    for row in rows(world, "sft"):
        system, _, *others = row["conversations"]
        offered = [tool["function"]["name"] for tool in json.loads(system["tools"])]
        assert len(offered) == len({*offered}) <= 4
        if len(others) == 1:
            assert others[0]["content"] in NO_TOOL
            continue
        (call,), response, answer = json.loads(others[0]["tool_calls"]), others[1], others[2]
        called.add(call["name"])
        assert call["name"] in offered
        assert run_tool(call["name"], call["arguments"]) == response["content"]
        said = json.loads(response["content"]) if call["name"] == "weather" else response["content"]
        values = said.values() if isinstance(said, dict) else [said]
        assert any(str(value) in answer["content"] for value in values)
    assert called == {*TOOLS} == {*SPECS}


def test_no_training_chat_has_a_held_out_problem(world: Path) -> None:
    """In any words, in either language; and none of the twenty that were written by hand."""
    trained = {
        meaning(calls["name"], calls["arguments"])
        for row in rows(world, "sft")
        for turn in row["conversations"]
        for calls in json.loads(turn.get("tool_calls") or "[]")
    }
    held_out = {
        meaning(call.name, call.arguments)
        for row in rows(world, "eval")
        if row["task"] == "held_out"
        for call in calls_in(row["answer"])
    }
    assert len(held_out) > 60
    assert not trained & held_out


def meaning(name: str, arguments: dict[str, Any]) -> str:
    names = {chinese: english for english, chinese in (*DAYS, *(city.names for city in CITIES))}
    said = {key: names.get(value, value) for key, value in arguments.items()}
    if name == "calculator":
        said["expression"] = "".join(sorted(re.split(r"([-+*])", said["expression"])))
    return f"{name} {said}"


def test_what_is_expected_by_hand_is_what_the_tool_says() -> None:
    by_hand = json.loads(BY_HAND.read_text(encoding="utf-8"))
    assert len(by_hand) == 20
    assert {tool for _, tool, _, _ in by_hand} == {*TOOLS}
    for _, tool, arguments, said in by_hand:
        response = run_tool(tool, arguments)
        assert said == response or said in map(str, json.loads(response).values())


def test_a_right_model_scores_full_marks(world: Path) -> None:
    for row in rows(world, "eval"):
        expected = Problem.of(row["conversations"][1]["content"], row["answer"]).expected
        assert TASK.fault(expected) is None
        assert TASK.score(expected, row["answer"]).correct
        assert all(TASK.parts(expected, row["answer"]).values())


def test_transformers_encodes_the_chats_with_the_added_tokens_as_we_do(
    world: Path, tmp_path: Path
) -> None:
    """Each is a text inside of what the encoder takes in one piece, between tags."""
    params = yaml.safe_load((ROOT / "tools/params.yaml").read_text(encoding="utf-8"))
    made, added = train_tokenizer(["user assistant system"], 300), params["tokenizer"]["extend"]
    made.add_tokens([AddedToken(token, normalized=False) for token in added])
    save_tokenizer(made, tmp_path / "made")
    ours, theirs = (
        ChatTokenizer.load(tmp_path / "made"),
        AutoTokenizer.from_pretrained(tmp_path / "made"),
    )
    seen = set()
    for row in rows(world, "sft")[:50]:
        chat = [
            {
                key: json.loads(value) if key.startswith("tool") else value
                for key, value in turn.items()
            }
            for turn in row["conversations"]
        ]
        ids = ours.encode_chat(chat)[0]
        tools = chat[0]["tools"]
        assert theirs.apply_chat_template(chat, tools=tools, return_dict=True).input_ids == ids
        seen |= {*ids}
    assert seen >= {*theirs.convert_tokens_to_ids(added)}


# ---- the graph ----


def test_the_graph_of_tools_is_left_alone_by_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dvc.yaml", "params.yaml", "tools/dvc.yaml", "tools/params.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    with Repo.init(no_scm=True) as repo:
        repo.index.check_graph()
        stages = {stage.addressing: stage for stage in repo.index.stages}
        tools = {name: stage for name, stage in stages.items() if name.startswith("tools/")}
        assert len(tools) == 5
        assert not {*tools} & {*load_graph(repo), *outdated(repo)}
        for stage in tools.values():
            assert not any(out.use_cache for out in stage.outs)  # or `dvc checkout` would fail
        wanted = load_graph(repo, ["tools/dvc.yaml:tool_evaluate"])
        assert {*tools, "code"} <= {*wanted}
