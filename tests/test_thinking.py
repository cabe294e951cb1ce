"""Thinking quality: which steps a thought has, which are right, and the stage around it."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from minimind.chat.tokenizer import ChatTokenizer
from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.model.checkpoint import save_checkpoint
from minimind.tasks.problem import Problem
from minimind.thinking.completions import Completion
from minimind.thinking.quality import Thinking, assess, find_equations, metrics
from stages.thinking import app
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("thought", "steps"),
    [
        ("3+4=7", {"3+4=7": True}),
        ("3+4=8", {"3+4=8": False}),
        ("先算4*9=36，36-7=29。", {"4*9=36": True, "36-7=29": True}),
        ("4*9=36,36+7=43", {"4*9=36": True, "36+7=43": True}),
        ("So 3 + 4 = 7; then 7 × 2 = 14, 14 ÷ 4 = 3.5.", {
            "3+4=7": True, "7*2=14": True, "14/4=3.5": True,
        }),
        ("1,000+5=1,005", {"1,000+5=1,005": True}),
        ("2+3*4=14, 2+3*4=20", {"2+3*4=14": True, "2+3*4=20": False}),
        ("10-2-3=5 and 8/2/2=2", {"10-2-3=5": True, "8/2/2=2": True}),
        ("5-8=-3", {"5-8=-3": True}),
        ("-3+5=2", {"-3+5=2": True}),
        ("- 3+4=7\n- 7-2=5", {"3+4=7": True, "7-2=5": True}),
        ("3+4=7-2=5", {"3+4=7-2": False, "7-2=5": True}),
        ("3+4=5+2=7", {"3+4=5+2": True, "5+2=7": True}),
        ("0.1+0.2=0.3", {"0.1+0.2=0.3": True}),
        ("5/0=5, 0=5/0", {"5/0=5": False}),
        ("3=3, 7", {}),
        ("3+4=", {}),
        ("x=3+4=7, 2x3+4=7, 3+4=7x", {}),
        ("(1+2)*3+4=13, (1 + 2) * 3 = 9", {}),
        ("9" * 5000 + "+1=2", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_steps_are_found_and_checked(thought: str, steps: dict[str, bool]) -> None:
    assert {step.text: step.right for step in find_equations(thought)} == steps


numbers = st.integers(0, 200).map(str)


terms = st.lists(st.tuples(st.sampled_from("+-*/"), numbers), min_size=1, max_size=4)


@given(numbers, terms, st.integers(-1000, 1000))
@settings(deadline=None, max_examples=100)
def test_steps_are_worth_what_python_makes_of_them(
    first: str, rest: list[tuple[str, str]], other: int
) -> None:
    side = first + "".join(f"{operator}{number}" for operator, number in rest)
    exact = "".join(f"{op}Fraction({number})" for op, number in rest)
    try:
        value = eval(f"Fraction({first}){exact}", {"Fraction": Fraction})
    except ZeroDivisionError:
        value = None
    for result in {other, value.numerator if value is not None else 0}:
        (step,) = find_equations(f"{side}={result}")
        assert step.right == (value == result)
        assert step.result == result


@given(st.text("0123456789+-*/=(). ,，x\n", max_size=40))
@settings(deadline=None, max_examples=100)
def test_no_thought_is_too_odd(thought: str) -> None:
    for step in find_equations(thought):
        assert "=" in step.text


PROMPT = Problem.of("3+4-2?")


def assessed(text: str, finished: bool = True) -> Thinking:
    return assess(PROMPT, Completion(text, finished), len)


GOOD = "<think>\n3+4=7, 7-2=5</think>\n<answer> 5 </answer>"


def test_an_output_is_taken_apart() -> None:
    assert assessed(GOOD) == Thinking(
        prompt="3+4-2?",
        output=GOOD,
        thinking="3+4=7, 7-2=5",
        answer="5",
        has_thinking=True,
        has_answer=True,
        finished=True,
        complete=True,
        thinking_tokens=13,
        steps=2,
        right_steps=2,
        consistent=True,
    )


FLAGS = {"complete", "has_thinking", "has_answer", "consistent"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, FLAGS),
        (GOOD.replace(" 5 ", "5.0 apples"), FLAGS),
        (GOOD.replace(" 5 ", "7"), {"complete", "has_thinking", "has_answer"}),
        (GOOD.replace(" 5 ", "five"), {"complete", "has_thinking", "has_answer"}),
        ("<think>hm</think>\n<answer>5</answer>", {"complete", "has_thinking", "has_answer"}),
        (GOOD + GOOD, {"has_thinking"}),  # two answers are none, as in evaluation
        ("<think>3+4=7</think> 7", {"has_thinking"}),
        ("3+4=7 <answer>7</answer>", {"has_answer"}),
        ("<think>3+4=7", set()),
        ("", set()),
    ],
)  # fmt: skip
def test_flags(text: str, expected: set[str]) -> None:
    found = assessed(text)
    assert {name for name in FLAGS if getattr(found, name)} == expected
    assert not assessed(text, finished=False).complete


def test_metrics_are_shares_and_means() -> None:
    wrong = "<think>3+4=8</think>\n<answer>8</answer>"
    values = metrics([assessed(GOOD), assessed(wrong), assessed("5"), assessed(GOOD, False)])
    assert values == {
        "prompts": 4,
        "has_thinking": 0.75,
        "has_answer": 0.75,
        "complete": 0.5,
        "thinking_tokens": (13 + 5 + 13) / 3,
        "steps": 5 / 4,
        "steps_right": 4 / 5,
        "consistent": 0.75,
    }
    nothing = metrics([assessed("")])
    assert nothing["thinking_tokens"] == nothing["steps_right"] == 0


# ---- the stage ----


def run(folder: Path, prompts: Sequence[str], **changes: Any) -> Any:
    values = {
        "init": "model",
        "num_prompts": 100,
        "temperature": 0.7,
        "top_p": 1.0,
        "max_new_tokens": 10,
        "batch_size": 3,
        "seed": 1,
        "dtype": "bfloat16",
    }
    params = {"thinking": values | changes, "data": {"free_prompts": "prompts.jsonl"}}
    (folder / "params.yaml").write_text(json.dumps(params))
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return CliRunner().invoke(
        app,
        [
            *("--predictions", "predictions/thinking.jsonl"),
            *("--metrics", "metrics/thinking.json", "--params", "params.yaml"),
        ],
    )


def test_the_stage_writes_a_row_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokenizer(train_tokenizer([GOOD, "user assistant"], 280), tmp_path / "tokenizer")
    vocab_size = ChatTokenizer.load(tmp_path / "tokenizer").vocab_size
    save_checkpoint(tmp_path / "model", tiny_model(0, vocab_size=vocab_size), Path("tokenizer"))
    prompts = [f"{n}+2?" for n in range(8)]
    result = run(tmp_path, prompts)
    assert result.exit_code == 0, result.output
    file = tmp_path / "predictions" / "thinking.jsonl"
    first = file.read_bytes()
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert list(rows[0]) == list(Thinking.__dataclass_fields__)
    values = json.loads((tmp_path / "metrics/thinking.json").read_text())["thinking"]
    assert values["prompts"] == 8
    assert values["has_thinking"] == sum(row["has_thinking"] for row in rows) / 8
    run(tmp_path, prompts)
    assert file.read_bytes() == first
    run(tmp_path, prompts, num_prompts=5)
    assert file.read_bytes().splitlines() == first.splitlines()[:5]
    run(tmp_path, prompts, seed=2)
    assert file.read_bytes() != first
    assert not (tmp_path / ".resume" / "thinking").exists() or not any(
        (tmp_path / ".resume" / "thinking").iterdir()
    )
