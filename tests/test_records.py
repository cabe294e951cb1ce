"""An edit between the end of a stage's command and DVC's hashing: the next stage refuses."""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from dvc.utils.serialize import dumps_yaml, loads_yaml

from minimind.errors import UserError
from minimind.lineage.dvc_files import read_as_written
from minimind.lineage.records import MOST_EARLIER, MadeFrom, Records, record_of
from minimind.lineage.verify import Project
from tests.project import copy_project, dvc, git, minimind, share, stages_run
from tests.test_report import prediction, write

pytestmark = pytest.mark.xdist_group("records")
STAGES = {"code", "check", "mini_world", "tokenizer", "encode@pretrain", "pretrain", "encode@sft"}
ANOTHER_LINE = "\nUNUSED = 1\n"
FAILED = 255  # DVC's exit code


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = copy_project(tmp_path_factory.mktemp("records") / "whole")
    assert {*stages_run(dvc(project, "repro", *STAGES))} == STAGES
    git(project, "add", "-A")
    git(project, "commit", "-qm", "run")
    return project


@pytest.fixture
def project(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "project", symlinks=True)
    return tmp_path / "project"


def change_graph(project: Path, stage: str, command: str) -> None:
    """Extend a stage's command by another that the shell runs at the first time alone."""
    file = project / "dvc.yaml"
    graph = yaml.safe_load(file.read_text(encoding="utf-8"))
    definition = graph["stages"][stage.partition("@")[0]]
    definition = definition.get("do", definition)
    commands = definition["cmd"] if isinstance(definition["cmd"], list) else [definition["cmd"]]
    definition["cmd"] = [*commands[:-1], f"{commands[-1]} && (test -e edited || ({command}))"]
    file.write_text(yaml.safe_dump(graph, sort_keys=False), encoding="utf-8")


@pytest.mark.parametrize(
    ("stage", "command", "following", "changed", "made"),
    [
        (
            "mini_world",
            "echo >> code/mini_world.json",
            "tokenizer",
            "code/mini_world.json",
            "data/mini_world, metrics/mini_world.json",
        ),
        (
            "mini_world",
            "sed -i 's/^seed: 1/seed: 2/' params.yaml",
            "tokenizer",
            "seed in params.yaml",
            "data/mini_world, metrics/mini_world.json",
        ),
        (
            "encode@pretrain",
            "sed -i 's/on_bad_row: error/on_bad_row: skip/' params.yaml",
            "pretrain",
            "data.on_bad_row in params.yaml",
            "data/encoded/pretrain, metrics/encode/pretrain.json",
        ),
        (
            "pretrain",
            "sed -i 's/}/ }/' data/encoded/pretrain/meta.json",
            "encode@sft",
            "data/encoded/pretrain/meta.json",
            "history/pretrain.csv, metrics/pretrain.json, models/pretrain",
        ),
    ],
)
def test_the_next_stage_refuses(
    project: Path, stage: str, command: str, following: str, changed: str, made: str
) -> None:
    change_graph(project, stage, f"touch edited; {command}")
    force = ["repro", "--force", "--single-item"]
    printed = dvc(project, *force, stage, following, expect=FAILED)
    assert stages_run(printed) == [stage, following]
    advised = f"dvc repro --force --single-item {stage}"
    line = (
        f"{following.partition('@')[0]}: {changed} changed after stage {stage} had ended and "
        f"before DVC recorded it, so dvc.lock is wrong about what made {made}; run `{advised}`."
    )
    assert line in printed.splitlines()
    again = dvc(project, "repro", "--force", "--single-item", following, expect=FAILED)
    assert line in again.splitlines()
    dvc(project, *advised.split()[1:])
    dvc(project, "repro", "--single-item", following)


def test_an_ordinary_repro_is_compared_and_goes_on(project: Path) -> None:
    assert {*stages_run(dvc(project, "repro", "--force", *STAGES))} == STAGES
    records = [json.loads(file.read_text()) for file in (project / "runs").glob("*.json")]
    assert {record["dvc"]["stage"] for record in records} == STAGES
    assert len({(record["dvc"]["pid"], record["dvc"]["created"]) for record in records}) == 1
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    for record in records:
        entry = lock[record["dvc"]["stage"]]
        assert record["metrics_md5"] in [out["md5"] for out in entry["outs"]]
        files = {dep["path"]: dep["md5"] for dep in entry["deps"] if dep["path"] in record["files"]}
        stage = record["dvc"]["stage"].partition("@")[0]
        assert stage == "code" or f"code/{stage}.json" in files
        assert files.items() <= record["files"].items()


def test_a_lock_that_git_has_brought_back_is_no_false_one(project: Path) -> None:
    edit_code_of_mini_world(project)
    assert "mini_world" in stages_run(dvc(project, "repro", "mini_world"))
    git(project, "checkout", "-q", ".")
    assert what_verify_says(project, "mini_world") == []
    assert stages_run(dvc(project, "repro", "--force", "encode@sft")) != []


def test_outputs_of_before_a_pull_are_only_out_of_date(project: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(project, theirs, symlinks=True)
    params = theirs / "params.yaml"
    text = params.read_text(encoding="utf-8")
    params.write_text(re.sub(r"(\npretrain:(\n  .*)*\n  lr: )", r"\g<1>1", text), "utf-8")
    assert "pretrain" in stages_run(dvc(theirs, "repro", "pretrain"))
    git(theirs, "commit", "-qam", "another rate")
    git(project, "pull", "-q", str(theirs), "HEAD")
    (text,) = [f.text for f in Project(project).findings() if f.subject == "models/pretrain"]
    found = {f.subject: f.verdict for f in Project(project).findings()}
    assert found["models/pretrain"] == "out of date"
    assert re.search(r"is \(\w+\), of another run, but dvc\.lock says", text)
    weights = project / "models/pretrain/model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes() + b"x")
    found = {f.subject: f.verdict for f in Project(project).findings()}
    assert found["models/pretrain"] == "broken"


@pytest.mark.parametrize("brought", ["by git", "by git and minimind pull"])
def test_an_entry_that_another_clone_wrote_is_no_false_one(
    project: Path, tmp_path: Path, brought: str
) -> None:
    """Of the same metrics, made by other code than those of the run that was here."""
    share(project, tmp_path / "store")
    theirs = tmp_path / "theirs"
    shutil.copytree(project, theirs, symlinks=True)
    edit_code_of_mini_world(theirs)
    assert "mini_world" in stages_run(dvc(theirs, "repro", "mini_world"))
    git(theirs, "commit", "-qam", "another line")
    minimind(theirs, "push")
    git(project, "pull", "-q", str(theirs), "HEAD")
    if brought != "by git":
        minimind(project, "pull")
        minimind(project, "pull")  # DVC brings all of it again
    assert what_verify_says(project, "mini_world") == []
    # What DVC writes here is still told from it.
    edit_code_of_mini_world(project)
    dvc(project, "repro", "code")
    dvc(project, "commit", "-q", "--force", "mini_world")
    minimind(project, "pull")
    said = "broken: runs/mini_world.json has another code/mini_world.json of stage mini_world"
    texts = what_verify_says(project, "mini_world")
    assert texts and all(text.startswith(said) for text in texts)


def commit_edited_code(project: Path) -> str:
    edit_code_of_mini_world(project)
    dvc(project, "commit", "-q", "--force", "code")
    return "code"


def commit_edited_metrics(project: Path) -> str:
    file = project / "metrics/pretrain.json"
    file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    dvc(project, "commit", "-q", "--force", "pretrain")
    return "pretrain"


def commit_another_parameter(project: Path) -> str:
    params = project / "params.yaml"
    text = params.read_text(encoding="utf-8")
    params.write_text(re.sub(r"(\npretrain:(\n  .*)*\n  lr: )", r"\g<1>1", text), "utf-8")
    dvc(project, "commit", "-q", "--force", "pretrain")
    return "pretrain"


def commit_it_twice(project: Path) -> str:
    """DVC's run cache has the false pair of the first time."""
    commit_another_parameter(project)
    git(project, "checkout", "-q", ".")
    dvc(project, "repro", "-q", "--force", "--single-item", "pretrain")
    return commit_another_parameter(project)


@pytest.mark.parametrize(
    "edit", [commit_edited_code, commit_edited_metrics, commit_another_parameter, commit_it_twice]
)
def test_what_dvc_was_told_to_commit_is_compared_with_the_run(
    project: Path, edit: Callable[[Path], str]
) -> None:
    stage = edit(project)
    said = f"broken: runs/{stage}.json has another "
    assert any(text.startswith(said) for text in what_verify_says(project, stage))
    git(project, "commit", "-qam", "A false entry")
    assert any(text.startswith(said) for text in what_verify_says(project, stage))


def edit_code_of_mini_world(project: Path) -> None:
    code = project / "minimind/mini_world/rows.py"
    code.write_text(code.read_text(encoding="utf-8") + ANOTHER_LINE, encoding="utf-8")


def what_verify_says(project: Path, stage: str) -> list[str]:
    """Verdicts and reasons that name a stage or its record."""
    found = [f"{finding.verdict}: {finding.text}" for finding in Project(project).findings()]
    return [text for text in found if re.search(rf"stage {stage}\b|runs/{stage}\.json", text)]


def test_an_experiment_leaves_what_the_runs_before_it_recorded(project: Path) -> None:
    """Git and DVC bring a workspace's models back, and with them goes the record of their run."""
    before = json.loads((project / "runs/pretrain.json").read_text(encoding="utf-8"))
    assert "pretrain" in stages_run(
        dvc(project, "exp", "run", "-S", "pretrain.lr=0.0011", "pretrain")
    )
    git(project, "checkout", "-q", ".")
    dvc(project, "checkout", "-q", "pretrain")
    entry = read_as_written(project / "dvc.lock")["stages"]["pretrain"]
    found = record_of(project, "pretrain", entry)
    assert found is not None
    assert found[1] == before
    assert found[0].first_difference(entry, project) is None


def test_records_that_are_put_aside_do_not_grow_without_end(tmp_path: Path) -> None:
    records = Records(tmp_path, "")
    numbers = range(MOST_EARLIER + 3)
    for number in numbers:
        for stage in ("encode", "encode@dpo"):
            made = {"metrics_md5": f"{number:032x}", "files": {}, "params": {}, "outs": {}}
            records.write(stage, made)
    for stage in ("encode", "encode@dpo"):
        entries = [{"outs": [{"path": "m.json", "md5": f"{number:032x}"}]} for number in numbers]
        kept = [number for number in numbers if record_of(tmp_path, stage, entries[number])]
        assert kept == [*numbers][-MOST_EARLIER - 1 :]  # and the last one


@pytest.mark.parametrize("recorded", [False, True])
def test_an_entry_that_dvc_has_not_made_anew_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """As after `dvc repro --keep-going`, when DVC could not record a stage that had ended."""
    monkeypatch.chdir(tmp_path)
    Path(".dvc/tmp").mkdir(parents=True)
    Path(".dvc/tmp/rwlock").write_text(json.dumps({"write": {"x": {"pid": os.getppid()}}}))
    record = {"metrics_md5": "1" * 32, "files": {"a.py": "2" * 32}, "params": {}, "outs": {}}
    Records(Path(), "sft").write("sft", record)
    entry = {
        "deps": [{"path": "a.py", "hash": "md5", "md5": "3" * 32}],
        "outs": [{"path": "models/sft", "hash": "md5", "md5": ("1" if recorded else "0") * 32}],
    }
    Path("dvc.lock").write_text(json.dumps({"stages": {"sft": entry}}))
    refused = pytest.raises(UserError, match=r"a\.py changed after stage sft had ended")
    with refused if recorded else nullcontext():
        Records(Path(), "dvc.yaml:dpo").refuse_false_lock()


REPORT = """
import minimind.report.report as report
import stages.report
from pathlib import Path

def edited(*given):
    file = Path("metrics/evaluate/sft.json")
    file.write_text(file.read_text() + " ")
    return report.checkpoint_section(*given)

stages.report.checkpoint_section = edited
stages.report.app()
"""


@pytest.mark.parametrize("is_edited", [False, True])
def test_the_report_notices_an_edit_while_it_is_written(project: Path, is_edited: bool) -> None:
    write(project, "sft", [prediction()])
    (project / "metrics/sft.json").write_text("{}")
    history = project / "history/sft.csv"
    history.parent.mkdir(exist_ok=True)
    history.exists() or history.write_text("step,loss\n1,2.5\n")
    (project / "edited.py").write_text(REPORT)
    command = "python edited.py" if is_edited else "python -m stages.report"
    graph = yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))
    graph["stages"]["report"] = {
        "cmd": f"{command} sft --evaluations metrics/evaluate --predictions predictions "
        "--training metrics --histories history --output reports/r.md --page reports/index.html",
        "deps": ["metrics/evaluate/sft.json", "predictions/sft.jsonl"],
        "outs": ["reports/r.md", "reports/index.html"],
    }
    del graph["stages"]["evaluate"]  # whose outputs these are
    (project / "dvc.yaml").write_text(yaml.safe_dump(graph), encoding="utf-8")
    printed = dvc(project, "repro", "report", expect=FAILED if is_edited else 0)
    line = "report: metrics/evaluate/sft.json changed while the stage was running"
    assert (line in printed) == is_edited
    lock = yaml.safe_load((project / "dvc.lock").read_text(encoding="utf-8"))
    assert ("report" in lock["stages"]) != is_edited
    assert (project / "runs/report.json").exists() != is_edited


def test_numbers_are_the_same_however_they_are_written(tmp_path: Path) -> None:
    """DVC writes values anew into dvc.lock."""
    params = """
a: {x: 5e-4, y: 1e-06, z: 1.0, n: [1_000, 0x10, 010], empty: , none: ~, other: null}
b: {yes: yes, quoted: 'yes', true: True, text: "5e-4 a", day: 2020-01-01, big: 9007199254740993}
c: &c {lr: 1}
d: {<<: *c, m: 2}
"""
    (tmp_path / "params.yaml").write_text(params)
    (tmp_path / "lock.yaml").write_text(dumps_yaml(loads_yaml(params)))
    before = {"params.yaml": read_as_written(tmp_path / "params.yaml")}
    record = MadeFrom({}, before)

    def difference() -> str | None:
        entry = {"params": {"params.yaml": read_as_written(tmp_path / "lock.yaml")}}
        return record.first_difference(entry)

    assert difference() is None
    text = (tmp_path / "lock.yaml").read_text()
    (tmp_path / "lock.yaml").write_text(text.replace("740993", "740992"))
    assert difference() == "b.big in params.yaml"
