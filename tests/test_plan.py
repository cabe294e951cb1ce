"""`minimind plan`: its verdicts are held against what `dvc repro` then does."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, nullcontext
from pathlib import Path

import pytest
import yaml
from dvc.exceptions import DvcException
from dvc.repo import Repo
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.cli.plan import edited_params
from minimind.orchestrate.graph import load_graph
from minimind.orchestrate.plan import EditedFiles, Planned, plan
from tests.project import copy_project, dvc, minimind, stages_run

STEP = """
import pathlib, sys, yaml
*sources, target = sys.argv[1:]
params = yaml.safe_load(open("params.yaml"))
def contents(source):
    path = pathlib.Path(source)
    if not path.exists():
        return str(params[source])
    return "".join(file.read_text() for file in sorted([path, *path.rglob("*")]) if file.is_file())
text, target = "".join(map(contents, sources)), pathlib.Path(target)
target.parent.mkdir(exist_ok=True, parents=True)
if target.suffix:
    target.write_text(str(len(text)))
else:
    for name in ("one.txt", "部/two.txt"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(name + text)
"""
GRAPH = """
vars: [other.yaml]
stages:
  world:
    cmd: python step.py seed.txt world data/world
    deps: [step.py, seed.txt]
    params: [world]
    outs: [data/world]
  fixed:
    cmd: python step.py fixed.txt data/fixed.txt
    params: [check]
    deps: [fixed.txt]
    outs: [data/fixed.txt]
    meta: {output: constant}
  train:
    foreach: {a: 1, b: 2}
    do:
      cmd: python step.py data/world/one.txt data/fixed.txt ${key}.txt ${key} models/${key}
      deps: [data/world/one.txt, data/fixed.txt, '${key}.txt']
      params: ['${key}']
      outs: ['models/${key}']
  measure:
    cmd: python step.py ${measured} metrics/length.json
    deps: ['${measured}']
    metrics: [metrics/length.json: {cache: false}]
  report:
    cmd: python step.py metrics/length.json report.txt
    deps: [metrics/length.json]
    outs: [report.txt]
"""
FILES = {
    "step.py": STEP,
    "dvc.yaml": GRAPH,
    "params.yaml": "world: {n: 1} # of both\ncheck: 1\na: {lr: 1.0e-3}\nb: {lr: 1.0e-3}\n",
    "other.yaml": "measured: models/a\n",
    "seed.txt": "1",
    "fixed.txt": "fixed",
    "a.txt": "a",
    "b.txt": "b",
}
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, python_in_path: None) -> Path:
    """A project that has run with `world.n` of 0, and then with 1."""
    project = tmp_path_factory.mktemp("plan") / "whole"
    project.mkdir()
    for name, text in FILES.items():
        (project / name).write_text(text, encoding="utf-8")
    Repo.init(str(project), no_scm=True)
    for before, n in [("n: 1", "n: 0"), ("n: 0", "n: 1")]:
        edit("params.yaml", before, n)(project)
        run()(project)
    return project


@pytest.fixture(autouse=True, scope="module")
def python_in_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
        yield


@pytest.fixture
def project(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(whole, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the command adds the folder
    return tmp_path / "project"


def planned(*overrides: str, targets: tuple[str, ...] = ()) -> dict[str, Planned]:
    with edited_params("", overrides) as edited:
        repo = Repo(".", fs=EditedFiles({name: file.read_text() for name, file in edited.items()}))
        return {p.stage: p for p in plan(repo, load_graph(repo, targets))}


def workspace(project: Path) -> dict[str, tuple[int, bytes]]:
    """Times and contents of all files but those that DVC keeps to itself."""
    files = (f for f in sorted(project.rglob("*")) if f.is_file() and ".dvc" not in f.parts)
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def edit(file: str, pattern: str, new: str) -> Change:
    def edited(project: Path) -> None:
        text = (project / file).read_text(encoding="utf-8")
        assert pattern in text
        (project / file).unlink()  # it may be a link into the cache
        (project / file).write_text(text.replace(pattern, new), encoding="utf-8")

    return edited


def remove(path: str) -> Change:
    def removed(project: Path) -> None:
        target = project / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return removed


def cut_lock(stage: str) -> Change:
    def cut(project: Path) -> None:
        lock = yaml.safe_load((project / "dvc.lock").read_text(encoding="utf-8"))
        del lock["stages"][stage]
        (project / "dvc.lock").write_text(yaml.safe_dump(lock), encoding="utf-8")

    return cut


def several(*changes: Change) -> Change:
    return lambda project: [change(project) for change in changes]


def run(*targets: str) -> Change:
    def ran(project: Path) -> None:
        with chdir(project):
            Repo(".").reproduce([*targets], on_error="keep-going")

    return ran


def nothing(project: Path) -> None:
    pass


N_TO_0 = edit("params.yaml", "n: 1", "n: 0")
N_TO_2 = edit("params.yaml", "n: 1", "n: 2")
LR_OF_A = edit("params.yaml", "a: {lr: 1.0e-3", "a: {lr: 2.0e-3")
LR_OF_A_BACK = edit("params.yaml", "a: {lr: 2.0e-3", "a: {lr: 1.0e-3")
NO_RUN_CACHE = remove(".dvc/cache/runs")
RUNS, CACHED, MAYBE, FAILS = "runs", "from cache", "runs if its inputs change", "fails"
BELOW_A = {"measure": MAYBE, "report": MAYBE}
BELOW_WORLD = {"train@a": MAYBE, "train@b": MAYBE, **BELOW_A}
ABOVE_REPORT = ("world", "train@a", "train@b", "measure")
ALL = (*ABOVE_REPORT, "report", "fixed")
# What is changed, and the verdicts on all stages that do not stay unchanged.
CHANGES: dict[str, tuple[Change, dict[str, str]]] = {
    "nothing": (nothing, {}),
    "a parameter": (LR_OF_A, {"train@a": RUNS, **BELOW_A}),
    "a parameter and back": (several(LR_OF_A, LR_OF_A_BACK), {}),
    "a parameter, run, and back": (
        several(LR_OF_A, run(), LR_OF_A_BACK),
        {"train@a": CACHED, "measure": CACHED},  # whose result has the same length
    ),
    "a parameter more": (
        edit("params.yaml", "b: {lr: 1.0e-3", "b: {k: null, lr: 1.0e-3"),
        {"train@b": RUNS},
    ),
    "a parameter less": (edit("params.yaml", "b: {lr: 1.0e-3}", ""), {"train@b": FAILS}),
    "a comment in params.yaml": (edit("params.yaml", "of both", "of all"), {}),
    "another way to write a number": (edit("params.yaml", "1.0e-3", "0.001"), {}),
    "a file": (edit("seed.txt", "1", "2"), {"world": RUNS, **BELOW_WORLD}),
    "a file and back": (several(edit("seed.txt", "1", "2"), edit("seed.txt", "2", "1")), {}),
    "a file that is gone": (remove("b.txt"), {"train@b": FAILS}),
    "the code": (edit("step.py", "import", "#\nimport"), {"world": RUNS, **BELOW_WORLD}),
    "an output removed": (remove("models/a"), {"train@a": CACHED}),
    "an output removed, the cache too": (
        several(remove("models/a"), remove(".dvc/cache/files")),
        # What is there is not in the cache, and so is made again; metrics are in no cache.
        dict.fromkeys(ALL, RUNS) | {"measure": MAYBE},
    ),
    "a fresh clone": (
        several(
            # Trained on what a constant stage makes alone: that is not there, but known.
            edit("dvc.yaml", "step.py data/world/one.txt data/fixed", "step.py data/fixed"),
            edit("dvc.yaml", "[data/world/one.txt, data/fixed.txt,", "[data/fixed.txt,"),
            run(),
            *map(remove, ("data/world", "data/fixed.txt", "models", "report.txt", ".dvc/cache")),
        ),
        dict.fromkeys(ALL, RUNS) | {"measure": MAYBE},
    ),
    "an output edited": (edit("models/b/one.txt", "one", "uno"), {"train@b": CACHED}),
    "a metric edited": (edit("metrics/length.json", "8", "7"), {"measure": CACHED}),
    "a metric removed": (remove("metrics/length.json"), {"measure": CACHED}),
    "a command": (
        edit("dvc.yaml", "python step.py fixed.txt", "python  step.py fixed.txt"),
        {"fixed": RUNS},
    ),
    "a constant stage's parameter": (edit("params.yaml", "check: 1", "check: 2"), {"fixed": RUNS}),
    "a constant stage's file": (
        edit("fixed.txt", "fixed", "other"),
        {"fixed": RUNS, "train@a": MAYBE, "train@b": MAYBE, **BELOW_A},
    ),
    "another stage": (
        edit("dvc.yaml", "a: 1, b: 2", "a: 1, b: 2, c: 3"),
        {"train@c": FAILS},
    ),
    "a variant more": (
        several(
            edit("dvc.yaml", "a: 1, b: 2", "a: 1, b: 2, c: 3"),
            edit("params.yaml", "check: 1", "c: 1\ncheck: 1"),
            lambda project: (project / "c.txt").write_text("c"),
        ),
        {"train@c": RUNS},
    ),
    "vars": (edit("other.yaml", "models/a", "models/b"), {"measure": RUNS, "report": MAYBE}),
    "frozen": (
        several(
            edit("dvc.yaml", "    params: [world]", "    frozen: true\n    params: [world]"), N_TO_2
        ),
        {},
    ),
    "always": (
        edit("dvc.yaml", "    params: [check]", "    always_changed: true\n    params: [check]"),
        {"fixed": RUNS},
    ),
    "dvc.lock removed": (
        remove("dvc.lock"),
        dict.fromkeys((*ABOVE_REPORT, "fixed", "report"), CACHED),
    ),
    "dvc.lock and run cache removed": (
        several(remove("dvc.lock"), NO_RUN_CACHE),
        dict.fromkeys(ALL, RUNS),
    ),
    "an entry cut from dvc.lock": (cut_lock("train@b"), {"train@b": CACHED}),
    "an entry cut, no run cache": (several(cut_lock("train@b"), NO_RUN_CACHE), {"train@b": RUNS}),
    "what ran before": (N_TO_0, dict.fromkeys(ABOVE_REPORT, CACHED)),  # the length is the same
    "what ran before, no run cache": (
        several(N_TO_0, NO_RUN_CACHE),
        {"world": RUNS, **BELOW_WORLD},
    ),
    "two parameters": (
        several(N_TO_2, LR_OF_A),
        {"world": RUNS, **BELOW_WORLD, "train@a": RUNS},
    ),
    "the same bytes again, and a parameter that ran with them": (
        several(LR_OF_A, run(), LR_OF_A_BACK, edit("step.py", "import", "#\nimport")),
        {"world": RUNS, **BELOW_WORLD},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_planned_is_what_dvc_does(
    project: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    edit_project, expected = CHANGES[change]
    edit_project(project)
    before = workspace(project)
    caplog.set_level("INFO", "dvc")
    with Repo(".").lock:  # as while stages run
        plans = planned()
    assert workspace(project) == before
    verdicts = {name: p.verdict for name, p in plans.items() if p.verdict != "unchanged"}
    caplog.clear()
    with pytest.raises(DvcException) if FAILS in verdicts.values() else nullcontext():
        run()(project)
    ran = [m.split("'")[1] for m in caplog.messages if m.startswith("Running stage")]
    restored = [m.split("'")[1] for m in caplog.messages if "is cached - skipping run" in m]
    for name, p in plans.items():
        did = RUNS if name in ran else CACHED if name in restored else "unchanged"
        may = {MAYBE: (RUNS, CACHED, "unchanged"), FAILS: ("unchanged",)}
        assert did in may.get(p.verdict, (p.verdict,)), f"{p}, and then it {did}"
    assert verdicts == expected


def test_overrides_are_planned_as_what_they_set(project: Path) -> None:
    before = workspace(project)
    plans = planned("a.lr=2e-3", "+b.k=1", "other.yaml:measured=models/b", targets=("report",))
    assert workspace(project) == before
    assert list(plans) == ["fixed", "world", "train@b", "measure", "report"]
    assert plans["train@b"].reasons == ["b.k: null -> 1"]
    assert plans["measure"].reasons == ["its command changed"]


def test_costs_are_of_what_ran_and_of_what_is_planned(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "minimind.orchestrate.costs.costs",
        lambda graph, stages, root, now, then, *rest: asked.append((now, then)) or {},
    )
    assert CliRunner().invoke(app, ["plan", "-S", "a.lr=2e-3"]).exit_code == 0
    ((now, then),) = asked
    assert (now["a"]["lr"], then["a"]["lr"]) == (2e-3, 1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "Stage 'nowhere' not found"),
        (["-S", "a.x=1"], "-S a.x=1: "),
        (["-S", "nowhere.yaml:a=1"], "nowhere.yaml"),
        (["--preset", "nowhere"], "there is no preset 'nowhere'"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(
    project: Path, arguments: list[str], said: str
) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_wrong_value_is_said_before_anything_is_planned_or_run(tmp_path: Path) -> None:
    project = copy_project(tmp_path)
    wrong = ("-S", "reason.lr=abc", "-S", "++sft.nonsense=1")
    said = minimind(project, "plan", *wrong, expect=1)
    assert said.count("\n") == 1
    assert said.startswith("minimind: params.yaml: sft.nonsense is not a known key; allowed are ")
    assert said.endswith("; reason.lr is 'abc'; it should be a number\n")
    minimind(project, "plan", "dpo", "-S", "reason.lr=abc")  # what needs no reason
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["reason"]["lr"] = "abc"
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    assert "reason.lr is 'abc'" in minimind(project, "repro", expect=1)
    assert not (project / "runs").exists()


@pytest.mark.parametrize("wrong", ["evaluate.text_checkpoints=[pretrian]", "data.sft=nowhere"])
def test_what_stage_check_would_refuse_is_said_in_the_same_words(
    tmp_path: Path, wrong: str
) -> None:
    project = copy_project(tmp_path)
    said = minimind(project, "plan", "-S", wrong, expect=1)
    key, _, value = wrong.partition("=")
    section, _, name = key.partition(".")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params[section][name] = yaml.safe_load(value)
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    done = subprocess.run(
        [sys.executable, "-m", "stages.check", "--output", "checked.txt"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.removeprefix("minimind: ") == done.stderr.removeprefix("check: ")


CODE_GRAPH = """
stages:
  code:
    cmd: python -m stages.code --output code
    deps: [minimind, stages]
    outs: [code: {cache: false, persist: true}]
  sft:
    cmd: echo sft > sft.txt
    deps: [code/sft.json]
    outs: [sft.txt]
  export:
    cmd: echo export > export.txt
    deps: [code/export.json]
    outs: [export.txt]
"""


def test_edited_code_runs_what_it_decides_and_names_the_module(tmp_path: Path) -> None:
    project = copy_project(tmp_path)
    (project / "dvc.yaml").write_text(CODE_GRAPH)
    dvc(project, "repro", "-q")

    def held_against_dvc() -> dict[str, tuple[str, list[str]]]:
        command = [sys.executable, "-m", "minimind.cli.main", "plan", "--json"]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
        stages = json.loads(done.stdout)["stages"]
        ran = stages_run(dvc(project, "repro"))
        assert ran == [stage["stage"] for stage in stages if stage["verdict"] == RUNS]
        return {stage["stage"]: (stage["verdict"], stage["reasons"]) for stage in stages}

    edit("minimind/training/fit.py", "\nimport math\n", "\nimport math  # comment\n")(project)
    assert held_against_dvc() == {
        "code": (RUNS, ["minimind changed"]),
        "sft": ("unchanged", []),
        "export": ("unchanged", []),
    }
    edit("minimind/training/fit.py", "batch_size: int = Field(16", "batch_size: int = Field(8")(
        project
    )
    assert held_against_dvc()["sft"] == (RUNS, ["code of minimind.training.fit"])
