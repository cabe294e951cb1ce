"""dvc.yaml, dvc.lock and the code agree."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from subprocess import PIPE
from typing import Any, get_args

import pytest
import yaml
from dvc.dependency import ParamsDependency
from dvc.repo import Repo
from dvc_render.vega_templates import get_template
from networkx import ancestors

from minimind.lineage.code import stage_names
from minimind.lineage.dvc_files import output_paths, variants
from minimind.lineage.paths import keys_of, path_templates
from minimind.params import SHARED, Section, shared_keys
from tests.graph import ROOT
from tests.project import git, stages_run
from tests.shipped import as_shipped, shipped_params

GRAPH: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES: dict[str, dict[str, Any]] = {
    name: stage.get("do", stage) for name, stage in GRAPH["stages"].items()
}


def module_of(stage: dict[str, Any]) -> str:
    """The module in stages/ that a stage runs."""
    match = re.match(r"python -m stages\.(\w+) ", stage["cmd"])
    assert match, f"{stage['cmd']} must run a module of stages with python -m"
    return match[1]


@pytest.mark.parametrize("name", sorted({*STAGES} - {"code"}))
def test_a_stage_depends_on_its_code(name: str) -> None:
    deps = STAGES[name]["deps"]
    assert [dep for dep in deps if dep.startswith(("code/", "stages", "minimind"))] == [
        f"code/{module_of(STAGES[name])}.json"
    ]


def test_every_stage_module_is_in_the_graph() -> None:
    """Or in one of those in folders, which plain `dvc repro` leaves alone."""
    beside = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in ROOT.glob("*/dvc.yaml")]
    stages = [s.get("do", s) for graph in (GRAPH, *beside) for s in graph["stages"].values()]
    assert {module_of(stage) for stage in stages} == {*stage_names(), "code"}
    assert STAGES["code"]["deps"] == ["minimind", "stages"]


def test_the_graph_and_the_parameters_stay_readable() -> None:
    for file, limit in (("dvc.yaml", 350), ("params.yaml", 250), ("README.md", 150)):
        num_lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert num_lines <= limit, f"{file} has {num_lines} lines"


REWIRED = [
    # section, key, value, stages that then depend on this path
    ("pretrain", "init", "mine/llama", {"pretrain": "mine/llama"}),
    ("sft", "init", "models/tokenizer", {"sft": "models/tokenizer"}),
    ("dpo", "init", "/elsewhere/llama", dict.fromkeys(("reference", "dpo"), "/elsewhere/llama")),
    ("reason", "init", "models/sft", {"reason": "models/sft"}),
    ("grpo", "init", "models/dpo", {"grpo": "models/dpo"}),
    ("spo", "init", "models/grpo", {"spo": "models/grpo"}),
    ("lora", "init", "models/reason", {"lora": "models/reason", "merge": "models/reason"}),
    ("reward", "init", "exports/reason", {"reward": "exports/reason"}),
    ("rejection_sampling", "init", "models/grpo", {"rejection_sampling": "models/grpo"}),
    ("distill", "init", "../llama", {"distill": "../llama", "baseline": "../llama"}),
    (
        "encode",
        "tokenizer",
        "mine/llama",
        {"encode@pretrain": "mine/llama", "encode@lora": "mine/llama"},
    ),
    (
        "distill",
        "teacher",
        "mine/llama",
        {"teacher_outputs": "mine/llama", "baseline": "mine/llama"},
    ),
    ("data", "sft", "mine/chats", {"encode@sft": "mine/chats"}),
]


@pytest.mark.parametrize(("section", "key", "value", "expected"), REWIRED)
def test_a_parameter_rewires_the_graph(
    tmp_path: Path, monkeypatch, section: str, key: str, value: str, expected: dict[str, str]
) -> None:
    params = shipped_params()
    params[section][key] = value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    with Repo.init(no_scm=True) as repo:
        repo.index.check_graph()  # no cycle, no output of two stages
        for stage, path in expected.items():
            (found,) = repo.stage.collect(stage)
            assert path in [dep.def_path for dep in found.deps], stage


class Tracked:
    """What the stages track of params.yaml, as if all had been run with what stands there."""

    def __init__(self, repo: Repo) -> None:
        self.deps: dict[str, ParamsDependency] = {}
        for stage in repo.index.stages:
            for dep in stage.deps:
                if isinstance(dep, ParamsDependency):
                    dep.save()
                    self.deps[stage.addressing] = dep

    def changed(self, **values: Any) -> set[str]:
        """Stages that DVC would run for some values, given by dotted name, and nothing else."""
        before = Path("params.yaml").read_bytes()
        params = yaml.safe_load(before)
        for name, value in values.items():
            *parents, key = name.split("__")
            section = params
            for parent in parents:
                section = section[parent]
            section[key] = value
        Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        found = {name for name, dep in self.deps.items() if dep.status()}
        Path("params.yaml").write_bytes(before)
        return found


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracked]:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(shipped_params()), encoding="utf-8")
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    with Repo.init(no_scm=True) as repo:
        yield Tracked(repo)


VARIED = {
    "encode@distill",
    "encode@sft",
    "encode@reason",
    "encode@lora",
}  # whose chats may be varied at random
SAMPLING = {"grpo", "spo", "rejection_sampling", "thinking"}
FITTED = {"pretrain", "sft", "dpo", "reason", "reward", "distill", "baseline", "lora"}


def test_the_seed_and_the_number_format_are_of_all_stages_that_use_one(tracked: Tracked) -> None:
    evaluations = {name for name in tracked.deps if name.startswith("evaluate@")}
    assert tracked.changed(seed=2) == {"mini_world"} | VARIED | FITTED | SAMPLING
    computing = FITTED | SAMPLING | evaluations | {"reference", "teacher_outputs"}
    assert tracked.changed(dtype="float32") == computing


def test_stages_that_share_a_section_see_a_seed_and_number_format_of_its_own(
    tracked: Tracked,
) -> None:
    assert tracked.changed(sft__seed=5) == {"sft"}
    assert tracked.changed(mini_world__seed=5) == {"mini_world"}
    assert tracked.changed(encode__lora__seed=5) == {"encode@lora"}
    assert tracked.changed(dpo__dtype="float32") == {"dpo", "reference"}
    assert tracked.changed(dpo__seed=5) == tracked.changed(dpo__beta=0.2) == {"dpo"}
    for key in ("seed", "dtype", "lr", "grad_clip"):
        assert tracked.changed(**{f"distill__{key}": 5}) == {"distill", "baseline"}
    assert tracked.changed(distill_loss__alpha=0.2) == {"distill"}


def test_check_tracks_every_parameter_that_is_a_path() -> None:
    keys = {key for template in path_templates(GRAPH["stages"]) for key in keys_of(template)}
    tracked = {*STAGES["check"]["params"]}
    assert len(keys) > 20
    paths = {"data" if key.startswith("data.") else key for key in keys}
    assert tracked - paths == {"evaluate.text_checkpoints"}  # names of checkpoints
    assert paths <= tracked


def test_check_is_upstream_of_every_stage_that_has_such_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where all of them lead out of the graph, or nowhere."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    having_paths = {
        name for name, stage in GRAPH["stages"].items() if path_templates({name: stage})
    }
    for template in path_templates(GRAPH["stages"]):
        for key in keys_of(template):
            section, name = key.split(".")
            params[section][name] = f"nowhere/{key}"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    with Repo.init(no_scm=True) as repo:
        (check,) = repo.stage.collect("check")
        behind = {stage.name.split("@")[0] for stage in ancestors(repo.index.graph, check)}
    assert len(having_paths) > 15
    # Those without paths, too: DVC chooses the order of what does not depend on each other.
    assert having_paths <= behind == {*STAGES} - {"code", "check"}


def test_check_says_the_same_whatever_it_was_asked(tmp_path: Path) -> None:
    """Or every stage behind it would run when a path changes."""
    outputs = set()
    for sft in ("models/pretrain", "models/dpo"):
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        params["sft"]["init"] = sft
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        command = [sys.executable, "-m", "stages.check", "--output", str(tmp_path / "checked.txt")]
        command += ["--params", str(tmp_path / "params.yaml")]
        subprocess.run(command, cwd=ROOT, check=True)
        outputs.add((tmp_path / "checked.txt").read_bytes())
    assert len(outputs) == 1


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_tracks_what_its_section_has_from_the_top_level(name: str) -> None:
    module = import_module(f"stages.{module_of(STAGES[name])}")
    sections = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Section)
    ]
    needed = {key for section in sections for key in shared_keys(section)}
    listed = {*STAGES[name].get("params", [])}
    if name == "encode":
        listed |= {variant["params"] for variant in GRAPH["stages"]["encode"]["foreach"].values()}
    assert listed & {*SHARED} == needed


def read_by(name: str) -> Iterator[tuple[str, str, str]]:
    """What a stage's module reads of params.yaml: the function, the key, the class's name."""
    source = (ROOT / "stages" / f"{module_of(STAGES[name])}.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        function = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        if function in ("load_section", "load_path"):
            assert isinstance(node, ast.Call)
            key = ast.unparse(node.args[1]).strip("'\"").replace("{name}", "${key}")
            class_name = ast.unparse(node.args[2]) if function == "load_section" else ""
            yield function, key.removeprefix("f'").removeprefix('f"'), class_name


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_reads_of_the_parameters_is_in_the_graph(name: str) -> None:
    """A section as a whole, or its keys where the class reads some; a path as a dependency."""
    stage = STAGES[name]
    tracked, deps = stage.get("params", []), " ".join(stage["deps"])
    if name == "encode":
        deps = deps.replace("${item.source}", "${data.${key}}")
    module = import_module(f"stages.{module_of(stage)}")
    for function, key, class_name in read_by(name):
        if function == "load_path":
            assert f"${{{key}}}" in deps, f"{name} reads the path {key}"
            continue
        if name == "baseline" and key == "distill_loss":
            continue  # read by the stage that it shares its module with
        section = getattr(module, class_name, Section)  # one of two, in stage encode
        paths = {field for field, info in section.model_fields.items() if Path in of(info)}
        for field in paths:
            assert f"${{{key}.{field}}}" in deps, f"{name} reads the path {key}.{field}"
        if section.model_config.get("extra") == "ignore":
            fields = {*section.model_fields} - paths
            assert {f"{key}.{field}" for field in fields} <= {*tracked}
        else:
            assert key in tracked, f"{name} reads the section {key}"


def of(info: Any) -> tuple[Any, ...]:
    """The types that a field may have."""
    return get_args(info.annotation) or (info.annotation,)


def outputs(stage: dict[str, Any]) -> list[str]:
    """Paths of what DVC keeps."""
    entries = [*stage.get("outs", []), *stage.get("plots", [])]
    entries = [
        e for e in entries if isinstance(e, str) or next(iter(e.values())).get("cache", True)
    ]
    paths = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]
    return [re.sub(r"\$\{.*?\}", "x", path) for path in paths]


def test_what_is_plotted_is_an_output_and_its_template_is_there() -> None:
    written = {
        path
        for _, stage, variant in variants(GRAPH["stages"])
        for path in output_paths(stage.get("outs"), variant)
    }
    for (plot,) in (entry.values() for entry in GRAPH["plots"]):
        assert {*plot["y"]} <= written
        get_template(plot.get("template"), ROOT / ".dvc/plots")  # or it raises


@pytest.mark.parametrize("name", STAGES)
def test_outputs_are_ignored_by_git_before_their_stage_has_run(name: str) -> None:
    for path in outputs(STAGES[name]):
        ignored = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False)
        assert ignored.returncode == 0, f"{path} is not in .gitignore"


def test_metrics_and_digests_of_code_stay_in_git() -> None:
    for name, stage in STAGES.items():
        for entry in [*stage.get("metrics", []), *(stage["outs"] if name == "code" else [])]:
            ((path, options),) = entry.items()
            assert options == {"cache": False} | ({"persist": True} if name == "code" else {})
            path = re.sub(r"\$\{.*?\}", "x", path)
            ignored = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False)
            assert ignored.returncode == 1, f"{path} must not be ignored"


@pytest.fixture(scope="module")
def commit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has of the last commit, apart from the workspace, in a repository of its own."""
    directory = tmp_path_factory.mktemp("commit")
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=PIPE, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=directory, input=archive, check=True)
    git(directory, "init", "-q")
    return directory


def behind(directory: Path) -> str:
    """What DVC says of stages that would run, were all outputs in its cache; empty without any.

    Without them it may fail instead, at one whose inputs are not there.
    """
    result = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "--dry", "--allow-missing"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    is_behind = result.returncode or stages_run(result.stdout)
    return result.stdout + result.stderr if is_behind else ""


def test_the_committed_lock_is_in_step_with_code_and_parameters(commit: Path) -> None:
    """The workspace may hold an experiment, or what `make repro` has made on another machine."""
    assert behind(commit) == "", "run dvc repro and commit dvc.lock and metrics/"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("params.yaml", "  num_sft: ", "  num_sft: 1"),
        ("minimind/mini_world/problems.py", "BOX_SHARE = ", "BOX_SHARE = 0"),
    ],
)
def test_a_lock_that_is_behind_is_found(commit: Path, file: str, old: str, new: str) -> None:
    before = (commit / file).read_text(encoding="utf-8")
    assert before.count(old) == 1
    (commit / file).write_text(before.replace(old, new), encoding="utf-8")
    found = behind(commit)
    (commit / file).write_text(before, encoding="utf-8")
    assert "'mini_world'" in found


def test_links_are_set_up_so_that_models_are_not_stored_twice() -> None:
    config = (ROOT / ".dvc" / "config").read_text(encoding="utf-8")
    assert "reflink,hardlink,symlink" in config
    assert "__pycache__" in (ROOT / ".dvcignore").read_text(encoding="utf-8")


def test_no_commit_holds_an_absolute_path(commit: Path) -> None:
    home = re.compile(r"(?<![\w.])/(home|Users|root|work)/\w")
    for path in commit.rglob("*"):
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".json", ".lock") and path.is_file():
            assert not home.search(path.read_text(encoding="utf-8")), path


IN_AN_EXPERIMENT = {"seed": 7, "dtype": "float32", "sft": {"lr": 9.0, "seed": 5}}


def test_tests_do_not_see_an_experiment() -> None:
    then = {"seed": 1, "dtype": "bfloat16", "sft": {"lr": 1.0}, "dpo": {"dtype": None}}
    now = then | IN_AN_EXPERIMENT | {"new": {"key": 3}}
    expected = then | {"sft": {"lr": 1.0, "seed": None}, "new": {"key": 3}}
    assert as_shipped(now, then) == expected
    # Nor one that was committed, as far as seed and number format go.
    assert as_shipped(now, now) == expected | {"sft": {"lr": 9.0, "seed": None}}
