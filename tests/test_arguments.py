"""Arguments of commands that people get wrong: one line, and nothing is done."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.errors import UserError
from minimind.lineage.paths import unknown_checkpoints
from minimind.project.hub import Repository, bring
from minimind.terminal.command import MAY_BE_EMPTY, stage_app
from tests.graph import ROOT
from tests.project import git

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
STAGES = sorted(p.stem for p in (ROOT / "stages").glob("[!_]*.py"))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_taken_for_everything(name: str) -> None:
    """`minimind lint "$F"` without a value of F was the whole project, `init ""` this folder."""
    named = [
        option
        for parameter in COMMANDS[name].params
        for option in parameter.opts
        if option.startswith("-") and not getattr(parameter, "is_flag", False)
    ]
    named = [option for option in named if option not in MAY_BE_EMPTY]
    long = [[f"{option}="] for option in named if option.startswith("--")]
    for words in [[""], ["a", ""], *([option, ""] for option in named), *long]:
        result = CliRunner().invoke(app, [name, *words])
        assert result.exit_code == 2, words
        assert result.stderr.count("\n") == 1 and "is empty; is a variable" in result.stderr
    assert not list(Path().iterdir())


@pytest.mark.parametrize("stage", STAGES)
def test_so_do_stages(stage: str) -> None:
    command = import_module(f"stages.{stage}").app
    result = CliRunner().invoke(command, ["--params", ""])
    assert (result.exit_code, "--params is empty" in result.stderr) == (2, True)


def test_an_empty_system_prompt_is_none() -> None:
    result = CliRunner().invoke(app, ["chat", "--system", "", "--ask", "1+1?"])
    assert (result.exit_code, "models/ has no checkpoint" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report", "--output", "."], ". is a folder; name a file."),
        (["gguf", "exports/a", "-o", "exports"], "exports is a folder; name a file."),
        (["publish", "exports/a", "name"], "'name' is no repository's name; it is user/name"),
        (["publish", "exports/a", "a/b c"], "'a/b c' is no repository's name; it is user/name"),
        (["gguf", "models/judge"], "models/judge is a reward model"),
        (["verify", "models/judge"], "lineage.json is missing: only an exported folder tells"),
        (["chat", "--json"], "--json is for the answers to --ask"),
        (["chat", "judge@"], "there is no checkpoint judge@; here are: none. `judge@HEAD` is"),
        (["show", "data.nope"], "params.yaml has no data.nope; there are sft."),
        (["repro", "-S", "sft.lr=1"], "is an experiment: `dvc exp run -S sft.lr=1`; or write"),
        (["plan", "-S", "sft.lrr=1"], "params.yaml has no sft.lrr; correct the name, or set one"),
        (["web", "a", "b", "c", "d", "e"], "5 checkpoints; at most 4 fit."),
    ],
)
def test_what_is_wrong_is_named(words: list[str], said: str) -> None:
    if words[0] == "web":
        pytest.importorskip("gradio", reason="no gradio")
    judge = Path("models/judge")
    judge.mkdir(parents=True)
    (judge / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    Path("exports").mkdir()
    Path("params.yaml").write_text("data: {sft: a}\nsft: {lr: 1}\n")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1, result.output
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_a_broken_params_file_is_told_with_its_line() -> None:
    Path("params.yaml").write_text("seed: 1\nsft: {lr: 1\n")
    result = CliRunner().invoke(app, ["repro"])
    assert result.exit_code == 1
    assert result.stderr.startswith("minimind: params.yaml:3: not valid YAML: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7.28 GiB for an array"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_memory_that_is_not_there_is_one_line(error: Exception) -> None:
    toy = stage_app("toy")

    @toy.command()
    def main() -> None:
        raise error

    result = CliRunner().invoke(toy, [])
    assert result.exit_code == 1
    assert f"toy: out of memory: {error}; lower what is done at a time" in result.stderr
    assert result.stderr.count("\n") == 1


def test_names_that_are_not_evaluated_are_refused_before_anything_runs() -> None:
    evaluate = {"foreach": ["sft", "dpo"], "do": {"outs": ["predictions/${item}.csv"]}}
    graph = {"evaluate": evaluate, "pretrain": {"outs": ["models/pretrain"]}}
    params = {"evaluate": {"text_checkpoints": ["sft", "pretrain", "pretrian"]}}
    (said,) = unknown_checkpoints(graph, params)
    assert said == (
        "evaluate.text_checkpoints has 'pretrian', which is no checkpoint; allowed are sft, dpo."
    )
    assert not [*unknown_checkpoints({}, params)]


def dvc_project() -> None:
    git(Path(), "init", "-q")
    from dvc.repo import Repo

    Repo.init().close()


def test_without_a_remote_there_is_nothing_to_pull() -> None:
    dvc_project()
    result = CliRunner().invoke(app, ["pull"])
    assert (result.exit_code, "has no default remote" in result.stderr) == (1, True)


@pytest.mark.parametrize("output", [".", "..", "/tmp/elsewhere", "README.md"])
def test_files_are_brought_into_a_folder_of_the_project(output: str) -> None:
    """Nothing is downloaded before that is known."""
    dvc_project()
    Path("README.md").touch()
    there = sorted(Path().iterdir())
    repository = Repository("huggingface", "dataset", "a/b", "1", [])
    with pytest.raises(UserError, match=r"name (one|a folder), as data/mine"):
        bring(repository, [], Path(output))
    assert sorted(Path().iterdir()) == there
