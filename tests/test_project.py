"""A project outside the clone, on the built and installed wheel; and what is trained, shared."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.errors import UserError
from minimind.project.template import kept_files, shipped
from minimind.project.upgrade import Upgrade, apply_upgrade, create_project, plan_upgrade
from tests.graph import ROOT
from tests.project import clone_of, file_bytes, git, minimind, share, stages_run

pytestmark = pytest.mark.xdist_group("project")
TARGETS = ("encode@pretrain",)  # check, mini_world and tokenizer before it


class Installed:
    """The wheel in an environment of its own, with the libraries of this one."""

    def __init__(self, folder: Path) -> None:
        listed = git(ROOT, "ls-files", "-coz", "--exclude-standard").split("\0")
        for name in filter(None, listed):
            if (ROOT / name).is_file():
                (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        offline = ["--no-deps", "--no-index"]
        build = ["wheel", "--no-build-isolation", *offline, "-w", str(folder), "./source"]
        _run(folder, [*pip, *build])
        _run(folder, [sys.executable, "-m", "venv", "--without-pip", "venv"])
        self.python = folder / "venv" / "bin" / "python"
        asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.packages = Path(_run(folder, [str(self.python), "-c", asked]).strip())
        # Not their .pth files: the clone, which is installed there, is not seen.
        (self.packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
        wheel = next(folder.glob("*.whl"))
        into = ["--python", str(self.python), "install", "--ignore-installed", *offline]
        _run(folder, [*pip, *into, str(wheel)])

    def minimind(self, folder: Path, *arguments: str, expect: int = 0) -> str:
        return self.run(folder, "minimind.cli.main", *arguments, expect=expect)

    def run(self, folder: Path, *arguments: str, expect: int = 0) -> str:
        return _run(folder, [str(self.python), "-m", *arguments], expect)

    def edit(self, name: str, old: str, new: str) -> None:
        """As the next version would have it."""
        _replace(self.packages / "minimind" / name, old, new)


def _run(folder: Path, command: list[str], expect: int = 0) -> str:
    kept = ("DVC_", "MINIMIND_", "PYTHONPATH")
    path = f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith(kept)}
        | {"PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == expect, f"{command} gave {done.returncode}:\n{done.stdout}"
    return done.stdout


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def mine(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("projects")
    assert "minimind repro" in installed.minimind(folder, "init", "mine")
    mine = folder / "mine"
    installed.minimind(mine, "preset", "tiny")
    git(mine, "add", "-A")
    git(mine, "commit", "-qm", "Start")
    installed.minimind(mine, "repro", *TARGETS)
    return mine


def test_an_installed_package_runs_the_graph_of_a_project(installed: Installed, mine: Path) -> None:
    for name in ("launchers", "presets", "rewards"):
        assert (shipped(name)).is_dir() == (installed.packages / "minimind/shipped" / name).is_dir()
    assert "were up to date" in installed.minimind(mine, "repro", *TARGETS)
    assert "as dvc.lock says" in installed.minimind(mine, "verify", "--allow-older")
    installed.minimind(mine, "lint", "data/mini_world/sft.jsonl")
    assert "reports/workspace.html" in installed.minimind(mine, "report")
    again = installed.minimind(mine.parent, "init", "mine", expect=1)
    assert "has params.yaml, dvc.yaml" in again and again.count("\n") == 1


def test_a_teammate_trains_nothing_that_was_trained(
    installed: Installed, mine: Path, tmp_path: Path
) -> None:
    """A new clone and a folder as the remote: `dvc pull` brings outputs, and past runs."""
    share(mine, tmp_path / "store")
    first = file_bytes(mine, "models", "data")
    clone = clone_of(mine, tmp_path / "clone")
    minimind(clone, "pull")
    assert file_bytes(clone, "models", "data") == first
    assert not stages_run(installed.run(clone, "dvc", "repro", *TARGETS))
    # What dvc.lock does not say any more, past runs do: their metrics, too.
    (clone / "dvc.lock").unlink()
    printed = installed.run(clone, "dvc", "repro", *TARGETS)
    assert not stages_run(printed) and "is cached" in printed


def test_another_version_stops_a_stage_and_upgrade_brings_it(
    installed: Installed, mine: Path, tmp_path: Path
) -> None:
    project = clone_of(mine, tmp_path / "clone")
    installed.edit("chat/tokenizer_training.py", "\nimport", "\nNEW = 1\nimport")
    installed.edit("shipped/params.yaml", "\nsft:\n", "\nsft:\n  accumulation_steps: 2\n")
    stopped = installed.run(project, "dvc", "repro", "-f", "-s", "tokenizer", expect=255)
    assert "code/tokenizer.json is not of the code that is here" in stopped
    assert "`minimind upgrade` says what it changes" in stopped
    before = file_bytes(project, ".")
    said = installed.minimind(project, "upgrade", "--dry")
    assert {**file_bytes(project, "."), **before} == file_bytes(project, ".") == before
    assert "params.yaml: sft.accumulation_steps is new: 2" in said
    runs = dict(line.split(" | ") for line in said.splitlines() if line.startswith("| "))
    runs = {name.strip("| "): why.strip("| ") for name, why in runs.items()}
    assert runs["tokenizer"] == "code of minimind.chat.tokenizer_training"
    assert runs["encode@sft"] == "after tokenizer" and "mini_world" not in runs
    assert installed.minimind(project, "upgrade").startswith(said.rstrip())
    assert stages_run(installed.run(project, "dvc", "repro", "tokenizer"))[-1] == "tokenizer"
    assert "\n0 files and" in installed.minimind(project, "upgrade")


# ---- what an upgrade does, without the wheel ----


@pytest.fixture
def project(tmp_path: Path) -> Path:
    create_project(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the next version say something else in a file."""

    def change(name: str, old: str, new: str) -> None:
        files = kept_files()
        assert old in files[name]
        files[name] = files[name].replace(old, new, 1)
        monkeypatch.setattr("minimind.project.upgrade.kept_files", lambda: files)

    return change


def test_a_new_project_has_nothing_to_upgrade(project: Path) -> None:
    plan = plan_upgrade(project)
    assert plan == Upgrade(plan.before, plan.now)


def test_a_project_is_the_graph_without_the_clone(project: Path) -> None:
    graph = yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))
    shipped_graph = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    assert {*shipped_graph["stages"]} - {*graph["stages"]} == {"code"}
    for text in ((project / name).read_text() for name in ("dvc.yaml", "params.yaml")):
        assert "benchmarks/" not in text and "minimind/" not in text
    for name, stage in graph["stages"].items():
        deps = stage.get("do", stage)["deps"]
        digests = [dep for dep in deps if dep.startswith("code/")]
        assert len(digests) == 1 and (project / digests[0]).is_file(), name


def test_a_project_has_no_graph_but_its_own(project: Path) -> None:
    """What was shipped is kept in it: DVC would miss the metrics of a second dvc.yaml."""
    with Repo(str(project)) as repo:
        files = {stage.relpath for stage in repo.index.stages}
    assert {*map(os.path.relpath, (project / "dvc.yaml", project / "lm-eval/dvc.yaml"))} == files


def test_pages_that_a_project_names_are_there(project: Path) -> None:
    named = set()
    for name in ("params.yaml", "README.md", "README.zh.md", "rewards/custom.py"):
        named |= set(re.findall(r"docs/[\w.]+\.md", (project / name).read_text(encoding="utf-8")))
    assert named >= {"docs/data.md", "docs/settings.md"}
    for name in {*named, "docs/project.md"}:  # which push and pull name
        text = (project / name).read_text(encoding="utf-8")
        assert not re.search(r"\]\((?!\w+:)", text), name  # links lead nowhere there


def test_your_edits_stay(project: Path, newer: Any) -> None:
    _replace(project / "params.yaml", "seed: 1", "seed: 7 # mine")
    line = "      merged: {from: exports/lora, as: lora}, adapter: {from: models/lora, as: lora}\n"
    _replace(project / "dvc.yaml", line, "      mine: {from: models/sft, as: sft},\n" + line)
    newer("params.yaml", "vocab_size: 768", "vocab_size: 1024 # larger")
    plan = plan_upgrade(project)
    assert plan.values == ["params.yaml: tokenizer.vocab_size: 768 -> 1024"]
    assert plan.stages["tokenizer"] == "tokenizer" and "check" not in plan.stages
    apply_upgrade(project, plan)
    text = (project / "params.yaml").read_text()
    assert "seed: 7 # mine" in text and "vocab_size: 1024 # larger" in text
    assert "mine: {from: models/sft, as: sft}" in (project / "dvc.yaml").read_text()
    assert not plan_upgrade(project).files


def test_where_both_changed_a_line_nothing_is_written(
    project: Path, newer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _replace(project / "params.yaml", "vocab_size: 768", "vocab_size: 500")
    newer("params.yaml", "vocab_size: 768", "vocab_size: 1024")
    before = file_bytes(project, ".")
    monkeypatch.chdir(project)
    said = CliRunner().invoke(app, ["upgrade"])
    assert said.exit_code == 1 and "the same lines of params.yaml (1);" in said.stderr
    assert file_bytes(project, ".") == before
    assert CliRunner().invoke(app, ["upgrade", "--force"]).exit_code == 0
    text = (project / "params.yaml").read_text()
    assert "<<<<<<< yours\n  vocab_size: 500\n" in text
    assert "vocab_size: 1024\n>>>>>>> shipped now\n" in text


def test_what_was_removed_stays_away(project: Path, newer: Any) -> None:
    (project / "synonyms.json").unlink()
    newer("synonyms.json", "[", "[ ")
    assert not plan_upgrade(project).files


def test_a_stage_that_is_new_and_one_that_is_gone(project: Path, newer: Any) -> None:
    newer("dvc.yaml", "  merge:\n", "  merged:\n")
    plan = plan_upgrade(project)
    assert plan.stages["merged"] == "new" and "merge" not in plan.stages
    assert plan.stages["evaluate@lora"] == "after merged"
    assert "dvc.yaml: stages.merged.cmd is new" in "\n".join(plan.values)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("params.yaml", "a: [\n", r"params.yaml:\d+: not valid YAML"),
        ("params.yaml", "\udcff", "params.yaml is not UTF-8"),
        (".minimind/version", None, "is no project of `minimind init`; in a clone, `git pull`"),
    ],
)
def test_a_broken_project_is_one_line(
    project: Path, newer: Any, name: str, text: str | None, complaint: str
) -> None:
    newer("params.yaml", "vocab_size: 768", "vocab_size: 1024")
    if text is None:
        (project / name).unlink()
    else:
        with (project / name).open("a", errors="surrogateescape") as file:
            file.write(text)
    with pytest.raises(UserError, match=complaint) as caught:
        plan_upgrade(project)
    assert "\n" not in str(caught.value)


def test_in_a_repository_a_project_is_a_part_of_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    create_project(tmp_path / "models" / "mine")
    assert not (tmp_path / "models/mine/.git").exists()
    assert "models/mine/.dvc/config" in git(tmp_path, "status", "--short", "-uall")
