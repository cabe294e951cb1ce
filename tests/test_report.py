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
from minimind.errors import UserError
from minimind.report.report import alike, record_section, record_table
from minimind.report.results import RecordedRun, problems_digest, read_record
from minimind.report.tables import table
from stages.report import app

METRICS = {
    "in_form": 0.5,
    "complete_think": 1.0,
    "full_sentence": 0.25,
    "unfinished": 0.0,
}


def prediction(**changes: Any) -> dict[str, Any]:
    return {
        "id": "l1-0000",
        "problem": changes.get("id", "l1-0000"),
        "level": 1,
        "task": None,
        "prompt": "How many?",
        "output": "7",
        "answer": "7",
        "correct": True,
        "choice_correct": None,
    } | changes


def shares(predictions: list[dict[str, Any]]) -> dict[str, float]:
    """What the evaluate stage says of right answers."""
    groups: dict[str, list[bool]] = {}
    for row in predictions:
        level = "" if row["level"] is None else f"_l{row['level']}"
        task = f"_{row['task']}" if row["task"] else ""
        groups.setdefault(f"exact{task or level}", []).append(row["correct"])
        if row["choice_correct"] is not None:
            groups.setdefault(f"choice{task}", []).append(row["choice_correct"])
    return {name: sum(right) / len(right) for name, right in groups.items()}


def write(folder: Path, name: str, predictions: list[dict[str, Any]], **changes: Any) -> Path:
    """A checkpoint's evaluation as the evaluate stage leaves it."""
    metrics = folder / "metrics/evaluate" / f"{name}.json"
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_text(json.dumps({name: shares(predictions) | METRICS | changes}))
    (folder / "predictions").mkdir(exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in predictions]
    (folder / "predictions" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return metrics


def run(folder: Path, *names: str, **options: Path | None) -> tuple[int, str, str]:
    """Exit code, and what is printed on stdout and stderr; of training, what is in metrics/."""
    arguments = [*names, "--evaluations", f"{folder / 'metrics/evaluate'}"]
    arguments += ["--predictions", f"{folder / 'predictions'}", "--output", f"{folder / 'r.md'}"]
    arguments += ["--training", f"{folder / 'metrics'}", "--histories", f"{folder / 'history'}"]
    arguments += ["--page", f"{folder / 'index.html'}"]
    (folder / "history").mkdir(exist_ok=True)
    for name in names:
        for file, text in ((f"metrics/{name}.json", "{}"), (f"history/{name}.csv", "step\n")):
            if (folder / file).parent.is_dir() and not (folder / file).exists():
                (folder / file).write_text(text)
    arguments += [f"--{name}={path}" for name, path in options.items() if path]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def read_table(text: str) -> dict[str, list[str]]:
    """The first table of a text, its rows by their titles."""
    header, _, *lines = text[text.index("|") :].split("\n\n")[0].split("\n")
    return {title: rest for title, *rest in map(cells, (header, *lines))}


def test_a_column_for_each_checkpoint_in_the_given_order(tmp_path: Path) -> None:
    right = [prediction(id=f"{i}", choice_correct=i < 5) for i in range(10)]
    sums = {"task": "equation", "level": None}
    right += [prediction(id=f"e{i}", **sums, choice_correct=i < 2) for i in range(10)]
    right += [prediction(id=f"f{i}", task="extraction", correct=i < 3) for i in range(10)]
    mixed = [prediction(id=f"{i}", level=1 + i % 2, correct=i < 3) for i in range(10)]
    write(tmp_path, "sft", right)
    write(tmp_path, "grpo", mixed, complete_think=0.123)
    trained = '{"sft": {"bits_per_byte": 0.12345, "val_loss": 3}}'
    (tmp_path / "metrics/sft.json").write_text(trained)
    code, printed, _ = run(tmp_path, "sft", "grpo")
    assert code == 0
    # Wilson: 10 of 10 is 72 to 100 %; 5 of 10, 24 to 76; 3 of 10, 11 to 60; 2 of 10, 6 to 51;
    # 2 of 5, 12 to 77; 1 of 5, 4 to 62.
    assert read_table(printed) == {
        "": ["sft", "grpo"],
        "level 1": ["100 72–100", "40 12–77"],
        "level 2": ["", "20 4–62"],
        "equation": ["20 6–51", ""],
        "extraction": ["30 11–60", ""],
        "choice": ["50 24–76", ""],
        "bits/byte": ["0.123", ""],
        "form": ["50.0", "50.0"],
        "sentence": ["25.0", "25.0"],
        "think": ["100", "12.3"],
        "truncated": ["0.0", "0.0"],
    }
    assert (tmp_path / "r.md").read_text("utf-8").startswith(f"# Report\n\n{printed.strip()}\n")


def test_an_interval_covers_the_choice_of_problems_not_of_answers(tmp_path: Path) -> None:
    """Told four times and answered alike, 10 problems say no more than told once."""
    rows = [
        prediction(id=f"{i}-{telling}", problem=f"{i}", correct=i < 3)
        for i in range(10)
        for telling in range(4)
    ]
    write(tmp_path, "told", rows)
    _, printed, _ = run(tmp_path, "told")
    assert read_table(printed)["level 1"] == ["30 11–60"]


def test_rows_that_nobody_has_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, "own", [prediction(level=None)])
    metrics = json.loads(path.read_text())
    del metrics["own"]["unfinished"]
    path.write_text(json.dumps(metrics))
    code, printed, _ = run(tmp_path, "own")
    assert code == 0
    assert list(read_table(printed)) == ["", "exact", "form", "sentence", "think"]


SHIPPED = ("pretrain", "sft", "dpo", "reason", "grpo", "spo", "lora", "distill", "baseline")


def test_a_full_table_fits_a_terminal(tmp_path: Path) -> None:
    for name in SHIPPED:
        right = 1993 if name in ("reason", "grpo", "spo") else 400
        rows = [prediction(id=f"{i}", level=1 + i % 4, correct=i < right) for i in range(2000)]
        write(tmp_path, name, rows)
    _, printed, _ = run(tmp_path, *SHIPPED)
    assert "100 99–100" in printed and printed.count("20 17–24") == 6 * 4
    assert max(map(len, printed.split("\n"))) <= 120


# ---- recorded runs ----


def recorded(seed: int, shift: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A run as benchmarks/claims.py records it, as far as tables need it."""
    evaluation = {
        "sft": {"exact_l1": 0.5 + shift, "in_form": 0.996, "complete_think": 0.0},
        "reason": {"exact_l1": 1.0, "in_form": 0.0, "complete_think": 1.0 - shift},
        "lora": {"exact_l1": 0.25, "exact_extraction": 0.75, "in_form": 0.0},
    }
    for values in evaluation.values():
        values |= {"choice_equation": 0.4 - shift, "exact_equation": 0.9, "unfinished": 0.0}
    training = {
        "sft": {"bits_per_byte": 0.5 + shift, "steps": 3},
        "reason": {"bits_per_byte": 0.12345},
    }
    metrics = {"training": training, "evaluation": evaluation, "held_out_pairs": 4}
    return {
        "name": f"{seed}-bfloat16",
        "seed": seed,
        "dtype": "bfloat16",
        "isa": "AVX512",
        "problems": problems_digest([prediction()]),
        "metrics": metrics,
    } | changes


RUNS = [
    recorded(7, 0.9, dtype="float32"),
    *(recorded(seed, shift) for seed, shift in ((1, 0.0), (2, 0.03), (3, 0.12))),
    recorded(1, 0.9, isa="AVX2, float32 matmuls"),
]


def write_record(folder: Path, runs: Any) -> Path:
    path = folder / "benchmarks/results/claims.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": runs}))
    return path


def read_runs(folder: Path, runs: Any) -> list[RecordedRun]:
    return read_record(write_record(folder, runs))


def test_seeds_are_summed_up_over_runs_that_are_alike(tmp_path: Path) -> None:
    runs = read_runs(tmp_path, RUNS)
    assert [run.seed for run in alike(runs)] == [1, 2, 3]
    assert read_table(record_table(runs, ["reason", "dpo", "sft"])) == {
        "3 seeds": ["reason", "sft", "lora"],
        "level 1": ["100", "55 50–62", "25.0"],
        "equation": ["35 28–40"] * 3,
        "extraction": ["", "", "75.0"],
        "bits/byte": ["0.12", ".50–.62", ""],
        "form": ["0.0", "99.6", "0.0"],
        "think": ["95 88–100", "0.0", ""],
        "truncated": ["0.0"] * 3,
    }


def test_one_recorded_run_has_no_spread(tmp_path: Path) -> None:
    table = record_table(read_runs(tmp_path, RUNS[:1]), [])
    assert "–" not in table
    assert table.startswith("| 1 seed ")


def test_the_report_has_the_recorded_runs_if_there_are_any(tmp_path: Path) -> None:
    write(tmp_path, "reason", [prediction()])
    for record in (None, write_record(tmp_path, [])):
        assert run(tmp_path, "reason", record=record)[0] == 0
        assert "## Over seeds" not in (tmp_path / "r.md").read_text("utf-8")
    code, printed, _ = run(tmp_path, "reason", record=write_record(tmp_path, RUNS))
    report = (tmp_path / "r.md").read_text("utf-8")
    section = record_section(read_record(tmp_path / "benchmarks/results/claims.json"), ["reason"])
    assert code == 0 and section in report and "## Over seeds" not in printed
    assert "over 3 seeds in % (bfloat16, AVX512), and the same problems in all" in section
    assert "`python -m benchmarks.claims`" in section
    write(tmp_path, "reason", [prediction(answer="8")])  # of other problems it says nothing
    assert run(tmp_path, "reason", record=tmp_path / "benchmarks/results/claims.json")[0] == 0
    assert "## Over seeds" not in (tmp_path / "r.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ({}, "runs is {}"),
        ([3], "run 1: seed is missing"),
        ([recorded(1), recorded(2) | {"seed": "2"}], "run 2: seed is '2'"),
        ([recorded(1, isa=None)], "run 1: isa is None"),
        ([recorded(1, metrics={"training": {}})], "run 1: metrics.evaluation is None"),
        (
            [recorded(1, metrics={"training": {}, "evaluation": {"sft": {"exact": "x"}}})],
            "run 1: sft: exact is 'x'",
        ),
        (
            [recorded(1, metrics={"training": {"sft": 3}, "evaluation": {}})],
            "run 1: metrics.training",
        ),
    ],
)
def test_a_record_that_is_none_is_one_line(tmp_path: Path, runs: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_runs(tmp_path, runs)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_readmes_table_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    graph = "stages: {evaluate: {foreach: {sft: a, lora: b, reason: c}}}"
    (tmp_path / "dvc.yaml").write_text(graph)
    write_record(tmp_path, RUNS)
    result = CliRunner().invoke(table_app, ["--record"])
    assert result.exit_code == 0
    runs = read_record(tmp_path / "benchmarks/results/claims.json")
    shown, covers = result.stdout.rsplit("\n\n", 1)
    assert shown == record_table(runs, ["sft", "lora", "reason"])
    assert "over seeds, not over problems" in covers
    write_record(tmp_path, [])
    result = CliRunner().invoke(table_app, ["--record"])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "table: benchmarks/results/claims.json has no runs; run `python -m benchmarks.claims`."
    ]


ENCODED = {
    "rows": 9,
    "samples": 6,
    "truncated_rows": 1,
    "skipped_rows": 3,
    "dropped_rows": 0,
    "duplicate_rows": 2,
    "eval_overlap_rows": 4,
    "trained_share": 0.2,
    "formats": {"sharegpt": 5, "alpaca": 1},
    "left_out": {"role": 3},
    "first_left_out": {"role": "mine/a.json, row 7: role is 'bot'"},
}


def test_the_report_has_what_became_of_the_data(tmp_path: Path) -> None:
    write(tmp_path, "sft", [prediction()])
    write(tmp_path, "grpo", [prediction()])  # has its name from no data set
    (tmp_path / "metrics/encode").mkdir()
    file = tmp_path / "metrics/encode/sft.json"
    file.write_text(json.dumps({"encode": {"sft": ENCODED}}))
    assert run(tmp_path, "sft", "grpo", encoded=file.parent)[0] == 0
    report = (tmp_path / "r.md").read_text("utf-8")
    data, reasons = report.split("## Data\n\n")[1].split("\n\n")[:2]
    numbers = ["9", "6", "3", "0", "1", "2", "4", "20.0"]
    assert cells(data.splitlines()[2]) == ["sft", "5 sharegpt, 1 alpaca", *numbers]
    assert cells(reasons.splitlines()[2]) == ["sft", "role", "3", ENCODED["first_left_out"]["role"]]
    for broken in (
        {"encode": {"sft": {"rows": "9"}}},
        {"encode": {"sft": ENCODED | {"formats": 1}}},
    ):
        file.write_text(json.dumps(broken))
        code, _, said = run(tmp_path, "sft", "grpo", encoded=file.parent)
        assert code == 1 and "sft.json: sft: " in said and said.count("\n") == 1


def test_tables_are_aligned_with_chinese_too() -> None:
    lines = table(["name", "a|b"], [["小明", "1"], ["x", "long\nline"]]).split("\n")

    def width(line: str) -> int:
        return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)

    assert len({width(line) for line in lines}) == 1
    assert lines[0].startswith("| name | ") and lines[2].startswith("| 小明 | ")
    assert lines[1].startswith("| ---- | ") and lines[1].endswith("-: |")
    assert all(line.replace("\\|", "").count("|") == 3 for line in lines)


def test_misuse_is_one_line(tmp_path: Path) -> None:
    metrics = write(tmp_path, "a", [prediction(), prediction()])
    predictions = tmp_path / "predictions/a.jsonl"

    def complaint(*names: str) -> str:
        code, printed, errors = run(tmp_path, *names)
        assert code == 1 and not printed
        assert not (tmp_path / "r.md").exists() and not (tmp_path / "index.html").exists()
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
    write(tmp_path, "a", [prediction()])
    (tmp_path / "history/a.csv").write_text("step,loss\n1,2\n2,two\n")
    assert f"{tmp_path / 'history/a.csv'}:3: no row of a history" in complaint("a")
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
