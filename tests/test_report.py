"""The report: the same bytes for the same results, whatever columns there are."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minimind.cli.table import app as table_app
from minimind.report.report import examples_section
from minimind.report.results import Evaluation, read_metrics
from minimind.report.tables import table
from stages.report import app

METRICS = {
    "exact_l1": 0.5,
    "perplexity": 2.91234,
    "complete_think": 1.0,
    "full_sentence": 0.25,
    "unfinished": 0.0,
}


def prediction(**changes: Any) -> dict[str, Any]:
    return {
        "id": "l1-0000",
        "level": 1,
        "prompt": "How many?",
        "output": "7",
        "answer": "7",
        "correct": True,
        "choice_correct": None,
    } | changes


def write(folder: Path, name: str, predictions: list[dict[str, Any]], **changes: Any) -> Path:
    """A checkpoint's evaluation as the evaluate stage leaves it."""
    metrics = folder / "metrics/evaluate" / f"{name}.json"
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_text(json.dumps({name: METRICS | changes}))
    (folder / "predictions").mkdir(exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in predictions]
    (folder / "predictions" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return metrics


def run(folder: Path, *names: str, training: tuple[Path, ...] = ()) -> tuple[int, str, str]:
    """Exit code, and what is printed on stdout and stderr."""
    arguments = ["--predictions", f"{folder / 'predictions'}", "--output", f"{folder / 'r.md'}"]
    for name in names:
        arguments += ["--evaluation", f"{folder / 'metrics/evaluate' / name}.json"]
    for path in training:
        arguments += ["--training", f"{path}"]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_for_each_checkpoint_in_the_given_order(tmp_path: Path) -> None:
    right = [prediction(id=f"{i}", choice_correct=i < 5) for i in range(10)]
    mixed = [prediction(id=f"{i}", level=1 + i % 2, correct=i < 3) for i in range(10)]
    write(tmp_path, "sft", right)
    write(tmp_path, "pretrain", mixed, complete_think=0.123)
    code, printed, _ = run(tmp_path, "sft", "pretrain")
    assert code == 0
    header, _, sft, pretrain = (cells(line) for line in printed.split("\n")[2:6])
    assert header == [
        *("checkpoint", "level 1", "level 2", "choice", "ppl", "think", "sentence", "endless")
    ]
    # Wilson: 10 of 10 is 72 to 100 %; 5 of 10, 24 to 76; 2 of 5, 12 to 77; 1 of 5, 4 to 62.
    assert sft == ["sft", "100 72–100", "", "50.0 24–76", "2.912", "100", "25.0", "0.0"]
    assert pretrain == ["pretrain", "40.0 12–77", "20.0 4–62", "", "2.912", "12.3", "25.0", "0.0"]
    assert (tmp_path / "r.md").read_text("utf-8").startswith(f"# Report\n\n{printed.strip()}\n")


def test_columns_that_nobody_has_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "own", [prediction(level=None)])
    metrics = json.loads((tmp_path / "metrics/evaluate/own.json").read_text())
    del metrics["own"]["perplexity"]
    (tmp_path / "metrics/evaluate/own.json").write_text(json.dumps(metrics))
    code, printed, _ = run(tmp_path, "own")
    assert code == 0
    assert cells(printed.split("\n")[2]) == ["checkpoint", "exact", "think", "sentence", "endless"]


def test_a_full_table_fits_a_terminal(tmp_path: Path) -> None:
    rows = [prediction(id=f"{i}", level=1 + i % 4, choice_correct=True) for i in range(40)]
    write(tmp_path, "pretrain", rows, perplexity=123.456)
    _, printed, _ = run(tmp_path, "pretrain")
    assert printed.count("100 ") >= 5, "the widest cells"
    assert max(map(len, printed.split("\n"))) <= 120


def test_training_metrics_are_listed_whatever_they_are(tmp_path: Path) -> None:
    write(tmp_path, "dpo", [prediction()])
    one, other = tmp_path / "dpo.json", tmp_path / "sizes.json"
    one.write_text('{"dpo": {"loss": 0.69314718, "pair_accuracy": 0.9, "steps": 1200000}}')
    other.write_text('{"encode": {"sft": {"rows": 3}}}')
    code, printed, _ = run(tmp_path, "dpo", training=(one, other))
    report = (tmp_path / "r.md").read_text("utf-8")
    assert code == 0 and "## Training" in report and "## Training" not in printed
    assert "| dpo    | loss 0.693147, pair_accuracy 0.9, steps 1200000 |" in report
    assert "| encode | sft.rows 3 " in report
    assert read_metrics([one])["dpo"]["steps"] == 1200000


def test_examples_show_the_same_problem_at_every_checkpoint() -> None:
    problems = [
        prediction(id=f"l{level}-{i}", level=level, prompt=f"问题{level}/{i}？")
        for level in (1, 2)
        for i in range(3)
    ]
    said = {"sft": "8", "reason": "<think>\n3|4\n</think>"}
    evaluations = [
        Evaluation(
            name,
            METRICS,
            [row | {"output": output, "correct": name == "reason"} for row in reversed(problems)],
        )
        for name, output in said.items()
    ]
    section = examples_section(evaluations)
    shown = [line for line in section.split("\n") if line.startswith("**")]
    # Last to first here, and the second of the second level.
    assert shown == ["**l1-2** 问题1/2？ → 7", "**l2-1** 问题2/1？ → 7"]
    assert section.count("| sft        | ✗   | 8") == 2
    assert section.count("\\<think> ⏎ 3\\|4 ⏎ \\</think> |") == 2


def test_long_outputs_are_cut_in_examples_only() -> None:
    evaluation = Evaluation("x", METRICS, [prediction(output="word " * 1000)])
    section = examples_section([evaluation])
    assert section.endswith("word… |")
    assert len(section) < 2000


def test_tables_are_aligned_with_chinese_too() -> None:
    lines = table(["name", "a|b"], [["小明", "1"], ["x", "long\nline"]]).split("\n")

    def width(line: str) -> int:
        return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)

    assert len({width(line) for line in lines}) == 1
    assert lines[0].startswith("| name | ") and lines[2].startswith("| 小明 | ")
    assert lines[1].startswith("| ---- | ") and lines[1].endswith("-: |")
    assert all(line.replace("\\|", "").count("|") == 3 for line in lines)


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    write(tmp_path, "a", [prediction(), prediction(id="l2", level=2, output="\u2028小\x85\n|")])
    reports = []
    for _ in range(2):
        assert run(tmp_path, "a")[0] == 0
        reports.append((tmp_path / "r.md").read_bytes())
    assert reports[0] == reports[1]


def test_misuse_is_one_line(tmp_path: Path) -> None:
    metrics = write(tmp_path, "a", [prediction(), prediction()])
    predictions = tmp_path / "predictions/a.jsonl"

    def complaint(*names: str) -> str:
        code, printed, errors = run(tmp_path, *names)
        assert code == 1 and not printed and not (tmp_path / "r.md").exists()
        (line,) = errors.splitlines()
        return line

    assert "a comes twice" in complaint("a", "a")
    assert f"{metrics.with_name('b.json')} is missing" in complaint("a", "b")
    predictions.write_text(json.dumps(prediction()) + "\n{oops\n")
    assert f"{predictions}:2: broken JSON" in complaint("a")
    predictions.write_text(json.dumps(prediction()) + '\n{"id": 1}\n')
    assert f"{predictions}:2: id is 1; it must be a prediction" in complaint("a")
    predictions.write_text("")
    assert f"{predictions}:1: broken JSON" in complaint("a")
    predictions.unlink()
    assert f"{predictions} is missing" in complaint("a")
    metrics.write_text('{"a": {}, "b": {}}')
    assert "has the keys a, b" in complaint("a")


def test_the_table_is_printed_again_with_times(tmp_path: Path) -> None:
    write(tmp_path, "a", [prediction()])
    _, printed, _ = run(tmp_path, "a")
    runs = tmp_path / "runs"
    arguments = ["--report", f"{tmp_path / 'r.md'}", "--runs", f"{runs}"]
    result = CliRunner().invoke(table_app, arguments)
    assert result.exit_code == 0
    assert result.stdout == printed

    runs.mkdir()
    records = [
        {"stage": "sft", "seconds": 65.2, "finished": "2", "tokens_per_second": 12345.6},
        {"stage": "pretrain", "seconds": 9.5, "finished": "1"},
    ]
    for record in records:
        (runs / f"{record['stage']}.json").write_text(json.dumps(record))
    (runs / "broken.json").write_text("{")
    result = CliRunner().invoke(table_app, arguments)
    assert result.stdout.startswith(printed)
    rows = [cells(line) for line in result.stdout.split("\n") if line.startswith("| ")][-3:]
    assert rows == [["pretrain", "0:09", ""], ["sft", "1:05", "12,346"], ["all", "1:14", ""]]


def test_the_table_without_a_report_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(table_app, ["--report", f"{tmp_path / 'none.md'}"])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"table: {tmp_path / 'none.md'} is missing; run `dvc repro report`."
    ]


@pytest.mark.parametrize("module", ["stages.report", "minimind.cli.table"])
def test_reporting_starts_without_torch(module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
