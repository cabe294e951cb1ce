"""A folder of shards that DVC tracks, wherever `data` in params.yaml names a file."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from typer.testing import CliRunner

import stages.encode
import stages.evaluate
import stages.tokenizer
from minimind.chat.tokenizer import ChatTokenizer
from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.cli.main import app
from minimind.datasets.formats import read_texts
from minimind.datasets.sources import unread_files
from minimind.errors import UserError
from minimind.mini_world.rows import MiniWorldConfig, write_mini_world
from minimind.model.checkpoint import save_checkpoint
from minimind.tasks.problem import encode_prompts, read_problems
from tests.graph import ROOT
from tests.project import dvc
from tests.shipped import shipped_params
from tests.tiny import tiny_model

# What dvc.yaml gives to stage encode, by the key below `data`.
FORMATS = {
    "pretrain": "text",
    "sft": "chat",
    "dpo": "preference",
    "reason": "reason",
    "distill": "chat",
    "lora": "chat",
}
FILES = {
    **{name: name for name in (*FORMATS, "tokenizer", "prompts")},
    "free_prompts": "prompts",
    "problems": "eval",
    "text": "eval_text",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole/ with a file for each key, shards/ with a folder, linked from DVC's cache."""
    folder = tmp_path_factory.mktemp("data")
    params = shipped_params()
    sizes = {name: 20 for name in params["mini_world"] if name.startswith("num_")}
    sizes |= {"num_eval_per_level": [3, 3, 3, 3], "num_eval_equation": 2, "num_eval_extraction": 2}
    world = params["mini_world"] | sizes | {"seed": 1}
    write_mini_world(folder / "world", MiniWorldConfig(**world))
    (folder / "whole").mkdir()
    for key, file in FILES.items():
        rows = (folder / f"world/{file}.jsonl").read_text("utf-8").splitlines()
        if key == "problems":
            rows = [json.dumps({**json.loads(row), "id": None}) for row in rows]
        (folder / f"whole/{key}.jsonl").write_text("".join(f"{row}\n" for row in rows), "utf-8")
        shards = folder / "shards" / key
        shards.mkdir(parents=True)
        for name, part in (("10", rows[:3]), ("2", rows[3:9]), ("3", rows[9:])):
            # The last row of a shard may end without a line end.
            (shards / f"part-{name}.jsonl").write_text("\n".join(part), "utf-8")
    params["evaluate"] |= {"max_new_tokens": 4, "dtype": "float32"}
    for name in FORMATS:  # every chat varied, by its number among all rows
        if "augment_copies" in params["encode"][name]:
            params["encode"][name]["augment_copies"] = 1
    params["tokenizer"]["vocab_size"] = 300
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with Repo.init(no_scm=True) as repo, repo.config.edit() as config:
            config["cache"]["type"] = ["symlink"]
        with Repo() as repo:
            repo.add([f"shards/{key}" for key in FILES])
    assert (folder / "shards/sft/part-2.jsonl").is_symlink()
    texts = [*read_texts(folder / "whole/tokenizer.jsonl"), "user", "assistant"]
    save_tokenizer(train_tokenizer(texts, 300), folder / "tokenizer")
    return folder


@pytest.fixture
def tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(folder / "tokenizer")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sources(folder: Path, key: str) -> dict[str, Path]:
    return {"whole": folder / f"whole/{key}.jsonl", "shards": folder / "shards" / key}


def run_stage(stage: Any, **options: Path | str) -> None:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    result = CliRunner().invoke(stage.app, arguments)
    assert result.exit_code == 0, result.output


def params_with(folder: Path, place: Path, **data: Path) -> Path:
    """The folder's parameters with these sources of data, written beside what a stage writes."""
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    params["data"] |= {name: str(path) for name, path in data.items()}
    params["encode"]["tokenizer"] = str(folder / "tokenizer")
    place.parent.mkdir(parents=True, exist_ok=True)
    file = place.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(params), encoding="utf-8")
    return file


def contents(directory: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_every_source_of_the_parameters_is_here() -> None:
    data = shipped_params()["data"]
    assert {*FILES} == {name for name, value in data.items() if str(value).endswith(".jsonl")}
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    encoded = {key: item["format"] for key, item in graph["stages"]["encode"]["foreach"].items()}
    assert encoded == FORMATS


def test_tokenizer(folder: Path, tmp_path: Path) -> None:
    for kind, source in sources(folder, "tokenizer").items():
        run_stage(
            stages.tokenizer,
            output=tmp_path / kind / "tokenizer",
            metrics=tmp_path / kind / "metrics.json",
            params=params_with(folder, tmp_path / kind, tokenizer=source),
        )
    assert contents(tmp_path / "whole") == contents(tmp_path / "shards")


@pytest.mark.parametrize("key", FORMATS)
def test_encode(folder: Path, tmp_path: Path, key: str) -> None:
    for kind, source in sources(folder, key).items():
        # Texts are compared with themselves, so that something is found.
        against = source if key == "pretrain" else sources(folder, "problems")[kind]
        run_stage(
            stages.encode,
            format=FORMATS[key],
            name=key,
            output=tmp_path / kind / "encoded",
            metrics=tmp_path / kind / "metrics.json",
            params=params_with(
                folder,
                tmp_path / kind,
                **{key: source, "synonyms": ROOT / "minimind/datasets/synonyms.json"},
                problems=against,
                text=against,
            ),
        )
    assert contents(tmp_path / "whole") == contents(tmp_path / "shards")
    counts = json.loads((tmp_path / "whole/metrics.json").read_text())["encode"][key]
    assert (counts["rows"], counts["eval_overlap_rows"]) == (20, 20 if key == "pretrain" else 0)


@pytest.mark.parametrize("key", ["prompts", "free_prompts"])
def test_prompts(folder: Path, tokenizer: ChatTokenizer, key: str) -> None:
    whole, shards = sources(folder, key).values()
    for num_prompts in (5, 100, None):
        few, same = (read_problems(source, num_prompts) for source in (whole, shards))
        assert len(few) == min(20, num_prompts or 20)
        assert [replace(p, place=few[0].place) for p in few] == [
            replace(p, place=few[0].place) for p in same
        ]
        assert encode_prompts(few, tokenizer, 512) == encode_prompts(same, tokenizer, 512)


def test_evaluate(folder: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_positions=512)
    save_checkpoint(tmp_path / "checkpoint", model, folder / "tokenizer")
    for kind in ("whole", "shards"):
        run_stage(
            stages.evaluate,
            checkpoint=tmp_path / "checkpoint",
            name="pretrain",
            metrics=tmp_path / kind / "metrics.json",
            predictions=tmp_path / kind / "predictions.jsonl",
            params=params_with(
                folder,
                tmp_path / kind,
                problems=sources(folder, "problems")[kind],
                text=sources(folder, "text")[kind],
            ),
        )
    assert contents(tmp_path / "whole") == contents(tmp_path / "shards")


def test_problems_without_ids_are_numbered_over_all_shards(folder: Path) -> None:
    problems = read_problems(folder / "shards/problems")
    assert [problem.id for problem in problems] == [str(n) for n in range(1, 17)]


def test_every_file_of_a_folder_is_read_or_named(tmp_path: Path) -> None:
    rows = {"b/c.JSONL": "three", "a.jsonl": "one", "b/a.jsonl": "two", ".hidden/x.jsonl": "no"}
    for name, text in rows.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": text}) + "\n")
    for name in ("notes.txt", "b/more.yaml", ".DS_Store", "o\nther"):
        (tmp_path / name).write_text("no rows")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "b")
    (tmp_path / "lost.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")  # reading it would wait for ever
    unread = [
        f"{tmp_path / 'b/more.yaml'} (no file of rows)",
        f"{tmp_path / 'elsewhere'} (a linked folder; link its files, or copy it)",
        f"{tmp_path / 'lost.jsonl'} (a link to nowhere, which is missing)",
        f"{tmp_path / 'notes.txt'} (no file of rows)",
        f"'{tmp_path}/o\\nther' (no file of rows)",
        f"{tmp_path / 'pipe.jsonl'} (a pipe, socket or device, no file)",
    ]
    assert list(read_texts(tmp_path)) == ["one", "two", "three"]
    assert unread_files(tmp_path) == unread
    assert unread_files(tmp_path / "a.jsonl") == []
    printed = CliRunner().invoke(app, ["lint", str(tmp_path)]).stdout
    assert all(f"{tmp_path}: not read: {file}" in printed for file in unread)
    for name, why in (("pipe.jsonl", "a pipe"), ("lost.jsonl", "a link to nowhere")):
        with pytest.raises(UserError, match=f"{name} is {why}"):
            list(read_texts(tmp_path / name))


@pytest.mark.parametrize("name", ["mine.jsonl", "我的 对话.jsonl", "mine"])
def test_data_of_ones_own_can_be_added_where_the_graph_keeps_its_data(
    tmp_path: Path, name: str
) -> None:
    """DVC refuses a .dvc file that git ignores; the data itself git must not see."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "core.quotePath=false", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True, encoding="utf-8"
        ).stdout

    shutil.copy(ROOT / ".gitignore", tmp_path)
    git("init", "-q")
    dvc(tmp_path, "init", "-q")
    git("add", "-A")
    added = tmp_path / "data" / name
    rows = added if added.suffix else added / "rows.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text('{"text": "a"}\n')
    (tmp_path / "data/encoded").mkdir()
    (tmp_path / "data/encoded/tokens.bin").write_text("of a stage")
    dvc(tmp_path, "add", f"data/{name}")
    untracked = git("ls-files", "--others", "--exclude-standard").splitlines()
    assert f"data/{name}.dvc" in untracked
    assert set(untracked) <= {f"data/{name}.dvc", "data/.gitignore"}
