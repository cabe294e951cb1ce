"""Safe by default: no pickle, no code of others, no shell made of parameters, no path outside."""

import ast
import pickle
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from minimind.lineage.paths import quoted
from minimind.reinforcement.loop import ReinforcementConfig
from tests.broken import build, contents, run
from tests.graph import ROOT
from tests.project import copy_project, dvc
from tests.shipped import shipped_params

pytestmark = pytest.mark.xdist_group("safety")

CODE = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("minimind", "stages", "rewards", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
UNPICKLING |= {"torch.distributed.checkpoint"}
# Calls by the end of their dotted name. `model.eval()` is PyTorch's, and has no arguments.
FORBIDDEN = {"torch.load", "torch.save", "os.system", "os.popen", "yaml.unsafe_load"}
FORBIDDEN |= {"yaml.full_load", "pickle.load", "pickle.loads", "subprocess.getoutput"}
FORBIDDEN |= {"all_gather_object", "broadcast_object_list", "scatter_object_list", "gather_object"}
PYTHON_OF_OTHERS = ("eval", "exec", "compile", "__import__")


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe_code(tree: ast.AST) -> list[str]:
    """What a module does that may run what it is given."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in UNPICKLING]
        elif isinstance(node, ast.ImportFrom) and node.module in UNPICKLING:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if any(name == bad or name.endswith(f".{bad}") for bad in FORBIDDEN):
                found.append(name)
            if name in PYTHON_OF_OTHERS:
                found.append(name)
            pickles = options.get("allow_pickle", "True") != "False"
            if name in ("np.load", "np.save", "numpy.load", "numpy.save") and pickles:
                found.append(f"{name} without allow_pickle=False")
            if options.get("shell", "False") != "False":
                found.append(f"{name} with shell={options['shell']}")
            if name == "yaml.load" and ast.unparse(node.args[-1]) not in ("_Loader", "loader"):
                found.append("yaml.load")
            if options.get("trust_remote_code", "False") != "False":
                found.append(f"{name} with trust_remote_code={options['trust_remote_code']}")
    return found


@pytest.mark.parametrize("file", CODE)
def test_no_code_unpickles_evaluates_or_starts_a_shell(file: str) -> None:
    assert unsafe_code(ast.parse((ROOT / file).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(file)",
        "torch.save(model, file)",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text, yaml.Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "dist.broadcast_object_list(values)",
        "from torch.distributed.checkpoint import save",
    ],
)
def test_such_code_would_be_found(code: str) -> None:
    assert unsafe_code(ast.parse(code)) != []


def test_code_of_a_reward_model_runs_only_if_params_say_so() -> None:
    params = shipped_params()
    presets = [yaml.safe_load(path.read_text("utf-8")) for path in ROOT.glob("presets/*.yaml")]
    for values in [params, *presets]:
        for stage in ("grpo", "spo"):
            assert values.get(stage, {}).get("trust_remote_code", False) is False
    assert ReinforcementConfig.model_fields["trust_remote_code"].default is False


# What is unpickled, is run: none of these may leave its mark.


class Mark:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("safety") / "whole")


@pytest.fixture
def project(workspace: Path, tmp_path: Path) -> Path:
    shutil.copytree(workspace, tmp_path / "project")
    return tmp_path / "project"


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("sft", "models/base/model.safetensors"),
        ("evaluate", "models/base/model.safetensors"),
        ("grpo", "models/base/model.safetensors"),
        ("teacher_outputs", "models/base/model.safetensors"),
        ("merge", "models/lora/adapter_model.safetensors"),
        ("dpo", "reference.npy"),
        ("distill", "outputs/ids.bin"),
        ("sft", "encoded/sft/tokens.bin"),
    ],
)
def test_a_pickled_file_is_refused(project: Path, command: str, file: str) -> None:
    (project / file).write_bytes(pickle.dumps(Mark()))
    outcome = run(command, project)
    assert outcome.exit_code == 1, outcome
    assert outcome.crash is None
    assert not (project / "pwned").exists()


def test_an_array_of_pickled_objects_is_refused(project: Path) -> None:
    np.save(project / "reference.npy", np.array([Mark()] * 24, dtype=object), allow_pickle=True)
    assert run("dpo", project).exit_code == 1
    assert not (project / "pwned").exists()


@pytest.mark.parametrize("folder", ["models/base", "models/reward"])
def test_pickled_weights_beside_missing_ones_are_not_read(project: Path, folder: str) -> None:
    (project / folder / "model.safetensors").unlink()
    (project / folder / "pytorch_model.bin").write_bytes(pickle.dumps(Mark()))
    if folder == "models/reward":
        params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
        params["grpo"]["rewards"]["reward_model"] = 1.0
        (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    for command in ("grpo", "teacher_outputs") if folder == "models/base" else ("grpo",):
        outcome = run(command, project)
        assert outcome.exit_code == 1, outcome
    assert not (project / "pwned").exists()


def test_resume_states_are_safetensors_and_json(project: Path) -> None:
    for command in ("sft", "grpo"):
        # As part of a graph: a stage run by hand removes its states when it is done.
        assert run(command, project, DVC_STAGE=command).exit_code == 0
    states = [path for path in (project / ".resume").rglob("*") if path.is_file()]
    kinds = {path.suffix or path.name for path in states}
    assert kinds == {".safetensors", ".json", "since", "turn"}


# Parameters in dvc.yaml's commands and paths

GRAPH: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]


@pytest.mark.parametrize("name", GRAPH)
def test_no_parameter_stands_in_a_command(name: str) -> None:
    """DVC hands commands to a shell. What varies in them are words of dvc.yaml itself."""
    command = GRAPH[name].get("do", GRAPH[name])["cmd"]
    assert "${" not in re.sub(r"\$\{(key|item(\.\w+)?)\}", "", command)
    variants = GRAPH[name].get("foreach", {})
    words = variants.items() if isinstance(variants, dict) else zip(variants, variants, strict=True)
    for key, item in words:
        in_command = [item[word] for word in re.findall(r"\$\{item\.(\w+)\}", command)]
        if "${item}" in command:
            in_command.append(item)
        for word in (key, *in_command):
            assert re.fullmatch(r"[\w/]+", word)


@pytest.mark.parametrize("name", GRAPH)
def test_no_parameter_names_an_output(name: str) -> None:
    """DVC empties outputs before a stage runs, wherever they are."""
    stage = GRAPH[name].get("do", GRAPH[name])
    variants = GRAPH[name].get("foreach", [])
    assert not isinstance(variants, str), f"{name}: its variants are a parameter"
    for entry in [*stage.get("outs", []), *stage.get("metrics", [])]:
        path = entry if isinstance(entry, str) else next(iter(entry))
        plain = path.replace("${key}", "x").replace("${item}", "x")
        assert "${" not in plain
        assert ".." not in plain
        assert not plain.startswith("/")
    for variant in variants:
        assert re.fullmatch(r"\w+", variant)


def test_dvc_runs_no_part_of_a_parameter(tmp_path: Path) -> None:
    """Files of such names are there, so that DVC has no reason of its own to refuse them."""
    project = copy_project(tmp_path / "project")
    evil = 'x; touch pwned1 & $(touch pwned2) `touch pwned3` " || touch pwned4 #.jsonl'
    worse = "x'; touch pwned5; '\n.jsonl"
    chat = '{"conversations": [{"role": "user", "content": "1+1"}, '
    chat += '{"role": "assistant", "content": "2"}]}\n'
    for name in (evil, worse):
        (project / name).write_text(chat, encoding="utf-8")
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    params["data"] |= dict.fromkeys(["tokenizer", "problems", "text"], evil)
    for name in (evil, worse):
        params["data"]["sft"] = name
        (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        dvc(project, "repro", "--force", "encode@sft")
        assert not list(project.rglob("pwned*"))


@pytest.mark.parametrize("shell", ["sh", "bash", "zsh", "fish"])
def test_a_path_in_a_command_of_ours_is_one_word_to_every_shell(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    odd = [
        "数据/对话 [1].jsonl",
        "it's",
        '"q"',
        "$(touch pwned)`touch pwned`",
        "a\\'b\\\\c\\",
        "{a,b}*~",
    ]
    for path in [*odd, "a\nb", "-x;&|<>#!", "\\n"]:
        command = [shell, "-c", f"printf %s {quoted(path)}"]
        assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == path


def test_a_checkpoint_from_outside_is_read_and_nothing_is_written_there(project: Path) -> None:
    outside = project.with_name("outside")
    shutil.move(project / "models" / "base", outside)
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    for section in ("sft", "grpo", "rejection_sampling", "lora"):
        params[section]["init"] = "../outside"
    params["distill"]["teacher"] = "../outside"
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    before = contents(project.parent)
    for command in ("sft", "grpo", "rejection_sampling", "teacher_outputs", "merge"):
        assert run(command, project).exit_code == 0
    after = contents(project.parent)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed
    assert {name.split("/")[0] for name in changed} == {"project"}
    assert {name.split("/")[1] for name in changed} <= {"out", "runs", ".resume"}


def test_a_custom_reward_outside_of_the_project_is_not_run(project: Path) -> None:
    (project.parent / "custom.py").write_text("open('pwned', 'w')\n", encoding="utf-8")
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    params["grpo"]["rewards"]["custom"] = 1.0
    params["grpo"]["custom_reward"] = "../custom.py"
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    outcome = run("grpo", project)
    assert outcome.exit_code == 1
    assert "must be a .py file inside of" in outcome.stderr
    assert not (project / "pwned").exists()
