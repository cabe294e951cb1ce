"""The everyday commands, on a tiny configuration: what runs again, and that bytes are the same."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.project import copy_project, dvc, file_bytes, git, stages_run

RESULTS = ("models", "metrics", "history", "predictions")
# One worker: the tests share a project, and each leaves it as it found it.
pytestmark = pytest.mark.xdist_group("project")
AFTER_REASON = ["reason", "evaluate@reason"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project whose chain has run, in a folder with spaces in its name."""
    directory = tmp_path_factory.mktemp("a folder") / "with spaces"
    copy_project(directory)
    dvc(directory, "repro")
    git(directory, "add", "-A")
    git(directory, "commit", "-qm", "run")
    return directory


def forget_runs(project: Path) -> None:
    """Empty DVC's run-cache, so that what is asked for really runs."""
    shutil.rmtree(project / ".dvc" / "cache" / "runs", ignore_errors=True)


def test_a_second_repro_runs_nothing_and_git_sees_no_weights(project: Path) -> None:
    printed = dvc(project, "repro")
    assert stages_run(printed) == []
    assert "up to date" in printed
    assert git(project, "status", "--porcelain") == ""


def test_from_scratch_gives_the_same_bytes(project: Path) -> None:
    before = file_bytes(project, *RESULTS)
    assert any(name.endswith("model.safetensors") for name in before)
    forget_runs(project)
    printed = dvc(project, "repro", "--force")
    assert "pretrain" in stages_run(printed)
    assert file_bytes(project, *RESULTS) == before
    assert git(project, "status", "--porcelain") == ""


def test_runtime_settings_run_nothing_again(project: Path) -> None:
    environment = {
        "MINIMIND_LOG_SECONDS": "1",
        "MINIMIND_DEVICE": "cpu",
        "MINIMIND_THREADS": "2",
        "MINIMIND_SAVE_SECONDS": "5",
    }
    assert stages_run(dvc(project, "repro", **environment)) == []


def test_an_experiment_runs_what_depends_on_it_and_nothing_else(project: Path) -> None:
    printed = dvc(project, "exp", "run", "-S", "reason.lr=1e-6")
    assert stages_run(printed) == AFTER_REASON
    changed = json.loads(dvc(project, "metrics", "diff", "--json").splitlines()[-1])
    assert set(changed) <= {"metrics/reason.json", "metrics/evaluate/reason.json"}
    columns = {name for values in changed.values() for name in values}
    assert "reason.loss" in columns
    in_workspace = file_bytes(project, "models/reason", "metrics", "history")

    def result_of_an_experiment(*how: str) -> dict[str, bytes]:
        git(project, "checkout", "-q", ".")
        dvc(project, "checkout")
        forget_runs(project)
        name = how[0].strip("-")
        printed = dvc(project, "exp", "run", *how, "-n", name, "-S", "reason.lr=1e-6")
        if name == "queue":
            assert stages_run(printed) == []
            dvc(project, "queue", "start")
            dvc(project, "queue", "logs", name, "--follow")
        dvc(project, "exp", "apply", name)
        return file_bytes(project, "models/reason", "metrics", "history")

    assert result_of_an_experiment("--temp") == in_workspace
    assert result_of_an_experiment("--queue") == in_workspace
    git(project, "checkout", "-q", ".")
    dvc(project, "checkout")


def test_where_a_stage_starts_from_rewires_the_graph(project: Path) -> None:
    printed = dvc(project, "exp", "run", "-S", "reason.init=models/sft")
    assert stages_run(printed) == ["check", *AFTER_REASON]
    lock = yaml.safe_load((project / "dvc.lock").read_text(encoding="utf-8"))
    assert "models/sft" in [dep["path"] for dep in lock["stages"]["reason"]["deps"]]
    git(project, "checkout", "-q", ".")
    dvc(project, "checkout")


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("reason.init", "dpo", "write models/dpo."),
        ("encode.tokenizer", "tokenizer", "write models/tokenizer."),
        (
            "data.sft",
            "data/chats.jsonl",
            "write the path of something that is there, or that a stage",
        ),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line_and_nothing_is_run_or_lost(
    project: Path, key: str, value: str, advice: str
) -> None:
    """DVC alone would remove the stage's outputs, then say `[Errno 2]`."""
    before = file_bytes(project, *RESULTS)
    printed = dvc(project, "exp", "run", "-S", f"{key}={value}", expect=255)
    assert stages_run(printed) == ["check"]
    said = f"check: params.yaml: {key} is {value!r}, a path that does not exist and that no stage"
    (line,) = (line for line in printed.splitlines() if line.startswith("check: "))
    assert line.startswith(f"{said} makes; {advice}")
    assert "Errno" not in printed
    assert file_bytes(project, *RESULTS) == before
    git(project, "checkout", "-q", ".")
    assert stages_run(dvc(project, "repro")) == []  # what check had written comes from the cache


def test_in_a_fresh_clone_it_is_said_before_anything_is_run(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "project")
    text = (project / "params.yaml").read_text(encoding="utf-8")
    (project / "params.yaml").write_text(text.replace("init: models/dpo", "init: dpo"))
    assert stages_run(dvc(project, "repro", expect=255)) == ["code", "check"]
    assert stages_run(dvc(project, "repro", "evaluate@sft", expect=255)) == ["check"]


def test_a_stage_runs_on_read_only_links_after_a_checkout(project: Path) -> None:
    shutil.rmtree(project / "models")
    shutil.rmtree(project / "data")
    dvc(project, "checkout")
    weights = project / "models" / "sft" / "model.safetensors"
    assert weights.stat().st_mode & 0o222 == 0
    before = file_bytes(project, *RESULTS)
    forget_runs(project)
    assert stages_run(dvc(project, "repro", "--force", "--single-item", "dpo")) == ["dpo"]
    assert file_bytes(project, *RESULTS) == before


@pytest.mark.parametrize("name", ["mine.jsonl", "数据 [1]/it's $(touch executed) 对话.jsonl"])
def test_your_own_file_takes_the_same_door(project: Path, name: str) -> None:
    own = project / name
    own.parent.mkdir(exist_ok=True)
    chat = {
        "conversations": [
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "您好！"},
        ]
    }
    own.write_text(json.dumps(chat, ensure_ascii=False) + "\n", encoding="utf-8")
    printed = dvc(project, "exp", "run", "-S", f'data.sft="{name}"', "encode@sft")
    assert stages_run(printed) == ["check", "encode@sft"]
    counts = json.loads((project / "metrics/encode/sft.json").read_text())["encode"]["sft"]
    assert counts["rows"] == 1
    assert not (project / "executed").exists()
    git(project, "checkout", "-q", ".")
    own.unlink()
    dvc(project, "checkout")
