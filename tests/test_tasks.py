"""Ways to score outputs: one object for evaluation, rewards and rejection sampling."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import minimind.rewards
import minimind.tasks
import stages
from minimind.chat.answers import normalise
from minimind.chat.tokenizer import ChatTokenizer
from minimind.errors import UserError
from minimind.evaluation.evaluate import EvaluateConfig, evaluate
from minimind.rewards import weighted
from minimind.rewards.reward import Given, Sample
from minimind.rewards.weighted import Rewards, RewardsConfig
from minimind.tasks import task
from minimind.tasks.problem import Problem, read_problems
from minimind.tasks.task import task_names, task_of
from minimind.thinking.completions import Completion
from minimind.thinking.rejection_sampling import RejectionSampling
from tests.tiny import tiny_model, tiny_tokenizer

# Answers of each kind, as a file of problems has them.
CALL = '<tool_call>\n{"name": "clock", "arguments": {"time": "09:15"}}\n</tool_call>'
ANSWERS = {
    "exact": ["7", "1,000", "-2.50", "七枚贝壳", "x + 1"],
    "letter": ["A", "D"],
    "tool_use": ["7", f"{CALL}\n16:40", f"{CALL}{CALL} sunny"],
}


def problem(tmp_path: Path, scoring: str, answer: str) -> Problem:
    file = tmp_path / "problems.jsonl"
    row = {"prompt": "Which?", "answer": answer, "scoring": scoring}
    file.write_text(json.dumps(row), encoding="utf-8")
    (read,) = read_problems(file)
    return read


def thought_through(answer: str) -> str:
    return f"<think>It is so.</think>\n<answer>{answer}</answer>"


def test_every_task_has_answers_here() -> None:
    assert task_names() == sorted(ANSWERS)


@pytest.mark.parametrize(("scoring", "answer"), [(s, a) for s in ANSWERS for a in ANSWERS[s]])
def test_its_own_gold_answers_score_full_marks_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scoring: str, answer: str
) -> None:
    asked = problem(tmp_path, scoring, answer)
    gold = asked.expected
    for output in (gold, thought_through(gold)):
        rewards = Rewards(RewardsConfig(format=0, answer=1), Given(max_new_tokens=64))
        parts = rewards.parts([Sample(asked, output, [], True)])
        assert rewards.scaled(rewards.total(parts)).tolist() == [1.0]

        tokenizer = ChatTokenizer.load(tiny_tokenizer(tmp_path / "tokenizer"))
        monkeypatch.setattr(ChatTokenizer, "decode", lambda self, ids: output)  # noqa: B023
        model, config = (
            tiny_model(vocab_size=tokenizer.vocab_size),
            EvaluateConfig(max_new_tokens=1),
        )
        metrics, (prediction,) = evaluate(model, tokenizer, [asked], config=config)
        assert metrics["exact"] == 1.0
        assert prediction.parsed == normalise(answer.rpartition("</tool_call>")[2])
        monkeypatch.undo()

    sampling = RejectionSampling()
    sampling.add(asked, [Completion(thought_through(gold), True)], max_kept=1)
    assert (len(sampling.kept), sampling.rejected) == (1, [])


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("选B。", "B"),
        ("The answer is B, not A.", "B"),
        ("答案是B", "B"),
        ("答案：B", "B"),
        ("<think>A or B?</think><answer>B</answer>", "B"),
        ("B, B", "B"),
        ("I think it is B", "B"),
        ("A cat has 4 legs, so B", "B"),
        ("B. A cell", "B"),
        ("The answer is I think B", "B"),
        ("选Ｂ", "B"),
        ("Answer is B or C", None),
        ("Answer: A, B", None),
        ("The answer is A. The answer is B.", None),
        ("A, B", None),  # guesses
        ("A or B", None),
        ("<answer>A</answer><answer>B</answer>", None),
        ("<think>B</think>", None),
        ("Because I'm", None),
        ("", None),
    ],
)
def test_a_letter_is_found(output: str, said: str | None) -> None:
    score = Problem.of("?", "B").score("B")
    assert score.correct
    found = task_of("letter").score("B", output)
    assert found == (said, said == "B")


def test_an_unknown_scoring_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"problems.jsonl:1: scoring is 'lettre'; allowed are exact"
    ):
        problem(tmp_path, "lettre", "A")


@pytest.mark.parametrize("answer", ["12", "b", "AB"])
def test_an_answer_that_no_output_could_give_is_named_with_its_line(
    tmp_path: Path, answer: str
) -> None:
    with pytest.raises(UserError, match=rf"jsonl:1: answer is '{answer}'.*one capital letter"):
        problem(tmp_path, "letter", answer)


def test_a_missing_answer_is_named_only_where_it_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "3+4?"}\n', encoding="utf-8")
    assert read_problems(file, needs_answers=False)[0].answer is None
    with pytest.raises(UserError, match=r"prompts.jsonl:1: answer is missing"):
        read_problems(file)


def test_a_chat_may_say_of_its_problem_what_other_rows_say(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    file = tmp_path / "problems.jsonl"
    rows = [{"conversations": turns, "level": 2}, {"conversations": turns, "answer": "five"}]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    one, other = read_problems(file)
    assert (one.answer, one.level, one.messages) == ("5", 2, turns[:1])
    assert (other.answer, other.messages) == ("five", turns[:1])


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("\n\ndef score(:\n", ":3 cannot be imported: SyntaxError"),
        ("\n1 / 0\n", ":2 cannot be imported: ZeroDivisionError"),
        ("class A: ...\nclass B: ...\n", " has no "),
    ],
)
def test_a_broken_file_among_rewards_and_tasks_is_named(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(code)
    for package, module in ((minimind.rewards, weighted), (minimind.tasks, task)):
        monkeypatch.setattr(package, "__path__", [str(tmp_path)])
        monkeypatch.setattr(module, "__file__", str(tmp_path / "it.py"))
    for load in (weighted.reward_classes.__wrapped__, lambda: task_of("broken")):
        with pytest.raises(UserError, match=f"{tmp_path / 'broken.py'}{said}"):
            load()
    for name in ("minimind.rewards.broken", "minimind.tasks.broken"):
        sys.modules.pop(name, None)


def test_what_is_wrong_while_a_stage_is_imported_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sys.excepthook is stages.complain
    sys.excepthook(UserError, UserError("rewards/x.py:3:\n no."), None)
    assert capsys.readouterr().err == "rewards/x.py:3: no.\n"


def test_code_that_is_not_python_is_one_line_in_every_command() -> None:
    command = "from minimind.cli import main\n@main.app.command()\ndef broken():\n    {}\n{}"
    not_python = 'exec(compile("def (", "minimind/x.py", "exec"))'
    of_a_command = command.format(not_python, "main.app(['broken'])")
    for text in (of_a_command, f"import stages\n{not_python}"):
        run = [sys.executable, "-c", text]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == "minimind/x.py:1: not Python: invalid syntax; mend it.\n"
