"""`minimind verify` on a small graph that DVC has run: every kind of break is found and named."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
import zc.lockfile
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.lineage.dvc_files import listing_of, md5_of
from tests.graph import ROOT
from tests.project import dvc

STEP = """
import hashlib, pathlib, sys
*sources, target, metrics = map(pathlib.Path, sys.argv[1:])
texts = [file.read_text() for s in sources for file in sorted([s, *s.rglob("*")]) if file.is_file()]
target.mkdir(parents=True)
for name in ("config.json", "model.safetensors", "部/分.txt"):
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text(hashlib.sha256("".join([name, *texts]).encode()).hexdigest())
metrics.parent.mkdir(exist_ok=True)
metrics.write_text(str(len(texts)))
"""
GRAPH = """
stages:
  world:
    cmd: python step.py seed.txt data/world metrics/world.json
    params: [world]
    deps: [step.py, seed.txt]
    outs: [data/world]
    metrics: [metrics/world.json: {cache: false}]
  pretrain:
    cmd: python step.py data/world/config.json models/pretrain metrics/pretrain.json
    params: [pretrain.lr]
    deps: [step.py, data/world/config.json]
    outs: [models/pretrain]
    metrics: [metrics/pretrain.json: {cache: false}]
  sft:
    cmd: python step.py '${sft.init}' data/world models/sft metrics/sft.json
    params: [sft]
    deps: [step.py, '${sft.init}', data/world]
    outs: [models/sft]
    metrics: [metrics/sft.json: {cache: false}]
  export:
    foreach: [sft]
    do:
      cmd: python step.py models/${item} exports/${item} metrics/export-${item}.json
      deps: [other.py, 'models/${item}']
      outs: ['exports/${item}']
      metrics: ['metrics/export-${item}.json': {cache: false}]
  report:
    cmd: cp metrics/sft.json report.md
    deps: [metrics/sft.json]
    outs: [report.md]
"""
PARAMS = (
    "world: {seed: 1}\npretrain: {lr: 1e-06}\nsft: {init: models/pretrain, lr: 5.0e-4, n: [1, 2]}\n"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("verify") / "whole"
    project.mkdir()
    for name, text in {
        "step.py": STEP,
        "other.py": "# not run\n",
        "seed.txt": "1",
        "dvc.yaml": GRAPH,
        "params.yaml": PARAMS,
    }.items():
        (project / name).write_text(text, encoding="utf-8")
    dvc(project, "init", "--no-scm", "-q")
    dvc(project, "repro", "-q")
    return project


@pytest.fixture
def project(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "project")
    return tmp_path / "project"


def verify(project: Path) -> tuple[int, dict[str, str], str]:
    """Exit code, what is said of each checkpoint, and the line of the first break."""
    result = CliRunner().invoke(app, ["verify", str(project)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert result.stderr.count("\n") == (result.exit_code != 0)
    return result.exit_code, lines, result.stderr


def test_a_whole_project_is_traced_back_to_its_data(project: Path) -> None:
    code, lines, _ = verify(project)
    assert code == 0
    world = "data/world/config.json"
    assert lines == {
        "models/pretrain": f"as dvc.lock says; from {world} ← seed.txt",
        "models/sft": f"as dvc.lock says; from data/world, models/pretrain ← seed.txt, {world}",
        "exports/sft": "as dvc.lock says; from models/sft ← data/world, models/pretrain ← "
        f"seed.txt, {world}",
        "metrics": "4 files are as dvc.lock says",
    }


def flip_a_byte(project: Path) -> None:
    """As a disk does it: neither size nor times change."""
    file = project / "models/pretrain/model.safetensors"
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def edit(file: str, pattern: str, new: str) -> Callable[[Path], None]:
    def edited(project: Path) -> None:
        text = (project / file).read_text(encoding="utf-8")
        changed = re.sub(pattern, new, text, count=1, flags=re.DOTALL)
        assert changed != text
        (project / file).write_text(changed, encoding="utf-8")

    return edited


def edit_lock(stage: str, kind: str, index: int) -> Callable[[Path], None]:
    def edited(project: Path) -> None:
        lock = yaml.safe_load((project / "dvc.lock").read_text(encoding="utf-8"))
        lock["stages"][stage][kind][index]["md5"] = "0" * 32
        (project / "dvc.lock").write_text(yaml.safe_dump(lock), encoding="utf-8")

    return edited


def forget(stage: str) -> Callable[[Path], None]:
    def edited(project: Path) -> None:
        lock = yaml.safe_load((project / "dvc.lock").read_text(encoding="utf-8"))
        del lock["stages"][stage]
        (project / "dvc.lock").write_text(yaml.safe_dump(lock), encoding="utf-8")

    return edited


def run_upstream_alone(project: Path) -> None:
    edit("params.yaml", "1e-06", "2e-06")(project)
    edit("step.py", "len\\(texts\\)", "7")(project)
    (project / "step.py").write_text(STEP.replace('"".join([', '"".join(["x", '), encoding="utf-8")
    dvc(project, "repro", "-q", "--single-item", "pretrain")


def leave_record(stage: str, output: str, **contents: Any) -> Callable[[Path], None]:
    """Of the run that dvc.lock is of."""

    def left(project: Path) -> None:
        metrics = hashlib.md5((project / output).read_bytes()).hexdigest()
        record = {"metrics_md5": metrics, "files": {}, "params": {}, "dvc": None} | contents
        (project / "runs").mkdir()
        (project / f"runs/{stage}.json").write_text(json.dumps(record))

    return left


OTHER_INPUT = leave_record(
    "sft", "metrics/sft.json", files={"models/pretrain/config.json": "0" * 32}
)
ALL = {"models/pretrain", "models/sft", "exports/sft"}
BREAKS: dict[str, tuple[Callable[[Path], None], set[str], list[str]]] = {
    "a flipped byte in weights": (
        flip_a_byte,
        ALL,
        ["models/pretrain is (", "dvc.lock says (", "`dvc checkout models/pretrain`"],
    ),
    "an edited entry of an input": (
        edit_lock("sft", "deps", 1),
        {"models/sft", "exports/sft"},
        ["stage sft was run with models/pretrain (00000000)", "stage pretrain is ("],
    ),
    "an edited entry of an output": (
        edit_lock("sft", "outs", 1),
        {"models/sft", "exports/sft"},
        ["models/sft is (", "dvc.lock says (00000000)"],
    ),
    "edited code": (
        edit("step.py", "hexdigest", "hexdigest "),
        ALL,
        ["stage world was run with step.py (", "`dvc repro world`"],
    ),
    "edited code of the last stage alone": (
        edit("other.py", "not", "never"),
        {"exports/sft"},
        ["stage export@sft was run with other.py"],
    ),
    "edited data": (edit("seed.txt", "1", "2"), ALL, ["seed.txt"]),
    "missing data": (lambda p: (p / "seed.txt").unlink(), ALL, ["seed.txt", "is missing"]),
    "a changed parameter": (
        edit("params.yaml", "5.0e-4", "6.0e-4"),
        {"models/sft", "exports/sft"},
        ["sft.lr 0.0005, which now is 0.0006", "params.yaml"],
    ),
    "a parameter that is gone": (
        edit("params.yaml", "pretrain: {lr: 1e-06}", "pretrain: {}"),
        ALL,
        ["pretrain.lr 1e-06, which now is None"],
    ),
    "a stage that dvc.lock does not have": (
        forget("pretrain"),
        ALL,
        [
            "dvc.lock does not say that stage pretrain made metrics/pretrain.json: "
            "metrics/pretrain.json is there, so its entry is lost",
            "`dvc repro pretrain`",
        ],
    ),
    "a stage that dvc.lock does not have, nor anything else": (
        lambda p: (forget("report")(p), (p / "report.md").unlink()),
        {"report"},
        ["stage report made report.md: it was never run, or its entry is lost; `dvc repro report`"],
    ),
    "a stage that dvc.lock does not have, but its record": (
        lambda p: (leave_record("report", "report.md")(p), forget("report")(p)),
        {"report"},
        ["stage report made report.md: runs/report.json is there, so its entry is lost, or the"],
    ),
    "an upstream stage that ran again": (run_upstream_alone, ALL, ["stage world", "step.py"]),
    "a file of the data that was edited": (
        edit("data/world/model.safetensors", "^.", "x"),
        ALL,
        ["data/world is ("],
    ),
    "a file too many": (
        lambda p: (p / "models/sft/more").write_text("x"),
        {"models/sft", "exports/sft"},
        ["models/sft is ("],
    ),
    "edited metrics": (
        edit("metrics/sft.json", "$", "0"),
        {"models/sft", "exports/sft", "metrics"},
        ["metrics/sft.json"],
    ),
    "an edited output of a stage that no checkpoint comes of": (
        edit("report.md", "$", "0"),
        {"report"},
        ["report.md is (", "`dvc checkout report.md`"],
    ),
    "a record of another input": (
        OTHER_INPUT,
        {"models/sft", "exports/sft"},
        ["runs/sft.json has another models/pretrain/config.json of stage sft than dvc.lock has"],
    ),
    "a record of another parameter": (
        leave_record(
            "sft",
            "metrics/sft.json",
            params={
                "params.yaml": {"sft": {"init": "models/pretrain", "lr": "6e-4", "n": ["1", "2"]}}
            },
        ),
        {"models/sft", "exports/sft"},
        [
            "runs/sft.json has another sft.lr in params.yaml of stage sft than dvc.lock has",
            "`dvc repro --force --single-item sft`",
        ],
    ),
    "a record of a stage that no checkpoint comes of": (
        leave_record("report", "report.md", files={"metrics/sft.json": "0" * 32}),
        {"report"},
        ["another metrics/sft.json of stage report than dvc.lock has"],
    ),
}


OUT_OF_DATE = {  # DVC sees it, and runs the stages again; all else nobody may rely on
    "an edited entry of an input",
    "edited code",
    "edited code of the last stage alone",
    "edited data",
    "missing data",
    "a changed parameter",
    "a parameter that is gone",
    "a stage that dvc.lock does not have, nor anything else",
    "a stage that dvc.lock does not have, but its record",
    "an upstream stage that ran again",
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_found_and_named(project: Path, name: str) -> None:
    break_it, expected, named = BREAKS[name]
    break_it(project)
    code, lines, first = verify(project)
    assert code == 1
    verdict = "out of date" if name in OUT_OF_DATE else "broken"
    found = {subject for subject, text in lines.items() if text.startswith(f"{verdict.upper()}: ")}
    assert found == expected, lines
    assert first.startswith(f"minimind: {len(found)} of {len(lines)} {verdict}")
    for text in named:
        assert text in first


def test_what_is_broken_is_said_before_what_is_out_of_date(project: Path) -> None:
    edit("params.yaml", "5.0e-4", "6.0e-4")(project)
    flip_a_byte(project)
    code, lines, first = verify(project)
    assert code == 1
    assert all(lines[name].startswith("BROKEN: models/pretrain is (") for name in ALL)
    assert "3 of 4 broken" in first


@pytest.mark.parametrize("size", [100, 300, 1000])
def test_a_lock_that_is_cut_off_is_one_line(project: Path, size: int) -> None:
    whole = (project / "dvc.lock").read_bytes()
    for end in range(size, size + 60):
        (project / "dvc.lock").write_bytes(whole[:end])
        code, lines, first = verify(project)
        assert code == 1
        if whole[end - 1 : end] != b"\n":
            assert not lines
            assert re.search(r"dvc\.lock is (cut off after|not valid YAML)", first)


@pytest.mark.parametrize("command", ["verify", "plan", "explain workspace workspace"])
@pytest.mark.parametrize("num_lines", [0, 20])
def test_what_dvc_is_writing_is_read_when_it_has_written_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, command: str, num_lines: int
) -> None:
    monkeypatch.chdir(project)
    lock = project / "dvc.lock"
    whole = lock.read_bytes()
    held = zc.lockfile.LockFile(".dvc/tmp/lock")
    lock.write_bytes(b"".join(whole.splitlines(keepends=True)[:num_lines]))

    def write_the_rest() -> None:
        lock.write_bytes(whole)
        held.close()

    timer = threading.Timer(3.0, write_the_rest)
    timer.start()
    result = CliRunner().invoke(app, command.split())
    timer.join()
    assert result.exit_code == 0, result.output
    assert result.output == CliRunner().invoke(app, command.split()).output


def test_a_lock_that_is_cut_off_at_the_end_of_a_line_is_found(project: Path) -> None:
    lines = (project / "dvc.lock").read_bytes().splitlines(keepends=True)
    hashes = [number for number, line in enumerate(lines) if b"md5: " in line]
    for end in range(1, hashes[-1], 5):
        (project / "dvc.lock").write_bytes(b"".join(lines[:end]))
        assert verify(project)[0] == 1, b"".join(lines[:end])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}'])
def test_a_broken_list_of_dvcs_locks_is_one_line(project: Path, text: str) -> None:
    (project / ".dvc/tmp/rwlock").write_text(text)
    code, lines, _ = verify(project)
    assert code == 1
    assert "so that every command of DVC fails; when none runs, remove it" in lines["DVC"]
    edit("seed.txt", "1", "2")(project)
    assert "rwlock" in dvc(project, "repro", expect=255)
    edit("seed.txt", "2", "1")(project)
    (project / ".dvc/tmp/rwlock").write_text("{}")
    assert verify(project)[0] == 0


def fill_the_place_of_dvcs_folder(project: Path) -> None:
    shutil.rmtree(project / ".dvc/tmp")
    (project / ".dvc/tmp").write_text("a file")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda p: (p / ".dvc/config").write_text("[[["), "config file error"),
        (fill_the_place_of_dvcs_folder, "DVC cannot open the project"),
        (lambda p: (p / ".dvc").rename(p / "dvc"), "this is no DVC project"),
    ],
)
def test_what_keeps_dvc_from_the_project_is_one_line(
    project: Path, break_it: Callable[[Path], object], said: str
) -> None:
    break_it(project)
    code, lines, first = verify(project)
    assert code == 1
    assert lines["DVC"].startswith(f"BROKEN: {said}")
    assert first.startswith("minimind: 1 of ")


def test_a_lock_without_one_of_its_lines_is_found_or_one_line(project: Path) -> None:
    files = {path: md5_of(project / path) for path in ("step.py", "models/pretrain/config.json")}
    leave_record("sft", "metrics/sft.json", files=files)(project)
    lines = (project / "dvc.lock").read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines):
        if re.match(r" +(md5|path|- path|sft\.|lr|deps|outs|params)", line):
            rest = "".join(lines[:number] + lines[number + 1 :])
            (project / "dvc.lock").write_text(rest, encoding="utf-8")
            assert verify(project)[0] == 1, (number, line)


def test_only_the_upstream_ran_again(project: Path) -> None:
    """Its code and parameters are as its entry says; what came of its old result is not."""
    edit("params.yaml", "1e-06", "2e-06")(project)
    lock = yaml.safe_load((project / "dvc.lock").read_text(encoding="utf-8"))
    lock["stages"]["pretrain"]["params"]["params.yaml"]["pretrain.lr"] = 2e-06
    (project / "models/pretrain/config.json").chmod(0o644)
    (project / "models/pretrain/config.json").write_text("another result")
    (project / "dvc.lock").write_text(yaml.safe_dump(lock), encoding="utf-8")
    dvc(project, "commit", "-q", "-f", "pretrain")
    code, lines, first = verify(project)
    assert code == 1
    assert lines["models/pretrain"].startswith("as dvc.lock says")
    assert lines["models/sft"].startswith("OUT OF DATE: stage sft was run with models/pretrain (")
    assert "`dvc repro sft` makes it anew" in first


def test_an_output_that_was_edited_and_committed_is_found(project: Path) -> None:
    out = {"models/sft": md5_of(project / "models/sft")}
    leave_record("sft", "metrics/sft.json", outs=out)(project)
    assert verify(project)[0] == 0
    edit("models/sft/model.safetensors", "^.", "x")(project)
    dvc(project, "commit", "-q", "-f", "sft")
    code, lines, first = verify(project)
    assert code == 1
    assert "runs/sft.json has another models/sft of stage sft than dvc.lock has" in first
    assert lines["models/pretrain"].startswith("as dvc.lock says")


@pytest.mark.parametrize("too", ["", ".dvc/cache"])  # a clone that has run nothing has neither
def test_what_is_not_here_is_no_break(project: Path, too: str) -> None:
    for folder in filter(None, ("models", "data", "exports", too)):
        shutil.rmtree(project / folder)
    code, lines, _ = verify(project)
    assert code == 0
    brings = "`dvc repro sft` brings it"
    brings = brings if too else f"`dvc checkout models/sft` or {brings}"
    assert lines["models/sft"].startswith(f"not here: {brings}; recorded from")
    with (project / ".dvc/config").open("a") as config:
        config.write("[core]\n    remote = there\n")
    if too:
        brings = f"`dvc pull models/sft` or {brings}"
    assert verify(project)[1]["models/sft"].startswith(f"not here: {brings}")


@pytest.mark.parametrize("is_alive", [True, False])
def test_what_a_stage_that_runs_writes_is_not_judged(project: Path, is_alive: bool) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    writer = {"pid": os.getpid() if is_alive else ended.pid, "cmd": "dvc repro"}
    writes = {str(project.resolve() / path): writer for path in ("models/sft", "metrics/sft.json")}
    (project / ".dvc/tmp/rwlock").write_text(json.dumps({"write": writes, "read": {}}))
    edit("metrics/sft.json", "$", " ")(project)
    shutil.rmtree(project / "models/sft")
    code, lines, _ = verify(project)
    if is_alive:
        assert lines["DVC"] == "it runs sft: what these write is not looked at"
        assert lines["models/sft"].startswith("in the making")
        assert code == 0
    else:
        assert "DVC" not in lines
        assert code == 1


def test_paths_in_commands_are_quoted(project: Path) -> None:
    for file in (project / "dvc.yaml", project / "dvc.lock"):
        file.write_text(file.read_text("utf-8").replace("models/sft", "models/s f t"), "utf-8")
    shutil.move(project / "models/sft", project / "models/s f t")
    flip = project / "models/s f t/config.json"
    flip.chmod(0o644)
    flip.write_text("{}")
    assert "`dvc checkout 'models/s f t'` brings that back" in verify(project)[2]
    shutil.rmtree(project / "models/s f t")
    assert "`dvc checkout 'models/s f t'` or" in verify(project)[1]["models/s f t"]


def test_what_python_leaves_beside_code_is_no_break(project: Path) -> None:
    (project / "data/world/__pycache__").mkdir()
    (project / "data/world/__pycache__/step.pyc").write_bytes(b"compiled")
    assert verify(project)[0] == 0


def test_a_record_of_another_run_is_no_evidence(project: Path) -> None:
    OTHER_INPUT(project)
    edit("runs/sft.json", '"metrics_md5": ".', '"metrics_md5": "x')(project)
    assert verify(project)[0] == 0


def test_a_record_that_agrees_is_no_break(project: Path) -> None:
    params = {"sft": {"init": "models/pretrain", "lr": "5.0e-4", "n": ["1", "2"]}}
    listed = {
        f"models/pretrain/{n}": md5 for n, md5 in listing_of(project / "models/pretrain").items()
    }
    files = {"step.py": md5_of(project / "step.py"), **listed}
    leave_record("sft", "metrics/sft.json", files=files, params={"params.yaml": params})(project)
    assert verify(project)[0] == 0


def test_a_record_of_an_earlier_version_is_not_read(project: Path) -> None:
    OTHER_INPUT(project)
    edit("runs/sft.json", '"files"', '"inputs"')(project)
    assert verify(project)[0] == 0


@pytest.mark.parametrize("text", [None, "", "a: [", "stages: 3\n", "schema: '2.0'\n"])
def test_without_a_lock_there_is_nothing_to_verify(project: Path, text: str | None) -> None:
    (project / "dvc.lock").unlink()
    if text is not None:
        (project / "dvc.lock").write_text(text)
    code, lines, first = verify(project)
    assert code == 1
    assert not lines
    assert "dvc.lock" in first


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def with_hook(project: Path, top: Path) -> None:
    """All that git is to keep is committed, and git checks each commit from now on."""
    ignored = ["/models", "/exports", "/data/world", "/.dvc", "/report.md", "/runs"]
    (project / ".gitignore").write_text("\n".join(ignored), encoding="utf-8")
    git(top, "init", "-q")
    git(top, "add", "-A")
    assert git(top, "commit", "-qm", "whole").returncode == 0
    assert CliRunner().invoke(app, ["verify", str(project), "--install-hook"]).exit_code == 0


def run_again(project: Path) -> None:
    edit("params.yaml", "5.0e-4", "6.0e-4")(project)
    edit("step.py", "len\\(texts\\)", "7")(project)
    edit("step.py", "name, [*]texts", "name, *texts, name")(project)
    dvc(project, "repro", "-q")


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("staged", ["metrics", "dvc.lock"])
def test_git_commits_only_what_agrees(project: Path, staged: str, below: bool) -> None:
    """Whatever lies in the workspace: it is whole here."""
    top = project.parent if below else project
    with_hook(project, top)
    run_again(project)
    assert verify(project)[0] == 0
    git(project, "add", staged)
    refused = git(project, "commit", "-qm", "half")
    assert refused.returncode == 1
    assert re.search(r"broken; the first: metrics/.* is \(", refused.stderr)
    git(project, "reset", "-q")
    assert git(project, "commit", "-qm", "half", staged).returncode == 1  # an index of its own
    assert git(project, "commit", "-qam", "whole").returncode == 0
    assert git(project, "status", "--porcelain").stdout == ""


@pytest.mark.parametrize("below", [False, True])
def test_what_is_not_staged_keeps_git_from_nothing(project: Path, below: bool) -> None:
    with_hook(project, project.parent if below else project)
    (project / "notes.md").write_text("staged")
    git(project, "add", "notes.md")
    run_again(project)
    edit("metrics/sft.json", "$", "0")(project)
    assert verify(project)[0] == 1
    done = git(project, "commit", "-qm", "notes")
    assert done.returncode == 0, done.stderr
    git(project, "add", "-A")
    assert git(project, "commit", "-qm", "edited metrics").returncode == 1


def test_weights_that_are_not_what_they_were_are_found_by_the_hook(project: Path) -> None:
    with_hook(project, project)
    edit("params.yaml", "5.0e-4", "6.0e-4")(project)
    assert git(project, "commit", "-qam", "out of date").returncode == 0
    flip_a_byte(project)
    refused = git(project, "commit", "-q", "--allow-empty", "-m", "false")
    assert refused.returncode == 1
    assert "models/pretrain is (" in refused.stderr
    (project / "dvc.lock").write_text("stages: {", encoding="utf-8")
    assert "staged dvc.lock is" in git(project, "commit", "-qam", "cut off").stderr


def test_a_staged_lock_is_not_taken_for_that_of_the_workspace(project: Path) -> None:
    outs = {"models/sft": md5_of(project / "models/sft")}
    leave_record("sft", "metrics/sft.json", outs=outs)(project)
    with_hook(project, project)
    whole = (project / "dvc.lock").read_bytes()
    edit_lock("sft", "outs", 1)(project)
    git(project, "add", "dvc.lock")
    (project / "dvc.lock").write_bytes(whole)
    assert "models/sft" in git(project, "commit", "-qm", "an invented hash").stderr
    git(project, "reset", "-q")
    git(project, "rm", "-q", "--cached", "dvc.lock")
    assert "git would commit no dvc.lock" in git(project, "commit", "-qm", "none").stderr
    git(project, "add", "dvc.lock")
    assert git(project, "commit", "--allow-empty", "-qm", "whole").returncode == 0


def test_the_hook_works_in_a_worktree(project: Path, tmp_path: Path) -> None:
    with_hook(project, project)
    tree = tmp_path / "tree"
    assert git(project, "worktree", "add", "-q", str(tree)).returncode == 0
    edit("params.yaml", "5.0e-4", "6.0e-4")(tree)
    assert git(tree, "commit", "-qam", "out of date").returncode == 0
    edit("metrics/sft.json", "$", "0")(tree)
    git(tree, "add", "metrics")
    edit("metrics/sft.json", "0$", "")(tree)
    assert "metrics/sft.json is (" in git(tree, "commit", "-qm", "false").stderr


def test_another_hook_is_left_alone(project: Path) -> None:
    install = ["verify", str(project), "--install-hook"]
    assert "in no git repository" in CliRunner().invoke(app, install).stderr
    with_hook(project, project)
    assert CliRunner().invoke(app, install).exit_code == 0  # it is ours
    hook = project / ".git/hooks/pre-commit"
    for other in (b"\xff\xfe", b"#!/bin/sh\ntrue\n"):
        hook.write_bytes(other)
        assert "is there already; add this line to it" in CliRunner().invoke(app, install).stderr
        assert hook.read_bytes() == other
    empty = CliRunner().invoke(app, ["verify", str(project.parent), "--install-hook"])
    assert "dvc.lock is missing" in empty.stderr


def test_metrics_that_are_missing_are_named(project: Path) -> None:
    (project / "metrics/sft.json").unlink()
    code, lines, _ = verify(project)
    assert code == 1
    assert lines["metrics"].startswith("OUT OF DATE: metrics/sft.json is missing; `git checkout")


@pytest.mark.parametrize(
    "entry",
    ["outs: 3", "deps: [3]", "outs: [{md5: x}]", "params: [1]", "outs: [{path: a, md5: 1}]"],
)
def test_an_entry_that_dvc_never_writes_is_one_line(project: Path, entry: str) -> None:
    (project / "dvc.lock").write_text(f"schema: '2.0'\nstages: {{sft: {{{entry}}}}}\n")
    code, lines, first = verify(project)
    assert (code, lines) == (1, {})
    assert "dvc.lock: the entry of stage sft is not as DVC writes it" in first


@pytest.mark.parametrize("stage", ["", "3", "{foreach: [a]}", "{cmd: a, outs: [{}]}", "{outs: 3}"])
def test_a_stage_that_is_none_is_one_line(project: Path, stage: str) -> None:
    (project / "dvc.yaml").write_text(f"stages:\n  sft: {stage}\n")
    code, lines, first = verify(project)
    assert (code, lines) == (1, {})
    assert "dvc.yaml has " in first


def test_a_value_that_yaml_cannot_make_is_one_line(project: Path) -> None:
    (project / "dvc.lock").write_text("stages: {sft: {cmd: !!int ''}}\n")
    assert "dvc.lock is not valid YAML" in verify(project)[2]
