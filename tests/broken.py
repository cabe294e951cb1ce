"""A small workspace in which every stage's command works, to be broken in one place at a time."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import minimind.cli.main
from minimind.terminal.command import StageApp
from stages import (
    check,
    code,
    distill,
    dpo,
    encode,
    evaluate,
    export,
    grpo,
    lora,
    merge,
    mini_world,
    pretrain,
    reason,
    reference,
    rejection_sampling,
    report,
    reward,
    sft,
    spo,
    teacher_outputs,
    thinking,
    tokenizer,
)
from tests.graph import ROOT
from tests.shipped import shipped_params

STEPS = {"max_steps": 2, "batch_size": 2, "warmup_steps": 0, "validation_share": 0.25}
STEPS |= {"eval_interval": 1, "log_interval": 1}
SHAPE = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_positions": 256}
SAMPLED = {"max_new_tokens": 4, "batch_size": 2}
POLICY = SAMPLED | {"max_steps": 1, "warmup_steps": 0}
TINY: dict[str, dict[str, Any]] = {
    "mini_world": {
        "num_tokenizer": 2,
        "num_pretrain": 2,
        "num_sft": 2,
        "num_dpo": 2,
        "num_reason": 2,
        "num_distill": 2,
        "num_lora": 2,
        "num_prompts": 2,
        "num_eval_per_level": [2, 2, 2, 2],
        "num_eval_text": 2,
        "num_eval_equation": 2,
        "num_eval_extraction": 2,
    },
    "tokenizer": {"vocab_size": 268},
    "model": SHAPE,
    "pretrain": STEPS,
    "sft": STEPS,
    "dpo": STEPS,
    "reason": STEPS,
    "reward": STEPS,
    "distill": STEPS | {"student": SHAPE},
    "lora": STEPS | {"rank": 2},
    "grpo": POLICY | {"num_generations": 2},
    "spo": POLICY,
    "rejection_sampling": SAMPLED | {"num_prompts": 2, "num_samples": 2},
    "thinking": SAMPLED | {"num_prompts": 2},
    "teacher_outputs": {"top_k": 8, "batch_size": 4},
    "evaluate": {"batch_size": 4, "max_new_tokens": 4},
}

# Where the workspace has what params.yaml names.
PATHS: dict[str, dict[str, str]] = {
    "data": {
        "tokenizer": "text.jsonl",
        "pretrain": "text.jsonl",
        "sft": "chats.jsonl",
        "dpo": "pairs.jsonl",
        "reason": "thoughts.jsonl",
        "prompts": "prompts.jsonl",
        "free_prompts": "prompts.jsonl",
        "problems": "problems.jsonl",
        "text": "text.jsonl",
        "synonyms": "synonyms.json",
    },
    "pretrain": {"init": "models/tokenizer"},
    "distill": {"init": "models/tokenizer", "teacher": "models/base", "data": "sft"},
    "lora": {"init": "models/base", "data": "sft"},
    **{name: {"init": "models/base"} for name in ("sft", "dpo", "reason", "reward")},
    **{name: {"init": "models/base"} for name in ("rejection_sampling", "thinking")},
    "grpo": {"init": "models/base", "custom_reward": "custom.py"},
    "spo": {"init": "models/base", "custom_reward": "custom.py"},
}
TRAINED = "--output out/model --metrics out/metrics.json --history out/history.csv"
ENCODED = "--output out/data --metrics out/metrics.json"
COMMANDS: dict[str, tuple[StageApp, str]] = {
    "check": (check.app, "--output out/checked.txt"),
    "code": (code.app, "--output out/code"),
    "mini_world": (mini_world.app, "--output out/world --metrics out/metrics.json"),
    "tokenizer": (tokenizer.app, "--output out/tokenizer --metrics out/metrics.json"),
    "adopt": (
        tokenizer.app,
        "--output out/tokenizer --metrics out/metrics.json --params adopt.yaml",
    ),
    "encode pretrain": (encode.app, f"--name pretrain --format text {ENCODED}"),
    "encode sft": (encode.app, f"--name sft --format chat {ENCODED}"),
    "encode dpo": (encode.app, f"--name dpo --format preference {ENCODED}"),
    "encode reason": (encode.app, f"--name reason --format reason {ENCODED}"),
    "pretrain": (pretrain.app, f"--text encoded/pretrain {TRAINED}"),
    "sft": (sft.app, f"--conversations encoded/sft {TRAINED}"),
    "reference": (reference.app, "--preferences encoded/dpo --output out/ref.npy"),
    "dpo": (dpo.app, f"--preferences encoded/dpo --reference reference.npy {TRAINED}"),
    "reason": (reason.app, f"--conversations encoded/reason {TRAINED}"),
    "reward": (reward.app, f"--preferences encoded/dpo {TRAINED}"),
    "grpo": (grpo.app, f"{TRAINED} --predictions out/said.jsonl"),
    "spo": (spo.app, f"{TRAINED} --predictions out/said.jsonl"),
    "rejection_sampling": (
        rejection_sampling.app,
        "--output out/t.jsonl --rejected out/r.jsonl --metrics out/metrics.json",
    ),
    "thinking": (
        thinking.app,
        "--predictions out/predictions.jsonl --metrics out/metrics.json",
    ),
    "teacher_outputs": (
        teacher_outputs.app,
        "--encoded encoded --output out/outputs --metrics out/metrics.json",
    ),
    "distill": (distill.app, f"--encoded encoded --teacher-outputs outputs {TRAINED}"),
    "lora": (lora.app, f"--encoded encoded {TRAINED}"),
    "merge": (merge.app, "--adapter models/lora --output out/export"),
    "export": (
        export.app,
        "--checkpoint models/base --output out/export --evaluation evaluated/sft.json",
    ),
    "evaluate": (
        evaluate.app,
        "--checkpoint models/base --name sft "
        "--metrics out/metrics.json --predictions out/predictions.jsonl",
    ),
    "report": (
        report.app,
        "sft --evaluations evaluated --predictions predictions --training trained "
        "--histories trained --record record.json --output out/report.md --page out/index.html",
    ),
    "preset": (minimind.cli.main.app, "preset mine"),
}

CUSTOM_REWARD = "def score(prompt, completion, answer):\n    return len(completion) % 3 - 1\n"


@dataclass(frozen=True)
class Outcome:
    """What became of a command."""

    exit_code: int
    stdout: str
    stderr: str
    crash: BaseException | None


def run(command: str, directory: Path, *more: str, **environment: str) -> Outcome:
    """Run a command in `directory`; later options take the place of earlier ones."""
    app, arguments = COMMANDS[command]
    with surroundings(directory, environment):
        result = CliRunner().invoke(app, [*arguments.split(), *more])
    crash = None if isinstance(result.exception, SystemExit | None) else result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr, crash)


@contextmanager
def surroundings(directory: Path, environment: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("MINIMIND_", "DVC_")):
                patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.chdir(directory)
        yield


def build(directory: Path) -> Path:
    """The whole workspace, made by the stages themselves; what they are to write, is in out/."""
    torch.set_num_threads(1)
    directory.mkdir()
    params = shipped_params()
    for section, values in TINY.items():
        student = params[section].get("student", {}) | values.get("student", {})
        params[section] |= values | ({"student": student} if student else {})
    for section, paths in PATHS.items():
        assert set(paths) <= set(params[section]), f"paths of {section} are not parameters"
        params[section] |= paths
    write_params(directory, params | {"dtype": "float32"})
    adopt = params | {"data": params["data"] | {"tokenizer": "foreign"}}
    (directory / "adopt.yaml").write_text(yaml.safe_dump(adopt), encoding="utf-8")
    shutil.copyfile(ROOT / "dvc.yaml", directory / "dvc.yaml")
    write_rows(directory / "text.jsonl", [{"text": f"{n} + 1 = {n + 1}"} for n in range(12)])
    chats = [chat(f"{n} + 1 = ?", str(n + 1)) for n in range(12)]
    write_rows(directory / "chats.jsonl", chats)
    thoughts = [chat(f"{n}?", f"<think>{n}</think>\n<answer>{n}</answer>") for n in range(12)]
    write_rows(directory / "thoughts.jsonl", thoughts)
    pairs = [{"prompt": f"{n}?", "chosen": f"It is {n}.", "rejected": str(n)} for n in range(12)]
    write_rows(directory / "pairs.jsonl", pairs)
    prompts = [{"prompt": f"{n}?", "answer": str(n)} for n in range(4)]
    write_rows(directory / "prompts.jsonl", prompts)
    problems = [p | {"choices": ["0", "7", "9"], "label": 1, "level": 1} for p in prompts]
    write_rows(directory / "problems.jsonl", problems)
    (directory / "synonyms.json").write_text('[["big", "large"]]')
    (directory / "custom.py").write_text(CUSTOM_REWARD)
    (directory / "presets").mkdir()
    (directory / "presets/mine.yaml").write_text("sft: {lr: 1.0e-4}\n")
    (directory / "trained").mkdir()
    (directory / "trained/sft.json").write_text('{"sft": {"loss": 1.5, "steps": 2}}')
    (directory / "trained/sft.csv").write_text("step,val_loss,loss\n0,3,\n2,1.5,2\n")
    recorded = {"seed": 1, "dtype": "float32", "isa": "AVX2", "problems": "0"}
    recorded |= {"metrics": {"training": {}, "evaluation": {"sft": {"exact": 0.5}}}}
    (directory / "record.json").write_text(json.dumps({"runs": [recorded]}))

    made(directory, "tokenizer", out_tokenizer="models/tokenizer")
    shutil.copytree(directory / "models/tokenizer", directory / "foreign")
    for name in ("pretrain", "sft", "dpo", "reason"):
        made(directory, f"encode {name}", out_data=f"encoded/{name}")
    made(directory, "pretrain", out_model="models/base")
    made(directory, "reference", **{"out_ref.npy": "reference.npy"})
    made(directory, "reward", out_model="models/reward")
    made(directory, "lora", out_model="models/lora")
    made(directory, "teacher_outputs", out_outputs="outputs")
    made(
        directory,
        "evaluate",
        **{
            "out_metrics.json": "evaluated/sft.json",
            "out_predictions.jsonl": "predictions/sft.jsonl",
        },
    )
    shutil.rmtree(directory / ".resume")
    shutil.rmtree(directory / "runs")
    return directory


def made(directory: Path, command: str, **kept: str) -> None:
    """Run a command and keep some of its outputs elsewhere; the others are thrown away."""
    outcome = run(command, directory)
    assert outcome.exit_code == 0, f"{command}: {outcome}"
    for output, place in kept.items():
        (directory / place).parent.mkdir(parents=True, exist_ok=True)
        (directory / output.replace("out_", "out/")).rename(directory / place)
    shutil.rmtree(directory / "out")


def chat(question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_params(directory: Path, params: Any) -> None:
    text = yaml.safe_dump(params, sort_keys=False)
    (directory / "params.yaml").write_text(text, encoding="utf-8")


def contents(directory: Path) -> dict[str, str]:
    """Marks of every file but resume checkpoints, by path; also of folders named as unfinished."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name.startswith((".resume", "__pycache__")):
            continue
        if path.is_file():
            marks = path.stat()
            found[name] = f"{marks.st_ino} {marks.st_size} {marks.st_mtime_ns}"
        elif path.is_dir() and ".partial" in name:
            found[name] = "unfinished"
    return found
