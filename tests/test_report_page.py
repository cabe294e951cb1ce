"""The report's page: all of it in one file, the same bytes for the same results."""

import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.report.drawings import Line, graph_drawing, line_chart
from minimind.report.page import render
from minimind.report.results import Results
from minimind.report.workspace import experiments, live_histories
from tests.project import clone_of, git, minimind
from tests.test_report import prediction, run, write

THOUGHT = "<think>3+4</think>\n<answer>7</answer>"


class Read(HTMLParser):
    """What a page has: texts, and tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str, style: str = "") -> list[dict[str, str | None]]:
        return [a for name, a in self.tags if name == tag and style in (a.get("class") or "")]


def built(folder: Path) -> str:
    """The page of two checkpoints, one trained from the other, on problems in both languages."""
    problems = [
        prediction(
            id=f"{level}-{i}",
            level=level,
            prompt=f"小明有{i}个。{level}？" if i % 2 else f"{level} and {i}?",
        )
        for level in (1, 2)
        for i in range(60)
    ]
    write(folder, "sft", [row | {"output": "<b>8", "correct": False} for row in problems])
    write(folder, "dpo", [row | {"output": THOUGHT} for row in problems])
    (folder / "history").mkdir(exist_ok=True)
    rows = "".join(f"{step},{9 / step:.3f},\n" for step in range(1, 900))
    (folder / "history/sft.csv").write_text(f"step,loss,val_loss\n0,,9\n{rows}900,,0.5\n")
    (folder / "metrics/sft.json").write_text('{"sft": {"steps": 1200000, "loss": 0.69314718}}')
    code, _, errors = run(folder, "sft", "dpo")
    assert code == 0, errors
    return (folder / "index.html").read_text(encoding="utf-8")


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    assert built(tmp_path) == built(tmp_path)


def test_a_page_asks_nothing_of_a_network(tmp_path: Path) -> None:
    page = Read(built(tmp_path))
    links = [value for _, a in page.tags for key, value in a.items() if key in ("src", "href")]
    assert links and all(link and link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\(|@import|https?://", " ".join(page.texts))


def test_the_page_shows_the_change_since_the_checkpoint_before(tmp_path: Path) -> None:
    page = Read(built(tmp_path))  # params.yaml says that dpo starts from models/sft
    assert page.texts.count("+100") == 2
    assert len(page.all("small", "change up")) == 2  # intervals 0 to 6 and 94 to 100: clear
    assert page.texts[page.texts.index("from ") + 2].strip() == "sft"


def test_the_same_prompts_are_shown_of_every_checkpoint(tmp_path: Path) -> None:
    page = Read(built(tmp_path))
    shown = page.all("article")
    assert len(shown) == 24
    kinds = [(a["data-kind"], a["data-language"]) for a in shown]
    assert {kinds.count(kind) for kind in kinds} == {6} and len({*kinds}) == 4
    assert {"小明有5个。1？", "小明有55个。1？"} <= {*page.texts}  # of 1, 3, ... 59: evenly
    assert len(page.all("li", "wrong")) == len(page.all("li", "right")) == 24
    assert page.texts.count("3+4") == page.texts.count("7") == 24  # thought and answer apart
    assert page.texts.count("<b>8") == 24 and not page.all("b", "8")


def test_what_reinforcement_did_to_a_prompt_is_shown_step_by_step(tmp_path: Path) -> None:
    write(tmp_path, "grpo", [prediction()])
    said = [("x", 0.0), (THOUGHT, 0.5), (THOUGHT, 0.5), (THOUGHT, 1.0)]
    rows = [
        {"step": 5 * n, "prompt": "小明?", "completion": text, "reward": reward}
        for n, (text, reward) in enumerate(said)
    ]
    rows += [row | {"prompt": "小红?", "completion": "x", "reward": 0.0} for row in rows]
    (tmp_path / "history").mkdir(exist_ok=True)
    file = tmp_path / "history/grpo.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, errors = run(tmp_path, "grpo")
    assert code == 0, errors
    page = (tmp_path / "index.html").read_text("utf-8")
    shown = re.sub(r'<span class="zh".*?</span>|<.*?>', " ", page.partition("小明?")[2])
    assert " ".join(shown.split()).startswith(
        "reward 0.00 → 1.00 step 0 · reward 0.00 x steps 5–10 · reward 0.50 3+4 7 "
        "step 15 · reward 1.00 as before "
        "小红? the same answer throughout steps 0–15 · reward 0.00 x"
    )
    file.write_text('{"step": 1}\n')
    assert (
        "history/grpo.jsonl:1: prompt is missing; run its stage again" in run(tmp_path, "grpo")[2]
    )


def test_both_languages_say_as_much(tmp_path: Path) -> None:
    page = Read(built(tmp_path))
    assert len(page.all("span", "en")) == len(page.all("span", "zh")) > 40


def test_a_page_of_nothing_is_one(tmp_path: Path) -> None:
    page = render(Results([], {}, {}, {}, []))
    assert "No checkpoint is evaluated yet." in page and "<article" not in page


def test_what_outputs_say_is_no_part_of_the_page(tmp_path: Path) -> None:
    bad = "</article><script>alert(1)</script>half a character"
    write(tmp_path, "sft", [prediction(output=bad, prompt=bad, answer=bad)])
    file = tmp_path / "predictions/sft.jsonl"
    file.write_text(file.read_text().replace("half a character", "\\ud83d"))
    code, _, errors = run(tmp_path, "sft")
    assert code == 0, errors
    assert len(Read((tmp_path / "index.html").read_text(encoding="utf-8")).all("script")) == 1


def test_a_model_that_does_not_end_takes_no_more_room_than_others(tmp_path: Path) -> None:
    write(tmp_path, "sft", [prediction(output=f"<think>{'a ' * 9999}</think>{'b ' * 9999}")])
    assert run(tmp_path, "sft")[0] == 0
    page = Read((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert [len(text) for text in page.texts if text.endswith("…")] == [500, 500]


# ---- drawings ----


def places(drawing: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, at)) for at in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawing)]


def test_a_chart_puts_points_where_they_belong() -> None:
    (left, top), (middle, half), (right, bottom) = places(
        line_chart([Line("x", [(0, 10), (5, 5), (10, 0)])])
    )
    assert left < middle < right and top < half < bottom
    assert (middle, half) == pytest.approx(((left + right) / 2, (top + bottom) / 2), abs=0.1)
    *_, (_, log_half), _ = places(line_chart([Line("x", [(0, 100), (5, 10), (9, 1)])], is_log=True))
    assert log_half == pytest.approx(half, abs=0.1)


@pytest.mark.parametrize("points", [[], [(3, 2)], [(1, 0), (2, 0)], [(1, 1e-9), (2, 1e9)]])
def test_a_chart_of_odd_points_is_drawn(points: list[tuple[float, float]]) -> None:
    for is_log in (False, True):
        drawing = line_chart([Line("<x>", points)], is_log)
        assert "nan" not in drawing and "<x>" not in drawing


def test_a_long_line_keeps_its_ends() -> None:
    drawing = line_chart([Line("x", [(step, step) for step in range(100_000)])])
    assert "step 0: 0<" in drawing and "step 99999: 1e+05<" in drawing and len(drawing) < 50_000


def test_a_graph_is_drawn_from_above_to_below() -> None:
    labels = {name: ("", "done", f"#{name}") for name in "abcd"}
    drawing = graph_drawing([("a", "b"), ("b", "c"), ("a", "c")], labels, "graph")
    heights = dict(re.findall(r'href="#(\w)".*?y="([\d.]+)"', drawing))
    assert float(heights["a"]) < float(heights["b"]) < float(heights["c"])
    assert drawing.count('class="edge"') == 3 and {*heights} == {*labels}


# ---- of a workspace ----


def test_what_trains_is_read_from_its_resume_checkpoint(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    for stage, age in (("sft", 0), ("dpo", 3600), ("lora", 0)):
        folder = tmp_path / f".resume/{stage}/0f0f"
        for step in (1, 2) if stage != "lora" else ():
            values = folder / f"checkpoint-{step:09d}/values.json"
            values.parent.mkdir(parents=True)
            history = {"rows": rows[:step]}
            values.write_text("seal\n" + json.dumps({"step": step, "history": history}) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        lease = folder.with_suffix(".lease")
        lease.touch()
        os.utime(lease, (time.time() - age,) * 2)
    assert live_histories(tmp_path) == {"lora": [], "sft": rows}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return small_project(tmp_path)


def workspace_page(folder: Path) -> Path:
    """The page of a small project with results."""
    built(small_project(folder))
    minimind(folder, "report")
    return folder / "reports/workspace.html"


def small_project(tmp_path: Path) -> Path:
    """A small graph, nothing of it run, in git."""
    stages: dict[str, Any] = {
        "encode": {
            "foreach": ["sft"],
            "do": {"cmd": "true", "deps": ["a"], "outs": ["data/encoded/sft"]},
        },
        "sft": {"cmd": "true", "deps": ["data/encoded/sft"], "outs": ["models/sft"]},
        "evaluate": {
            "foreach": {"sft": "models/sft"},
            "do": {"cmd": "true", "deps": ["${item}"], "outs": ["predictions/${key}.jsonl"]},
        },
    }
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (tmp_path / "params.yaml").write_text("sft: {init: models/pretrain, lr: 1.0e-3}\n")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "init", "-q")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (tmp_path / ".gitignore").write_text("/reports/\n/.dvc/tmp\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "<first> & only")
    return tmp_path


def test_the_page_of_a_workspace_before_and_after_a_result(workspace: Path) -> None:
    printed = minimind(workspace, "report")
    assert printed.startswith("reports/workspace.html: 0.0 MiB")
    text = (workspace / "reports/workspace.html").read_text(encoding="utf-8")
    page = Read(text)
    assert "No checkpoint is evaluated yet." in text and "&lt;first&gt; &amp; only" in text
    nodes = [a["href"] for a in page.all("a") if (a["href"] or "").startswith("#stage-")]
    rows = [f"#{a['id']}" for a in page.all("tr") if a.get("id")]
    assert (
        sorted(nodes) == sorted(rows) == ["#stage-encode@sft", "#stage-evaluate@sft", "#stage-sft"]
    )
    write(workspace, "sft", [prediction()])
    minimind(workspace, "report", "--output", "site/index.html")
    text = (workspace / "site/index.html").read_text(encoding="utf-8")
    assert len(Read(text).all("article")) == 1 and "http-equiv" not in text


def test_experiments_stand_beside_the_workspace(workspace: Path) -> None:
    write(workspace, "sft", [prediction()])
    git(workspace, "add", "-Af", "metrics")
    git(workspace, "commit", "-qm", "run")
    clone = clone_of(workspace, workspace / "clone")
    (clone / "params.yaml").write_text("sft: {init: models/pretrain, lr: 0.5, seed: 2}\n")
    write(clone, "sft", [prediction(correct=False)])
    git(clone, "commit", "-qam", "experiment")
    baseline = git(workspace, "rev-parse", "HEAD").strip()
    ref = f"refs/exps/{baseline[:2]}/{baseline[2:]}/bold-lr"
    git(workspace, "fetch", "-q", str(clone), f"HEAD:{ref}")
    git(workspace, "update-ref", "refs/exps/exec/EXEC_HEAD", baseline)
    (found,) = experiments(workspace)
    assert found.name == "bold-lr"
    assert found.params == [("sft.lr", 1e-3, 0.5), ("sft.seed", None, 2)]
    assert found.metrics == [("sft.exact_l1", 1.0, 0.0)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "reports/index.html"], "is what stage report writes; name another file."),
        (["--seconds", "0"], "Invalid value for '--seconds'"),
    ],
)
def test_misuse_is_told(workspace: Path, arguments: list[str], said: str) -> None:
    assert said in minimind(workspace, "report", *arguments, expect=1 + (said[0] == "I"))


def test_a_folder_that_is_no_project_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report"])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert "run from the project's root folder" in result.stderr
