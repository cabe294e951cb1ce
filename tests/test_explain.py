"""`minimind explain`: revisions of a small graph that differ in what is known."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.evaluation.wilson import wilson_interval
from tests.project import git

GRAPH = """
stages:
  encode:
    cmd: >-
      sort ${data.sft} > encoded.txt && printf '{"encode": {"sft": {"rows": %d,
      "eval_overlap_rows": 1}}}' $(wc -l < encoded.txt) > metrics/encode.json
    params: [data]
    deps: [code/encode.json, '${data.sft}', '${data.problems}']
    outs: [encoded.txt]
    metrics: [metrics/encode.json: {cache: false}]
  sft:
    cmd: mkdir -p models/sft && grep sft params.yaml | cat - encoded.txt > models/sft/weights
    params: [sft]
    deps: [code/sft.json, encoded.txt]
    outs: [models/sft]
  evaluate:
    cmd: >-
      cp answers.jsonl predictions.jsonl && printf '{"sft": {"exact": 0.%d, "loss": 1}}'
      $(cksum < models/sft/weights | cut -c 1-3) > metrics/evaluate.json
    deps: [models/sft, answers.jsonl]
    outs: [predictions.jsonl]
    metrics: [metrics/evaluate.json: {cache: false}]
  other:
    cmd: cat shards/*.jsonl other.txt > shown.txt
    deps: [shards, other.txt]
    outs: [shown.txt]
"""
PREDICTIONS = [
    {"task": None, "level": None, "correct": n < 3, "choice_correct": None, "problem": str(n)}
    for n in range(10)
]
FILES = {
    "dvc.yaml": GRAPH,
    # A graph that is asked for by name: no stage of it is out of date because it has never run.
    "aside/dvc.yaml": "stages: {never: {cmd: exit 1, deps: [../other.txt]}}\n",
    "params.yaml": "data: {sft: chats.jsonl, problems: problems.jsonl}\nsft: {lr: 1e-3, n: [1]}\n",
    "chats.jsonl": '{"n": 1}\n{"n": 2}\n{"n": 2}\n{"n": 3}\n',
    "elsewhere.jsonl": '{"n": 1}\n{"n": 2}\n{"n": 9}\n',
    "problems.jsonl": '{"prompt": "1"}\n',
    "answers.jsonl": "".join(json.dumps(row) + "\n" for row in PREDICTIONS),
    "other.txt": "1",
    "shards/a.jsonl": '{"a": 1}\n{"a": 2}\n',
    "shards/部/b.jsonl": '{"b": 1}\n',
    "code/encode.json": '{"minimind.files": "aa", "stages.encode": "bb"}',
    "code/sft.json": '{"minimind.files": "aa", "stages.sft": "cc"}',
    "metrics/.gitkeep": "",
    ".gitignore": "/runs\n",
}


def write(files: dict[str, str]) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")


def edit(name: str, before: str, now: str) -> None:
    text = Path(name).read_text(encoding="utf-8")
    assert before in text
    Path(name).write_text(text.replace(before, now), encoding="utf-8")


def run(tag: str) -> None:
    with Repo() as repo:
        repo.reproduce()
    git(Path(), "add", "-A")
    git(Path(), "commit", "-qm", tag, "--allow-empty")
    git(Path(), "tag", tag)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project whose tags `empty`, without dvc.lock, and `base` are what others differ from."""
    project = tmp_path_factory.mktemp("explain") / "whole"
    project.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        for key in ("user.name", "user.email"):  # of the commits that DVC makes for experiments
            patch.setenv(f"GIT_CONFIG_KEY_{int(key == 'user.email')}", key)
            patch.setenv(f"GIT_CONFIG_VALUE_{int(key == 'user.email')}", "test@example.org")
        git(project, "init", "-q")
        write(FILES)
        with Repo.init(".") as repo:
            repo.add("shards")
        edit("shards.dvc", "outs:", "desc: Some rows\nmeta: {license: CC-BY-4.0}\nouts:")
        git(project, "add", "-A")
        git(project, "commit", "-qm", "empty")
        git(project, "tag", "empty")
        run("base")
    return project


@pytest.fixture
def project(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(whole, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def said(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["explain", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == (code != 0)
    return result.stderr if code else result.stdout


def explained(*arguments: str) -> dict[str, Any]:
    return json.loads(said(*arguments, "--json"))


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["verdict"] for stage in found["stages"]}


REACHED = dict.fromkeys(("sft", "evaluate"), "outputs changed")
UNREACHED = dict.fromkeys(("encode", "sft", "evaluate", "other"), "not reached")


def test_nothing_differs_from_itself(project: Path) -> None:
    found = explained("base", "HEAD")
    assert verdicts(found) == UNREACHED
    assert not any(found[kind] for kind in ("params", "data", "code", "files", "metrics", "notes"))
    assert said("base", "HEAD").endswith("nothing differs\n")
    assert explained()["out_of_date"] == {}  # HEAD and the workspace


def test_a_parameter_reaches_what_depends_on_it_and_what_it_did_is_seen(project: Path) -> None:
    edit("params.yaml", "1e-3", "5e-4")
    run("lr")
    found = explained("base", "lr")
    assert verdicts(found) == UNREACHED | REACHED
    assert found["params"] == [{"name": "sft.lr", "before": 1e-3, "now": 5e-4, "stages": ["sft"]}]
    because = {stage["stage"]: stage["because"] for stage in found["stages"]}
    assert because["sft"] == ["sft.lr"]
    assert because["evaluate"] == ["models/sft"]
    (metric,) = found["metrics"]  # the loss is what it was
    assert (metric["file"], metric["name"]) == ("metrics/evaluate.json", "sft.exact")
    low, high = wilson_interval(0.3, 10)
    assert metric["half_width"] == pytest.approx((high - low) / 2)
    back = explained("lr", "base")
    assert (back["params"][0]["before"], back["params"][0]["now"]) == (5e-4, 1e-3)
    assert (back["metrics"][0]["before"], back["metrics"][0]["now"]) == (
        metric["now"],
        metric["before"],
    )


@pytest.mark.parametrize(
    ("change", "path", "rows"),
    [
        (lambda: edit("chats.jsonl", '{"n": 3}', '{"n": 4}\n{"n": 5}'), "chats.jsonl", (1, 2)),
        (lambda: edit("chats.jsonl", '{"n": 2}\n{"n": 2}', '{"n": 2}'), "chats.jsonl", (1, 0)),
        (lambda: edit("chats.jsonl", '{"n": 1}\n', ""), "chats.jsonl", (1, 0)),
        (lambda: write({"shards/c.JSONL": '{"c": 1}\n', "shards/no.txt": "1\n"}), "shards", (0, 1)),
        (lambda: Path("shards/a.jsonl").rename("shards/z.jsonl"), "shards", (0, 0)),
        (lambda: edit("params.yaml", "sft: chats", "sft: elsewhere"), "elsewhere.jsonl", (2, 1)),
    ],
)
def test_rows_that_were_added_and_removed_are_counted(
    project: Path, change: Callable[[], Any], path: str, rows: tuple[int, int]
) -> None:
    change()
    if path == "shards":
        with Repo() as repo:
            repo.add("shards")
    run("rows")
    for found, back in [(explained("base", "rows"), False), (explained("rows", "base"), True)]:
        (data,) = found["data"]
        counted = (data["removed"], data["added"])
        assert counted == (rows[::-1] if back else rows)
        assert data["before" if back else "now"] == path
        assert bool(data["note"]) == (rows == (0, 0))
        assert found["files"] == []


def test_rows_in_another_order_reach_a_stage_that_writes_the_same(project: Path) -> None:
    edit("chats.jsonl", '{"n": 1}\n{"n": 2}\n', '{"n": 2}\n{"n": 1}\n')
    run("order")
    found = explained("base", "order")
    assert verdicts(found) == UNREACHED | {"encode": "same outputs"}
    assert "order" in found["data"][0]["note"]


def test_modules_of_code_and_other_files_are_roots(project: Path) -> None:
    edit("code/encode.json", "bb", "b2")
    edit("code/encode.json", "aa", "a2")
    edit("code/sft.json", '"aa", "stages.sft"', '"a2", "stages.new"')
    edit("other.txt", "1", "2")
    run("code")
    found = explained("base", "code")
    assert [
        (root["name"], root["before"], root["now"], root["stages"]) for root in found["code"]
    ] == [
        ("minimind.files", "aa", "a2", ["encode", "sft"]),
        ("stages.encode", "bb", "b2", ["encode"]),
        ("stages.new", None, "cc", ["sft"]),
        ("stages.sft", "cc", None, ["sft"]),
    ]
    assert [root["name"] for root in found["files"]] == ["other.txt"]
    assert verdicts(found) == UNREACHED | {
        "encode": "same outputs",
        "sft": "same outputs",
        "other": "outputs changed",
    }


def test_modules_are_known_of_code_that_ran_before_it_was_committed(project: Path) -> None:
    edit("code/sft.json", "cc", "c2")
    with Repo() as repo:
        repo.reproduce()
    git(project, "commit", "-qm", "lock", "dvc.lock")
    (module,) = explained("base", "HEAD")["code"]
    assert (module["name"], module["before"], module["now"]) == ("stages.sft", "cc", "c2")
    Path("code/sft.json").unlink()  # in no commit, and lost
    (sft,) = [s for s in explained("base", "HEAD")["stages"] if s["stage"] == "sft"]
    assert sft["because"] == ["code/sft.json"]


def test_stages_come_go_and_are_renamed(project: Path) -> None:
    edit("dvc.yaml", "  evaluate:", "  measure:")
    edit("dvc.yaml", "  other:", "  new:")
    edit("dvc.yaml", "shown.txt", "shown_2.txt")
    edit("dvc.yaml", "cat shards/*.jsonl other.txt", "cat other.txt")
    Path("dvc.lock").unlink()  # DVC leaves entries of stages that are gone
    run("stages")
    found = explained("base", "stages")
    expected = {"encode", "sft", "measure"}
    assert verdicts(found) == {
        **dict.fromkeys(expected, "not reached"),
        "new": "new",
        "other": "removed",
    }
    assert [stage["was"] for stage in found["stages"] if stage["stage"] == "measure"] == [
        "evaluate"
    ]
    assert "evaluate → measure" in said("base", "stages")


def test_a_metric_alone_and_a_command_alone(project: Path) -> None:
    edit("metrics/evaluate.json", '"loss": 1', '"loss": 2')
    git(project, "commit", "-qam", "metric")
    found = explained("base", "HEAD")
    assert [metric["name"] for metric in found["metrics"]] == ["sft.loss"]
    assert verdicts(found) == UNREACHED
    edit("dvc.yaml", "cat shards", "true && cat shards")
    run("command")
    (other,) = [s for s in explained("base", "command")["stages"] if s["stage"] == "other"]
    assert (other["verdict"], other["because"]) == ("same outputs", ["its command"])


def test_an_experiment_and_the_workspace_are_revisions(project: Path) -> None:
    edit("params.yaml", "1e-3", "5e-4")
    with Repo() as repo:
        repo.reproduce()
        repo.experiments.save(name="slow")
    git(project, "reset", "-q", "--hard")
    found = explained("base", "slow")
    assert [root["name"] for root in found["params"]] == ["sft.lr"]
    assert [root["now"] for root in explained("slow")["params"]] == [1e-3]
    for first, second in [("base", "slow"), ("slow", "workspace")]:
        header = rf" *\| +{first} *\| +{second} *\|"  # what is shown names its sides: slow is newer
        shown = said(first, second)
        assert re.search(rf"parameter{header} read by", shown), shown
        assert re.search(rf"metrics *\| {header} change", shown), shown
        assert f"over problems, of {second}; no seeds" in shown
        assert "not reached: same inputs, same outputs (2): encode, other" in shown


def test_the_workspace_says_what_has_not_run(project: Path) -> None:
    edit("params.yaml", "1e-3", "5e-4")
    edit("chats.jsonl", '{"n": 3}', '{"n": 4}')
    edit("dvc.yaml", "cat shards", "true && cat shards")
    shutil.rmtree("models")  # as while its stage runs: it is not out of date for that
    found = explained()
    assert found["out_of_date"] == {
        "encode": ["chats.jsonl"],
        "sft": ["sft"],
        "other": ["its command"],
    }
    assert verdicts(found) == UNREACHED  # by dvc.lock, which is as it was
    assert "chats.jsonl" in said()
    Path("metrics/evaluate.json").unlink()  # as while its stage runs
    assert explained()["metrics"] == []
    edit("chats.jsonl", '{"n": 4}', '{"n": 3}')
    edit("params.yaml", "5e-4", "1e-3")
    assert [*explained()["out_of_date"]] == ["other"]


def test_data_edited_since_it_was_used_is_not_counted(project: Path) -> None:
    edit("chats.jsonl", '{"n": 3}', '{"n": 4}')
    with Repo() as repo:
        repo.reproduce()
    edit("chats.jsonl", '{"n": 4}', '{"n": 5}')
    (data,) = explained()["data"]
    assert (data["added"], data["note"]) == (None, "edited since it was used")


def test_the_first_commit_had_run_nothing(project: Path) -> None:
    found = explained("empty", "base")
    assert set(verdicts(found).values()) == {"new"}
    assert found["notes"] == ["empty has no dvc.lock: no stage had run"]
    assert set(verdicts(explained("base", "empty")).values()) == {"removed"}


def test_data_is_read_from_the_remote_and_what_is_nowhere_is_said(
    project: Path, tmp_path: Path
) -> None:
    write({"shards/c.jsonl": '{"c": 1}\n'})
    with Repo() as repo:
        repo.add("shards")
    run("rows")
    Path(".dvc/config").write_text(
        f"[core]\n    remote = there\n['remote \"there\"']\n    url = {tmp_path / 'remote'}\n"
    )  # not committed: it counts for all revisions
    shutil.move(".dvc/cache", tmp_path / "remote")
    counted = explained("base", "rows")
    assert [(data["removed"], data["added"]) for data in counted["data"]] == [(0, 1)]
    shutil.rmtree(tmp_path / "remote")
    shutil.rmtree(".dvc/cache", ignore_errors=True)
    (data,) = explained("base", "rows")["data"]
    assert data["added"] is None
    assert "dvc fetch --all-commits shards" in data["note"]
    Path(".dvc/config").write_text("")
    (data,) = explained("base", "rows")["data"]
    assert "none is configured (`dvc remote add`)" in data["note"]


def test_no_lock_of_dvc_is_waited_for(project: Path) -> None:
    """A stage that runs holds them, or DVC does around it."""
    busy = {"pid": os.getppid(), "cmd": "dvc repro"}
    paths = [str(project / path) for path in ("models/sft", "encoded.txt", "chats.jsonl")]
    Path(".dvc/tmp").mkdir(exist_ok=True)
    Path(".dvc/tmp/rwlock").write_text(json.dumps({path: {"write": busy} for path in paths}))
    with Repo() as repo, repo.lock:
        assert verdicts(explained("base", "workspace")) == UNREACHED
        assert explained("sft")["verdict"][2] == "whole"


def test_of_a_stage_that_runs_nothing_is_counted_twice_or_in_part(project: Path) -> None:
    writer = {"pid": os.getpid(), "cmd": "dvc repro"}
    users = {"write": {str(project.resolve() / "encoded.txt"): writer}, "read": {}}
    write({".dvc/tmp/rwlock": json.dumps(users)})
    assert explained("encoded.txt")["training_rows"] == 4
    edit("metrics/encode.json", "4", "7")  # it has ended, and DVC has not recorded it
    edit("chats.jsonl", '{"n": 3}', '{"n": 4}\n{"n": 5}')
    found = explained("encoded.txt")
    assert found["running"] == ["encode"]
    assert found["training_rows"] == 0
    assert [node["rows"] for node in nodes(found["output"])] == [None, None]
    found = explained()
    assert found["metrics"] == []
    assert found["notes"] == ["stages that run: encode; what they write is left out"]


def test_metrics_are_shown_where_what_reads_them_has_not_run_yet(project: Path) -> None:
    edit("dvc.yaml", "deps: [shards, other.txt]", "deps: [shards, metrics/evaluate.json]")
    run("more")
    edit("params.yaml", "1e-3", "5e-4")
    with Repo() as repo:
        repo.reproduce(["evaluate"])
    found = explained()
    assert [*found["out_of_date"]] == ["other"]
    assert [metric["name"] for metric in found["metrics"]] == ["sft.exact"]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    "command", ["explain", "plan", "repro", "seeds 1", "compare a main", "push"]
)
def test_without_a_commit_the_command_for_one_is_named(
    project: Path, command: str, begun: bool
) -> None:
    shutil.rmtree(".git")
    write({"params.yaml": f"seed: 1\n{FILES['params.yaml']}"})
    if begun:
        git(project, "init", "-q")
    if begun and command in ("plan", "repro", "push"):
        return  # these need none
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert '`git init && git add -A && git commit -m "Start"`' in result.stderr
    assert "fatal" not in result.stderr


@pytest.mark.parametrize("name", ["no-such", "HEAD~9", "0123abc", "-", "models/no"])
def test_what_is_no_revision_is_one_line(project: Path, name: str) -> None:
    assert f"{name} is no revision, experiment or checkpoint here" in said("base", name, code=1)


def test_a_shallow_clone_and_no_git_are_one_line(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{project}", str(clone))
    monkeypatch.chdir(clone)
    assert "--unshallow" in said("HEAD~1", code=1)
    assert explained("HEAD", "HEAD")["metrics"] == []
    shutil.rmtree(clone / ".git")
    (clone / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    assert "in no git repository" in said("HEAD", code=1)
    monkeypatch.chdir(tmp_path)
    said("HEAD", code=1)  # no project at all


def test_broken_metrics_are_said(project: Path) -> None:
    Path("metrics/evaluate.json").write_text("{")
    git(project, "commit", "-qam", "broken")
    assert "metrics/evaluate.json of HEAD cannot be read" in explained("base", "HEAD")["notes"][0]


def test_a_broken_dvc_lock_is_one_line(project: Path) -> None:
    for text in ("stages: [1]\n", "<<<<<<< HEAD\nstages:\n", "stages: {sft: {outs: 1}}\n"):
        Path("dvc.lock").write_text(text)
        git(project, "commit", "-qam", "broken")
        assert "dvc.lock" in said("base", "HEAD", code=1)


def nodes(ancestor: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield ancestor
    for inner in ancestor["made_of"]:
        yield from nodes(inner)


def test_a_checkpoint_has_its_ancestry(project: Path) -> None:
    found = explained("models/sft/")
    assert found == explained("sft")
    of = {node["path"]: node for node in nodes(found["output"])}
    assert [*of] == ["models/sft", "encoded.txt", "chats.jsonl"]  # problems are not trained on
    assert of["chats.jsonl"]["rows"] == 4
    assert of["encoded.txt"]["compared_with"] == ["problems.jsonl"]
    assert (found["overlap_rows"], found["training_rows"]) == (1, 4)
    assert of["models/sft"]["params"] == {"sft.lr": 1e-3, "sft.n": [1]}
    assert of["models/sft"]["num_modules"] == 2
    assert found["commit"].split()[0] == git(project, "rev-parse", "--short", "base").strip()
    assert found["verdict"][2] == "whole"
    Path("models/sft/weights").write_text("other")
    assert explained("sft")["verdict"][2] == "broken"


def test_data_has_its_licence_and_description(project: Path) -> None:
    other, shards = explained("shown.txt")["output"]["made_of"]
    assert (other["license"], other["desc"], other["rows"]) == (None, None, None)
    assert (shards["license"], shards["desc"], shards["rows"]) == ("CC-BY-4.0", "Some rows", 3)
    assert "license CC-BY-4.0" in said("shown.txt")


def test_a_terminal_a_pipe_and_markdown_say_the_same(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit("params.yaml", "[1]", "[1, 2]")  # brackets are no markup
    edit("chats.jsonl", '{"n": 3}', '{"n": 4}')
    run("both")
    shown = [said("base", "both"), said("base", "both", "--md")]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    shown.append(said("base", "both"))
    for text in shown:
        assert all(word in text for word in ("sft.n", "[1, 2]", "chats.jsonl", "evaluate", "±"))
    assert "### Stages" in shown[1]
    assert "encoded.txt" in said("sft")
