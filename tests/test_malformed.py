"""Malformed input of every kind: one clear line, a non-zero exit, and nothing written.

`CAUSES` lists what can be wrong. Each cause breaks a workspace in which every command works, in
one place, by hand or with a place and value drawn by Hypothesis, and says which command is to
complain and what its line must name.
"""

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minimind.params import SHARED
from tests.broken import COMMANDS, build, chat, contents, run, write_params
from tests.graph import ROOT
from tests.shipped import shipped_params

# One worker: the tests share a workspace, and are counted.
pytestmark = pytest.mark.xdist_group("malformed")


@dataclass(frozen=True)
class Case:
    """A workspace broken in one place."""

    command: str
    broken: Callable[[Path], object]
    named: tuple[str, ...]  # what the line must name
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


CAUSES: dict[str, st.SearchStrategy[Case] | list[Case]] = {}
NUM_DRAWN = 8  # examples of a cause that Hypothesis draws from


# Ways to break things


def with_params(**changes: Any) -> Callable[[Path], None]:
    """Set parameters by dotted name; `...` removes one."""

    def broken(directory: Path) -> None:
        params = yaml.safe_load((directory / "params.yaml").read_text(encoding="utf-8"))
        for name, value in changes.items():
            *parents, key = name.split("__")
            section = params
            for parent in parents:
                section = section[parent]
            if value is ...:
                del section[key]
            else:
                section[key] = value
        write_params(directory, params)

    return broken


def with_text(file: str, text: str | bytes) -> Callable[[Path], None]:
    def broken(directory: Path) -> None:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_bytes(data)

    return broken


def with_line(file: str, number: int, line: str | bytes) -> Callable[[Path], None]:
    """Put another line in the place of line `number`, from 1."""

    def broken(directory: Path) -> None:
        lines = (directory / file).read_bytes().splitlines()
        lines[number - 1] = line if isinstance(line, bytes) else line.encode()
        (directory / file).write_bytes(b"\n".join(lines) + b"\n")

    return broken


def with_row(file: str, number: int, row: Any) -> Callable[[Path], None]:
    return with_line(file, number, json.dumps(row))


def with_json(file: str, **changes: Any) -> Callable[[Path], None]:
    def broken(directory: Path) -> None:
        value = json.loads((directory / file).read_text(encoding="utf-8"))
        for key, new in changes.items():
            if new is ...:
                del value[key]
            else:
                value[key] = new
        (directory / file).write_text(json.dumps(value), encoding="utf-8")

    return broken


def with_weights(
    folder: str, change: Callable[[dict[str, torch.Tensor]], object], file: str = "model"
) -> Callable[[Path], None]:
    def broken(directory: Path) -> None:
        path = directory / folder / f"{file}.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    return broken


def with_array(
    file: str, dtype: str, change: Callable[[np.ndarray], object]
) -> Callable[[Path], None]:
    def broken(directory: Path) -> None:
        array = np.fromfile(directory / file, dtype=dtype)
        change(array)
        array.tofile(directory / file)

    return broken


def cut(file: str, share: float) -> Callable[[Path], None]:
    def broken(directory: Path) -> None:
        data = (directory / file).read_bytes()
        (directory / file).write_bytes(data[: int(share * len(data))])

    return broken


def without(file: str) -> Callable[[Path], None]:
    def broken(directory: Path) -> None:
        path = directory / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return broken


def as_folder(file: str) -> Callable[[Path], None]:
    def broken(directory: Path) -> None:
        (directory / file).unlink()
        (directory / file).mkdir()

    return broken


def as_file(folder: str) -> Callable[[Path], None]:
    def broken(directory: Path) -> None:
        shutil.rmtree(directory / folder, ignore_errors=True)
        (directory / folder).parent.mkdir(parents=True, exist_ok=True)
        (directory / folder).write_text("in the way")

    return broken


def nothing(directory: Path) -> None:
    """The workspace is as it should be; an option or a variable is not."""


# What is wrong: parameters

SECTIONS = {  # of a command
    **{name: name for name in ("mini_world", "tokenizer", "pretrain", "sft", "dpo", "reason")},
    **{
        name: name
        for name in ("reward", "grpo", "spo", "rejection_sampling", "thinking", "distill", "lora")
    },
    **{name: name for name in ("teacher_outputs", "evaluate")},
    "encode sft": "encode.sft",
    "encode dpo": "encode.dpo",
}
PARAMS = shipped_params()


def keys_of(section: str) -> list[str]:
    value = PARAMS
    for part in section.split("."):
        value = value[part]
    return list(value)


def a_key(*with_type: type) -> st.SearchStrategy[tuple[str, str]]:
    """A command, and the dotted name of a key that it reads."""
    pairs = []
    for command, section in SECTIONS.items():
        value = PARAMS
        for part in section.split("."):
            value = value[part]
        pairs += [
            (command, f"{section}.{key}")
            for key, found in value.items()
            if key not in SHARED and (not with_type or type(found) in with_type)
        ]
    return st.sampled_from(pairs)


def key_case(pair: tuple[str, str], value: Any, *named: str) -> Case:
    command, key = pair
    changed = with_params(**{key.replace(".", "__"): value})
    return Case(command, changed, ("params.yaml", key, *named))


def misspelt(pair: tuple[str, str]) -> Case:
    command, key = pair

    def broken(directory: Path) -> None:
        with_params(**{key.replace(".", "__"): ..., f"{key}s".replace(".", "__"): 1})(directory)

    return Case(command, broken, ("params.yaml", f"{key}s is not a known key", "allowed are"))


REQUIRED = {  # what has no default, of some commands
    "mini_world": ["num_sft", "max_value"],
    "tokenizer": ["vocab_size"],
    "encode sft": ["max_length"],
    "pretrain": ["init"],
    "sft": ["init"],
    "dpo": ["init", "beta", "nll_weight"],
    "reason": ["init", "tag_weight", "final_tag_weight"],
    "teacher_outputs": ["temperature", "top_k"],
    "distill": ["init", "teacher", "student"],
    "grpo": ["init"],
    "rejection_sampling": ["num_samples", "max_kept_per_prompt"],
    "thinking": ["num_prompts", "max_new_tokens"],
}
CAUSES["a key is missing"] = [
    key_case((command, f"{SECTIONS[command]}.{key}"), ..., "is missing")
    for command, keys in REQUIRED.items()
    for key in keys
]
CAUSES["a key is misspelt"] = st.builds(misspelt, a_key())
CAUSES["a number is of another type"] = st.builds(
    key_case, a_key(int, float), st.sampled_from(["many", "", [1], {"a": 1}, None, "0x10", "1 0"])
)
CAUSES["a word is of another type"] = st.builds(
    key_case, a_key(str), st.sampled_from([[], {"a": 1}, 7, None, 1.5])
)
CAUSES["a flag is of another type"] = st.builds(
    key_case,
    st.sampled_from(
        [(stage, f"{stage}.gradient_checkpointing") for stage in ("pretrain", "sft", "dpo", "lora")]
        + [(stage, f"{stage}.trust_remote_code") for stage in ("grpo", "spo")]
    ),
    st.sampled_from(["perhaps", 7, [], None]),
)
CAUSES["a number is NaN or infinite"] = st.builds(
    key_case, a_key(float), st.sampled_from([float("nan"), float("inf"), -float("inf")])
)
CAUSES["a number is below what is allowed"] = st.builds(
    key_case,
    a_key(int, float),
    st.sampled_from([-1, -(10**30)]),
)
CAUSES["a number is a fraction"] = st.builds(key_case, a_key(int), st.just(1.5))
CAUSES["a choice that there is not"] = [
    key_case((stage, f"{stage}.{key}"), "best", "'best'")
    for stage in ("sft", "dpo", "grpo", "distill")
    for key in ("optimizer", "schedule", "dtype")
] + [
    key_case(("dpo", "dpo.reduction"), "max", "'max'"),
    key_case(("grpo", "grpo.loss_type"), "ppo", "'ppo'"),
    key_case(("teacher_outputs", "teacher_outputs.mode"), "offline", "'offline'"),
    key_case(("lora", "lora.projections"), ["q_proj", "x_proj"], "x_proj"),
    key_case(("lora", "lora.projections"), ["q_proj", "q_proj"], "q_proj stands there twice"),
    key_case(("grpo", "grpo.rewards.format"), 1e7, "10000000.0"),
    key_case(("encode sft", "data.on_bad_row"), "ignore", "'ignore'"),
    key_case(("evaluate", "dtype"), "best", "'best'"),
]
CAUSES["a key that sections share is missing or of another type"] = [
    Case("sft", with_params(seed=...), ("params.yaml: seed is missing",)),
    Case("reference", with_params(dtype=...), ("params.yaml: dtype is missing",)),
    Case("distill", with_params(dtype=None), ("params.yaml: dtype is None",)),
    Case("encode sft", with_params(seed="x"), ("params.yaml: seed is 'x'",)),
    Case("mini_world", with_params(seed=[1]), ("params.yaml: seed is [1]",)),
    Case("grpo", with_params(grpo__seed="x"), ("params.yaml: grpo.seed is 'x'",)),
    Case("evaluate", with_params(evaluate__seed=1), ("evaluate.seed is not a known key",)),
]
CAUSES["a number is far too large"] = [
    key_case(("pretrain", "pretrain.seed"), 10**30),
    key_case(("sft", "sft.seed"), 2**64),
    key_case(("grpo", "grpo.seed"), 10**20),
    key_case(("rejection_sampling", "seed"), 10**20),
    key_case(("lora", "lora.seed"), 10**20),
    key_case(("tokenizer", "tokenizer.vocab_size"), 10**30),
    key_case(("pretrain", "model.hidden_size"), 10**12),
    key_case(("pretrain", "model.num_layers"), 10**12),
    key_case(("distill", "distill.student.hidden_size"), 10**12),
    key_case(("lora", "lora.rank"), 10**12),
    key_case(("sft", "sft.epochs"), 1e300),
]
CAUSES["sections that do not fit together"] = [
    Case("pretrain", with_params(model__num_heads=3), ("model: ", "num_heads 3")),
    Case("pretrain", with_params(model__num_kv_heads=5), ("model: ", "num_kv_heads 5")),
    Case("distill", with_params(distill__student__num_heads=8), ("distill.student", "even")),
    Case("sft", with_params(sft__patience=1, sft__validation_share=0.0), ("patience",)),
    Case("pretrain", with_params(model__num_experts=2, model__num_experts_per_token=3), ("3",)),
    key_case(("tokenizer", "tokenizer.vocab_size"), 266, "267"),
    key_case(("encode sft", "encode.sft.max_length"), 7, "8"),
    Case(
        "mini_world",
        with_params(mini_world__num_eval_per_level=[10**9] * 4),
        ("num_eval_per_level",),
    ),
    key_case(("grpo", "grpo.num_generations"), 1, "2"),
    Case("grpo", with_params(grpo__rewards__langage=1.0), ("rewards.langage", ", language, ")),
    Case("distill", with_params(distill__student__layers=1), (".layers", ", num_layers, ")),
    key_case(("rejection_sampling", "rejection_sampling.endpoint"), "ftp://x", "http"),
    Case(
        "rejection_sampling",
        with_params(rejection_sampling__endpoint="http://localhost:1/v1"),
        ("rejection_sampling.model",),
    ),
    Case(
        "grpo",
        with_params(grpo__rewards={**PARAMS["grpo"]["rewards"], "format": 0.0, "answer": 0.0}),
        ("grpo.rewards", "at least one weight"),
    ),
    Case(
        "grpo",
        with_params(
            grpo__rewards={**PARAMS["grpo"]["rewards"], "reward_model": 1.0},
            grpo__hub_reward_model="someone/model",
        ),
        ("hub_reward_model", "commit"),
    ),
]
CAUSES["a section is missing"] = [
    Case(command, with_params(**{section.replace(".", "__"): ...}), ("params.yaml", section))
    for command, section in SECTIONS.items()
]
CAUSES["a section is no section"] = [
    Case(command, with_params(**{section.replace(".", "__"): value}), ("params.yaml", section))
    for (command, section), value in zip(SECTIONS.items(), [5, "x", [], None] * 5, strict=False)
]
PARAMS_FILES = {
    "empty": b"",
    "a comment": b"# nothing\n",
    "a list": b"- sft\n",
    "a word": b"sft\n",
    "broken": b"sft: {lr: 1\n",
    "a tab": b"sft:\n\tlr: 1\n",
    "Latin-1": "sft: {init: Mod\xe8le}\n".encode("latin-1"),
    "NUL": b"sft: \x00\n",
    "binary": bytes(range(256)),
    "UTF-16": "sft: 1\n".encode("utf-16"),
    "a tag": b"sft: !!python/object/apply:os.system ['true']\n",
    "an unknown alias": b"sft: *base\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "an impossible date": b"sft: 2001-99-99\n",
    "deep": b"[" * 20_000,
    "deep and closed": b"a: " + b"[" * 3_000 + b"]" * 3_000,
    "many digits": b"sft: " + b"9" * 5_000 + b"\n",
    "an unhashable key": b"{[1]: 2, {a: b}: 3}\n",
    "aliases of aliases": b"sft: &0 [x]\n"
    + b"".join(b"%d: &%d [%s]\n" % (n, n, b", ".join([b"*%d" % (n - 1)] * 9)) for n in range(1, 9)),
    "an alias in itself": b"sft: &sft [*sft]\n",
    "no date": b"sft: !!timestamp x\n",
    "no number": b"sft: !!int ''\n",
    "no flag": b"sft: !!bool x\n",
    "no character": b'sft: "\\UFFFFFFFF"\n',
}
CAUSES["a path leads nowhere"] = [
    key_case(("check", key), value, f"{key} is {value!r}, ", "does not exist", advice)
    for key, value, advice in [
        ("reason.init", "dpo", "; write models/dpo."),
        ("pretrain.init", "tokenizer", "; write models/tokenizer."),
        ("sft.init", "models/pretain", "; did you mean models/pretrain?"),
        ("lora.init", "Qwen/Qwen3-0.6B", "; write the path of something"),
        ("grpo.init", 5, "; write the path of something"),
        ("distill.teacher", "sft", "; write models/sft."),
        ("spo.reward_model", "reward", "; write models/reward."),
        ("grpo.custom_reward", "custm.py", "; did you mean custom.py?"),
        ("encode.tokenizer", "models/tokeniser", "; did you mean models/tokenizer?"),
        ("data.sft", "sft", "; write the path of something"),
        ("data.problems", "./problem.jsonl", "; did you mean problems.jsonl?"),
        ("distill.data", "chats", "for data/encoded/chats, a path that"),
        ("lora.data", "chats", "; write one of pretrain, sft, dpo, reason, distill, lora."),
    ]
]


def in_a_folder_that_dvc_tracks(directory: Path) -> None:
    (directory / "mine").mkdir()
    (directory / "mine/chats.jsonl").write_bytes((directory / "chats.jsonl").read_bytes())
    (directory / "mine.dvc").write_text("outs:\n- path: mine\n", encoding="utf-8")
    with_params(data__sft="mine/chat.jsonl")(directory)


CAUSES["a path leads nowhere"].append(
    Case("check", in_a_folder_that_dvc_tracks, ("did you mean mine/chats.jsonl?",))
)


def as_pipe(file: str) -> Callable[[Path], None]:
    """DVC would wait for it for ever."""

    def broken(directory: Path) -> None:
        (directory / file).unlink(missing_ok=True)
        (directory / file).parent.mkdir(exist_ok=True)
        os.mkfifo(directory / file)

    return broken


def as_dead_link(file: str) -> Callable[[Path], None]:
    def broken(directory: Path) -> None:
        (directory / file).unlink()
        (directory / file).symlink_to("nowhere")

    return broken


CAUSES["a folder holds the project, or the whole disk"] = [
    Case("check", with_params(data__sft=path), (f"data.sft is '{path}', a folder that this pro",))
    for path in ("/", "..", ".")
]
CAUSES["what stands there is no file"] = [
    Case("check", as_pipe("chats.jsonl"), ("data.sft is 'chats.jsonl', but", "a pipe")),
    Case("check", as_pipe("models/base/.pipe"), ("models/base/.pipe is a pipe",)),
    Case("encode sft", as_pipe("chats.jsonl"), ("chats.jsonl is a pipe",)),
    Case("check", as_dead_link("chats.jsonl"), ("data.sft", "a link to nowhere, which is missing")),
]
CAUSES["params.yaml cannot be read"] = [
    Case("sft", with_text("params.yaml", text), ("params.yaml",)) for text in PARAMS_FILES.values()
] + [Case("evaluate", with_params(more="\ud800"), ("params.yaml is not valid YAML",))]
CAUSES["params.yaml is missing or a folder"] = [
    Case("sft", without("params.yaml"), ("params.yaml is missing",)),
    Case("sft", as_folder("params.yaml"), ("params.yaml",)),
    Case("preset", without("params.yaml"), ("params.yaml",)),
]


def twice(key: str, depth: int) -> Callable[[Path], None]:
    def broken(directory: Path) -> None:
        path = directory / "params.yaml"
        indent = "  " * depth
        lines = path.read_text(encoding="utf-8").splitlines()
        place = next(n for n, line in enumerate(lines) if line.startswith(f"{indent}{key}:"))
        lines.insert(place, f"{indent}{key}: 1")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return broken


CAUSES["a key stands in params.yaml twice"] = [
    Case("sft", twice("sft", 0), ("params.yaml:", "sft", "twice")),
    Case("sft", twice("lr", 1), ("params.yaml:", "lr", "twice")),
    Case("mini_world", twice("num_sft", 1), ("params.yaml:", "num_sft", "twice")),
    Case("preset", twice("lr", 1), ("params.yaml", "lr")),
]

# What is wrong: variables of the environment

CAUSES["a variable is malformed"] = [
    Case(command, nothing, (name,), environment={name: value})
    for command, (name, value) in zip(
        ["sft", "pretrain", "dpo", "reason", "grpo", "spo", "lora", "evaluate", "reference"] * 2,
        [
            ("MINIMIND_DEVICE", "gpu"),
            ("MINIMIND_DEVICE", "cuda"),
            ("MINIMIND_THREADS", "-1"),
            ("MINIMIND_THREADS", "two"),
            ("MINIMIND_THREADS", "9" * 30),
            ("MINIMIND_COMPILE", "perhaps"),
            ("MINIMIND_SAVE_SECONDS", "soon"),
            ("MINIMIND_SAVE_SECONDS", "nan"),
            ("MINIMIND_SAVE_SECONDS", "-1"),
            ("MINIMIND_LOG_SECONDS", "x"),
            ("MINIMIND_MATMUL_PRECISION", "low"),
            ("MINIMIND_TRACKER", "wandb,comet"),
            ("MINIMIND_WANDB", "offline"),
        ],
        strict=False,
    )
]

# What is wrong: rows of JSONL

READERS = {  # a command, and the file of rows that it reads
    "tokenizer": "text.jsonl",
    "encode pretrain": "text.jsonl",
    "encode sft": "chats.jsonl",
    "encode dpo": "pairs.jsonl",
    "encode reason": "thoughts.jsonl",
    "grpo": "prompts.jsonl",
    "spo": "prompts.jsonl",
    "rejection_sampling": "prompts.jsonl",
    "thinking": "prompts.jsonl",
    "evaluate": "problems.jsonl",
}
a_reader = st.sampled_from(list(READERS.items()))


def line_case(reader: tuple[str, str], number: int, line: str | bytes) -> Case:
    command, file = reader
    number = 1 + number % 2
    return Case(command, with_line(file, number, line), (f"{file}:{number}: ",))


BROKEN_LINES = ["{", '{"text": "a"', "{'text': 'a'}", "nonsense", '{"text": "a"} {}', "}", '"', "["]
BROKEN_LINES += ['{"text": "a\\x"}', '{"text": 1e}', '{"text" "a"}', '{"a": tru}']
CAUSES["a line is broken JSON"] = st.builds(
    line_case, a_reader, st.integers(0, 1), st.sampled_from(BROKEN_LINES)
)
CAUSES["a line is cut short"] = st.builds(
    lambda reader, share: line_case(
        reader, 1, '{"text": "some text", "prompt": "x"}'[: int(35 * share)]
    ),
    a_reader,
    st.floats(0.03, 0.97),
)
CAUSES["a row is no object"] = st.builds(
    line_case,
    a_reader,
    st.integers(0, 1),
    st.sampled_from(["1", '"x"', "[]", "null", "true", "NaN"]),
)
CAUSES["a row is not UTF-8"] = st.builds(
    lambda reader, junk: line_case(reader, 0, b'{"text": "' + junk + b'\xff"}'),
    a_reader,
    st.binary(max_size=4).filter(lambda junk: not {*junk} & {*b'\n\r"\\'}),
)
CAUSES["a row has none of the keys"] = st.builds(
    lambda reader, key: line_case(reader, 1, json.dumps({key: "a"})),
    a_reader,
    st.sampled_from(["Text", "prompts", "conversation", "", "chosen ", "content"]),
)
CAUSES["a row is nested or numbered beyond measure"] = [
    line_case(reader, 0, line)
    for reader, line in zip(
        READERS.items(),
        ["[" * 100_000, '{"a":' * 100_000, '{"text": ' + "9" * 5_000 + "}"] * 4,
        strict=False,
    )
]
CAUSES["text is of another type"] = st.builds(
    lambda reader, value: line_case(
        reader,
        1,
        json.dumps(
            {"text": value, "prompt": value, "chosen": value, "rejected": "x", "answer": "1"}
            | {"conversations": value}
        ),
    ),
    a_reader,
    st.sampled_from([None, True, {"a": 1}, 10**40, [1], [[]], {}]),
)
CAUSES["text is empty"] = st.builds(
    lambda reader, value: line_case(
        reader,
        1,
        json.dumps(
            {"text": value, "prompt": value, "chosen": value, "rejected": "x", "answer": "1"}
            | {"conversations": []}
        ),
    ),
    st.sampled_from([item for item in READERS.items() if item[0] != "evaluate"]),
    st.sampled_from(["", " ", "\n\t", "\u3000"]),
)
CAUSES["half a character"] = [
    Case(command, with_row(file, 2, row), (f"{file}:2: ",))
    for command, file, row in [
        ("tokenizer", "text.jsonl", {"text": "a\ud800"}),
        ("encode pretrain", "text.jsonl", {"text": "\udfff"}),
        ("encode sft", "chats.jsonl", chat("\ud83d", "a")),
        ("encode dpo", "pairs.jsonl", {"prompt": "a", "chosen": "b\ud800", "rejected": "c"}),
        ("grpo", "prompts.jsonl", {"prompt": "a\ud800", "answer": "1"}),
        ("rejection_sampling", "prompts.jsonl", {"prompt": "a", "answer": "\ud800"}),
        ("evaluate", "problems.jsonl", {"prompt": "a\ud800", "answer": "1"}),
        (
            "evaluate",
            "problems.jsonl",
            {"prompt": "a", "answer": "1", "choices": ["1", "\ud800"], "label": 0},
        ),
        ("evaluate", "problems.jsonl", {"prompt": "a", "answer": "1", "full": "\ud800"}),
        ("evaluate", "problems.jsonl", chat("\ud83d", "1")),
    ]
]
CHATS: dict[str, list[Any]] = {
    "an unknown role": [{"role": "bot", "content": "a"}, {"role": "assistant", "content": "b"}],
    "a role in capitals": [{"role": "User", "content": "a"}, {"role": "assistant", "content": "b"}],
    "a role that is a list": [{"role": [], "content": "a"}, {"role": "assistant", "content": "b"}],
    "no role": [{"content": "a"}],
    "no content": [{"role": "user"}, {"role": "assistant", "content": "b"}],
    "no assistant": [{"role": "user", "content": "a"}],
    "a late system turn": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
    "a tool first": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}],
    "a turn that is a word": ["hello"],
    "an empty turn": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}],
}
CAUSES["turns that make no chat"] = [
    Case(command, with_row(file, 3, {"conversations": turns}), (f"{file}:3: ",))
    for turns in CHATS.values()
    for command, file in (("encode sft", "chats.jsonl"), ("encode reason", "thoughts.jsonl"))
]
THOUGHTS = ["a", "<think>a", "<think>a</think>", "<answer>1</answer><think>a</think>"]
THOUGHTS += ["<think>a</think><answer>1", "<think></think><answer>1</answer>", "<think>a</answer>"]
THOUGHTS += ["<think>a</think>b<answer>1</answer>", "<think><think>a</think><answer>1</answer>"]
CAUSES["tags are not balanced"] = [
    Case("encode reason", with_row("thoughts.jsonl", 2, chat("q", text)), ("thoughts.jsonl:2: ",))
    for text in THOUGHTS
]
PAIRS: list[dict[str, Any]] = [
    {"prompt": "a", "chosen": "b", "rejected": "b"},
    {"prompt": "a", "chosen": "b"},
    {"chosen": "b", "rejected": "c"},
    {"prompt": "a", "chosen": chat("a", "b")["conversations"], "rejected": "c"},
    {"prompt": [], "chosen": chat("a", "b")["conversations"], "rejected": []},
    {"chosen": chat("a", "b")["conversations"], "rejected": chat("x", "c")["conversations"]},
    {"chosen": chat("a", "b")["conversations"], "rejected": chat("a", "b")["conversations"]},
    {"chosen": chat("a", "b")["conversations"], "rejected": chat("a", "b")["conversations"][:1]},
]
CAUSES["sides that make no pair"] = [
    Case("encode dpo", with_row("pairs.jsonl", 4, row), ("pairs.jsonl:4: ",)) for row in PAIRS
]
CAUSES["a prompt without the answer that is needed"] = [
    Case(command, with_row("prompts.jsonl", 2, {"prompt": "a", **answer}), ("prompts.jsonl:2: ",))
    for command in ("grpo", "spo", "rejection_sampling")
    for answer in ({}, {"answer": None}, {"answer": ["7"]}, {"answer": ""})
]
PROBLEMS: list[dict[str, Any]] = [
    {"prompt": "a"},
    {"answer": "1"},
    {"prompt": "a", "answer": "1", "choices": ["1"]},
    {"prompt": "a", "answer": "1", "choices": ["1", "1"], "label": 0},
    {"prompt": "a", "answer": "1", "choices": ["1", "2"]},
    {"prompt": "a", "answer": "1", "choices": ["1", "2"], "label": 2},
    {"prompt": "a", "answer": "1", "choices": ["1", "2"], "label": -1},
    {"prompt": "a", "answer": "1", "choices": "12", "label": 0},
    {"prompt": "a", "answer": "1", "level": "hard"},
    {"prompt": "a", "answer": "1", "level": -1},
    {"prompt": "a", "answer": "1", "level": 1.5},
    {"prompt": "a", "answer": "1", "full": []},
    {"prompt": "a", "answer": "1", "completion_prompt": ""},
    {"prompt": ["a"], "answer": "1"},
    {"prompt": "", "answer": "1"},
    {"conversations": chat("a", "no number")["conversations"]},
    {"conversations": []},
]
CAUSES["a problem that cannot be asked"] = [
    Case("evaluate", with_row("problems.jsonl", 2, row), ("problems.jsonl:2: ",))
    for row in PROBLEMS
]
CAUSES["a row that is too long"] = [
    Case(command, with_row(file, 2, row), (f"{file}:2: ",))
    for command, file, row in [
        ("grpo", "prompts.jsonl", {"prompt": "a b " * 200, "answer": "1"}),
        ("spo", "prompts.jsonl", {"prompt": "a b " * 200, "answer": "1"}),
        ("rejection_sampling", "prompts.jsonl", {"prompt": "a b " * 200, "answer": "1"}),
        ("thinking", "prompts.jsonl", {"prompt": "a b " * 200}),
        ("evaluate", "problems.jsonl", {"prompt": "a b " * 200, "answer": "1"}),
        ("encode sft", "chats.jsonl", chat("a b " * 300, "1")),
        ("encode dpo", "pairs.jsonl", {"prompt": "a b " * 300, "chosen": "1", "rejected": "2"}),
    ]
]
CAUSES["a file without rows"] = [
    Case(command, with_text(file, text), (file, "no rows"))
    for (command, file), text in zip(READERS.items(), ["", "\n \n", "\ufeff"] * 4, strict=False)
]
CAUSES["rows are missing"] = [
    Case(command, without(file), (file, "missing")) for command, file in READERS.items()
]
CAUSES["a folder without shards"] = [
    Case(command, as_folder(file), (file, "folder")) for command, file in READERS.items()
]
CAUSES["a binary file in the place of rows"] = [
    Case(command, with_text(file, random.Random(1).randbytes(3000)), (f"{file}:",))
    for command, file in READERS.items()
]
CAUSES["rows of NUL bytes"] = [
    Case(command, with_line(file, 2, b"\0" * 100), (f"{file}:2: ",))
    for command, file in READERS.items()
]
SYNONYMS = ["", "{}", "[[]]", '[["a"]]', '[["a", 1]]', '[["a", "a"]]', '[["a", "b "]]', "[" * 9999]
SYNONYMS += ['[["a", "x1"]]', '[["a", "<b>"]]', '[["a", "b"], ["B", "c"]]', "\x00"]
CAUSES["a table of synonyms that is none"] = [
    Case(
        "encode sft",
        lambda directory, text=text: (
            with_text("synonyms.json", text)(directory),
            with_params(encode__sft__augment_copies=1)(directory),
        ),
        ("synonyms.json",),
    )
    for text in [*SYNONYMS, b"\xff\xfe"]
]

# What is wrong: encoded data

TRAINERS = {"pretrain": "pretrain", "sft": "sft", "reference": "dpo", "dpo": "dpo"}
TRAINERS |= {"reason": "reason", "reward": "dpo", "lora": "sft", "distill": "sft"}
TRAINERS |= {"teacher_outputs": "sft"}
a_trainer = st.sampled_from(list(TRAINERS.items()))
ARRAYS = ("tokens", "loss_mask", "offsets", "trained_offsets", "sources")


def data_case(trainer: tuple[str, str], file: str, broken: Callable[[str], Any]) -> Case:
    command, data = trainer
    path = f"encoded/{data}/{file}"
    return Case(command, broken(path), (f"encoded/{data}",))


CAUSES["an array is cut short"] = st.builds(
    lambda trainer, name, share: data_case(trainer, f"{name}.bin", lambda f: cut(f, share)),
    a_trainer,
    st.sampled_from(ARRAYS),
    st.floats(0, 0.99),
)
CAUSES["an array is too long"] = st.builds(
    lambda trainer, name: data_case(
        trainer,
        f"{name}.bin",
        lambda f: lambda d: (d / f).write_bytes((d / f).read_bytes() + b"\0" * 8),
    ),
    a_trainer,
    st.sampled_from(ARRAYS),
)
CAUSES["an array is missing"] = st.builds(
    lambda trainer, name: data_case(trainer, f"{name}.bin", without),
    a_trainer,
    st.sampled_from(ARRAYS),
)


def put(place: int, value: int) -> Callable[[np.ndarray], None]:
    return lambda array: array.__setitem__(place, value)


CAUSES["rows that go back"] = st.builds(
    lambda trainer, name, place, value: data_case(
        trainer, f"{name}.bin", lambda f: with_array(f, "<i8", put(place, value))
    ),
    a_trainer,
    st.sampled_from(ARRAYS[2:]),
    st.integers(1, 4),
    st.sampled_from([-1, 10**9, 2**62, 0]),
)
CAUSES["rows that do not begin at 0"] = st.builds(
    lambda trainer, name: data_case(
        trainer, f"{name}.bin", lambda f: with_array(f, "<i8", put(0, 1))
    ),
    a_trainer,
    st.sampled_from(ARRAYS[2:]),
)
CAUSES["a token that the tokenizer does not have"] = st.builds(
    lambda trainer, place, value: data_case(
        trainer, "tokens.bin", lambda f: with_array(f, "<u2", put(place, value))
    ),
    a_trainer,
    st.integers(0, 40),
    st.integers(1000, 2**16 - 1),
)
CAUSES["a class that there is not"] = st.builds(
    lambda trainer, place, value: data_case(
        trainer, "loss_mask.bin", lambda f: with_array(f, "u1", put(place, value))
    ),
    a_trainer,
    st.integers(0, 40),
    st.integers(3, 255),
)
CAUSES["a row's first token is to be predicted"] = [
    data_case(trainer, "loss_mask.bin", lambda f: with_array(f, "u1", put(0, 1)))
    for trainer in TRAINERS.items()
]
CAUSES["a loss mask that the index does not count"] = [
    data_case(trainer, "loss_mask.bin", lambda f: with_array(f, "u1", put(2, 1)))
    for trainer in TRAINERS.items()
    if trainer[1] != "pretrain"  # all of its tokens are trained
]
META = {"rows": [0, -1, 10**6, "12", None, 1.5, True], "tokens": [0, 10**9, "x"]}
META |= {"token_dtype": ["uint8", "float64", "O", 7], "rows_per_sample": [0, 3, "2"]}
META |= {"sources": [0, -1, 10**6, "2", None, 1.5, True]}
META |= {"format": [1, None], "tokenizer": [0], "trained_tokens": [-1, 10**9], "max_length": ["9"]}
CAUSES["meta.json does not describe the arrays"] = st.builds(
    lambda trainer, change: data_case(
        trainer, "meta.json", lambda f: with_json(f, **{change[0]: change[1]})
    ),
    a_trainer,
    st.sampled_from([(key, value) for key, values in META.items() for value in [*values, ...]]),
)
META_FILES = [b"", b"{", b"[]", b"null", b"\xff", b"[" * 50_000, b'{"rows": ' + b"9" * 5000 + b"}"]
CAUSES["meta.json cannot be read"] = [
    data_case(trainer, "meta.json", lambda f, text=text: with_text(f, text))
    for trainer, text in zip(TRAINERS.items(), META_FILES, strict=False)
] + [data_case(("sft", "sft"), "meta.json", without)]
CAUSES["a folder of data is missing or a file"] = [
    case
    for command, data in TRAINERS.items()
    for case in (
        Case(command, without(f"encoded/{data}"), (f"encoded/{data}",)),
        Case(command, as_file(f"encoded/{data}"), (f"encoded/{data}",)),
    )
]
CAUSES["data of another format"] = [
    Case(command, nothing, (path, wanted), options=(option, path))
    for command, option, path, wanted in [
        ("dpo", "--preferences", "encoded/sft", "preference"),
        ("reference", "--preferences", "encoded/sft", "preference"),
        ("reward", "--preferences", "encoded/sft", "preference"),
        ("sft", "--conversations", "encoded/dpo", "chat"),
        ("reason", "--conversations", "encoded/dpo", "chat"),
    ]
] + [
    Case(command, with_params(lora__data="dpo", distill__data="dpo"), ("encoded/dpo", "chat"))
    for command in ("lora", "teacher_outputs", "distill")
]


def with_other_tokenizer(folder: str) -> Callable[[Path], None]:
    """A tokenizer of the same size that encodes otherwise."""

    def broken(directory: Path) -> None:
        path = directory / folder / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        path.write_text(json.dumps(content), encoding="utf-8")

    return broken


def with_larger_tokenizer(folder: str) -> Callable[[Path], None]:
    """A tokenizer with more tokens than the model has."""

    def broken(directory: Path) -> None:
        path = directory / folder / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        last = content["added_tokens"][-1]
        content["added_tokens"].append(last | {"id": last["id"] + 1, "content": "<more>"})
        path.write_text(json.dumps(content), encoding="utf-8")

    return broken


# What is wrong: checkpoints and tokenizers

LOADERS = [
    "sft",
    "reference",
    "dpo",
    "reason",
    "reward",
    "grpo",
    "spo",
    "rejection_sampling",
    "thinking",
]
LOADERS += ["teacher_outputs", "lora", "export", "evaluate"]
a_loader = st.sampled_from(LOADERS)
BASE, BASE_WEIGHTS = "models/base", "models/base/model.safetensors"


def base_case(command: str, broken: Callable[[Path], object], *named: str) -> Case:
    return Case(command, broken, named or (BASE,))


CAUSES["a word is a book"] = [
    key_case(("sft", "sft.schedule"), "a" * 10**6, "minimind_cosine"),
    key_case(("check", "data.sft"), "a/" * 1500, "no stage makes"),
    base_case("export", with_json("models/base/config.json", model_type="a" * 10**6)),
]
CAUSES["a checkpoint is missing or a file"] = [
    base_case(command, broken) for command in LOADERS for broken in (without(BASE), as_file(BASE))
]
CAUSES["weights are missing"] = st.builds(
    base_case, a_loader, st.just(without(BASE_WEIGHTS)), st.just(BASE)
)
CAUSES["weights are cut short"] = st.builds(
    lambda command, share: base_case(command, cut(BASE_WEIGHTS, share)),
    a_loader,
    st.floats(0, 0.999),
)
CAUSES["weights are something else"] = [
    base_case(command, with_text(BASE_WEIGHTS, data))
    for command, data in zip(
        LOADERS,
        [
            b"not weights at all",
            b"\x80\x04\x95 a pickle",
            struct.pack("<Q", 2**60) + b"{}",
            struct.pack("<Q", 2) + b"{}",
            struct.pack("<Q", 2) + b"[]",
            struct.pack("<Q", 30) + b'{"a": {"dtype": "F32"}}       ',
            bytes(1000),
            zlib.compress(b"x" * 1000),
        ],
        strict=False,
    )
]
a_weight = st.sampled_from(
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
    ]
)


def weight_case(command: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    def changed(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = change(weights[name]).contiguous()

    return base_case(command, with_weights(BASE, changed), BASE, name)


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


NORM = "model.norm.weight"
CAUSES["weights hold NaN or infinity"] = st.builds(
    lambda command, name, value: weight_case(command, name, poisoned(value)),
    a_loader,
    a_weight,
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
CAUSES["a weight is missing"] = st.builds(
    lambda command, name: base_case(
        command, with_weights(BASE, lambda weights: weights.pop(name)), BASE, name
    ),
    a_loader,
    a_weight,
)
CAUSES["a weight too many"] = st.builds(
    lambda command, name: base_case(
        command,
        with_weights(BASE, lambda weights: weights.update({name: torch.ones(2)})),
        BASE,
        name,
    ),
    a_loader,
    st.sampled_from(["bias", "model.layers.1.mlp.up_proj.weight", "score.weight"]),
)
CAUSES["a weight of another shape"] = st.builds(
    lambda command, name, change: weight_case(command, name, change),
    a_loader,
    a_weight,
    st.sampled_from([lambda t: t[:-1], lambda t: t[None], lambda t: t.flatten()[:1]]),
)
CAUSES["weights that are whole numbers"] = [
    weight_case(command, "model.norm.weight", lambda tensor: tensor.to(torch.int64))
    for command in ("sft", "export")
]
CAUSES["a head of its own"] = [
    base_case(
        command,
        with_weights(BASE, lambda w: w.update({"lm_head.weight": torch.ones(268, 8)})),
        BASE,
        "lm_head.weight",
    )
    for command in ("sft", "evaluate", "export")
]
CONFIG: dict[str, list[Any]] = {
    "model_type": ["gpt2", None, [], 7],
    "vocab_size": [0, -1, 10**12, 100, 1.5, "x"],
    "hidden_size": [0, 7, 16, None, 10**12, "8", 8.0, float("inf")],
    "num_hidden_layers": [0, 2, 10**9, "one"],
    "num_attention_heads": [3, 0, None],
    "num_key_value_heads": [2, 3],
    "intermediate_size": [7, None],
    "rms_norm_eps": [0, float("nan")],
    "rope_parameters": ["x", {"rope_type": "linear"}, {"rope_type": "yarn"}, 7],
    "max_position_embeddings": [0, -5],
    "hidden_act": ["gelu"],
    "auto_map": [{"AutoModelForCausalLM": "modeling.Model"}],
}
CAUSES["weights that float32 does not hold"] = [
    base_case(
        command,
        with_weights(BASE, lambda w: w.update({NORM: w[NORM].double().fill_(1e308)})),
        BASE,
        NORM,
    )
    for command in LOADERS
]


def sharded(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    """Weights in two files, and an index of them that is then changed."""

    def broken(directory: Path) -> None:
        weights = load_file(directory / BASE_WEIGHTS)
        (directory / BASE_WEIGHTS).unlink()
        files = {name: f"part-{name == NORM:d}.safetensors" for name in weights}
        for file in set(files.values()):
            part = {name: weights[name] for name in weights if files[name] == file}
            save_file(part, directory / BASE / file)
        change(files)
        index = directory / f"{BASE_WEIGHTS}.index.json"
        index.write_text(json.dumps({"weight_map": files}))

    return broken


CAUSES["parts of weights that are not whole"] = [
    base_case(command, broken, f"{BASE}/{named}")
    for command in ("sft", "teacher_outputs")
    for broken, named in [
        (sharded(lambda files: files.update({NORM: "../part-1.safetensors"})), "model"),
        (sharded(lambda files: files.update({NORM: "part-0.safetensors"})), "model"),
        (sharded(lambda files: files.update({NORM: 7})), "model"),  # type: ignore[dict-item]
        (sharded(lambda files: files.update({NORM: "part-2.safetensors"})), "part-2.safetensors"),
        (sharded(lambda files: files.update(more="part-3.safetensors")), "part-3.safetensors"),
        (sharded(lambda files: files.clear()), "model.safetensors.index.json"),
        (sharded(lambda files: files.pop(NORM)), "model.safetensors"),
    ]
]
OTHER_FILES = ("pytorch_model.bin", "model.gguf", "adapter_config.json", "tf_model.h5")


def instead_of(file: str, other: str) -> Callable[[Path], object]:
    return lambda directory: (directory / BASE / file).rename(directory / BASE / other)


CAUSES["a checkpoint of another kind"] = [
    base_case(command, instead_of("model.safetensors", other), other)
    for command in ("sft", "teacher_outputs")
    for other in OTHER_FILES
] + [base_case("grpo", instead_of("config.json", other), other) for other in OTHER_FILES]
CAUSES["no tokenizer alone and no checkpoint either"] = [
    Case(
        "pretrain",
        lambda directory, other=other: (  # type: ignore[misc]
            with_params(pretrain__init=BASE)(directory),
            instead_of("config.json", other)(directory),
        ),
        (BASE, other if other in OTHER_FILES else "model.safetensors"),
    )
    for other in (*OTHER_FILES, "config.jsn")
]
CAUSES["config.json is of another model"] = st.builds(
    lambda command, change: base_case(
        command, with_json(f"{BASE}/config.json", **{change[0]: change[1]})
    ),
    a_loader.filter(lambda command: command != "teacher_outputs"),
    st.sampled_from(
        [(key, value) for key, values in CONFIG.items() for value in values]
        + [(key, ...) for key in list(CONFIG)[:8]]
    ),
)
CONFIG_FILES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"7",
    b"\xff\xfe",
    b"[" * 50_000,
    b'{"a": ' + b"9" * 5000,
]
CAUSES["config.json cannot be read"] = [
    base_case(command, with_text(f"{BASE}/config.json", text))
    for command, text in zip(LOADERS, [*CONFIG_FILES, b'{"a": ' + b"9" * 5000 + b"}"], strict=False)
] + [
    base_case("sft", with_json(f"{BASE}/config.json", **{key: 5}), BASE, f"{key} is 5")
    for key in ("rope_parameters", "rope_scaling")
]
CAUSES["a tokenizer that is not the data's"] = [
    Case(command, with_other_tokenizer(folder), (f"encoded/{data}", folder))
    for command, data in TRAINERS.items()
    if command != "distill"
    for folder in ["models/tokenizer" if command == "pretrain" else BASE]
] + [Case("distill", with_other_tokenizer("models/tokenizer"), ("encoded/sft",))]
CAUSES["a tokenizer that is larger than its model"] = [
    Case(command, with_larger_tokenizer(BASE), (BASE, "269"))
    for command in ("grpo", "spo", "rejection_sampling", "thinking", "evaluate", "export")
]
TOKENIZERS = {"adopt": "foreign", "encode sft": "models/tokenizer", "pretrain": "models/tokenizer"}
TOKENIZERS |= {"sft": BASE, "grpo": BASE, "evaluate": BASE, "distill": "models/tokenizer"}
a_tokenizer = st.sampled_from(list(TOKENIZERS.items()))
CAUSES["tokenizer.json is cut short"] = st.builds(
    lambda user, share: Case(user[0], cut(f"{user[1]}/tokenizer.json", share), (user[1],)),
    a_tokenizer,
    st.floats(0, 0.99),
)
CAUSES["tokenizer.json is missing"] = [
    Case(command, without(f"{folder}/tokenizer.json"), (folder,))
    for command, folder in TOKENIZERS.items()
]
TOKENIZER_CHANGES: list[dict[str, Any]] = [
    {"model": ...},
    {"model": None},
    {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []},
    {"added_tokens": []},
    {"added_tokens": [{"id": -1, "content": "x"}]},
    {"pre_tokenizer": {"type": "Nonsense"}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
]
CAUSES["tokenizer.json is no tokenizer of ours"] = [
    Case(command, with_json(f"{folder}/tokenizer.json", **change), (folder,))
    for (command, folder), change in zip(
        list(TOKENIZERS.items()) * 2, TOKENIZER_CHANGES, strict=False
    )
]


def with_edited_tokenizer(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def broken(directory: Path) -> None:
        path = directory / "models/tokenizer/tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        edit(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return broken


PREPEND = [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]
STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}
CAUSES["a tokenizer of ours was edited so that chats are encoded otherwise"] = [
    Case("encode sft", with_edited_tokenizer(edit), ("models/tokenizer: ",))
    for edit in (
        lambda made: made.update(normalizer={"type": "Sequence", "normalizers": PREPEND}),
        lambda made: made.update(normalizer=STRIP),
        lambda made: made["model"].update(dropout=0.5),
        lambda made: [token.update(lstrip=True, rstrip=True) for token in made["added_tokens"]],
    )
]
CAUSES["a tokenizer without an unknown token"] = [
    Case(
        command,
        with_json(
            f"{folder}/tokenizer.json",
            model={"type": "WordLevel", "vocab": {"user": 0}, "unk_token": "?"},
        ),
        (folder, "unknown token"),
    )
    for command, folder in TOKENIZERS.items()
]
CAUSES["tokenizer_config.json cannot be read"] = [
    Case("adopt", with_text("foreign/tokenizer_config.json", text), ("foreign/tokenizer_config",))
    for text in (b"{", b"[]", b"\xff", b"[" * 50_000, b"9" * 5000)
]

# What is wrong: what some stages read beside


def with_npy(array: np.ndarray) -> Callable[[Path], None]:
    return lambda directory: np.save(directory / "reference.npy", array, allow_pickle=True)


CAUSES["reference log-probabilities that do not fit"] = [
    Case("dpo", broken, ("reference.npy", "reference"))
    for broken in [
        with_npy(np.zeros(23, np.float32)),
        with_npy(np.zeros((24, 1), np.float32)),
        with_npy(np.full(24, np.nan, np.float32)),
        with_npy(np.full(24, -np.inf, np.float32)),
        with_npy(np.zeros(24, np.int64)),
        with_npy(np.zeros(24, "U3")),
        with_npy(np.array([{}] * 24)),
        with_text("reference.npy", b""),
        with_text("reference.npy", b"not numpy"),
        with_text("reference.npy", b"PK\x03\x04"),
        cut("reference.npy", 0.9),
        cut("reference.npy", 0.3),
        without("reference.npy"),
        as_folder("reference.npy"),
    ]
]
META_OF_TEACHER: list[dict[str, Any]] = [
    {"tokens": 7},
    {"tokens": -1},
    {"num_ids": 0},
    {"num_ids": 3},
    {"num_buckets": 0},
    {"num_buckets": 4},
    {"temperature": 0},
    {"temperature": -1},
    {"id_dtype": "uint32"},
    {"mode": "later"},
    {"dtype": "int8"},
    {"mode": ...},
    {"more": 1},
]
CAUSES["teacher outputs that do not fit"] = [
    Case("distill", with_json("outputs/meta.json", **change), ("outputs", "teacher_outputs"))
    for change in META_OF_TEACHER
] + [
    Case("distill", broken, ("outputs", "teacher_outputs"))
    for broken in [
        cut("outputs/ids.bin", 0.5),
        cut("outputs/logprobs.bin", 0.9),
        without("outputs/ids.bin"),
        without("outputs/meta.json"),
        with_text("outputs/meta.json", b"{"),
        with_text("outputs/meta.json", b"\xff"),
        as_folder("outputs/logprobs.bin"),
    ]
]
CAUSES["teacher outputs of tokens or values that cannot be"] = [
    Case(
        "distill", with_array("outputs/ids.bin", "<u2", put(5, 999)), ("outputs", "teacher_outputs")
    ),
    Case("distill", with_array("outputs/logprobs.bin", "<f2", put(5, np.nan)), ("outputs",)),
    Case("distill", with_array("outputs/logprobs.bin", "<f2", put(5, np.inf)), ("outputs",)),
]
CAUSES["a teacher that does not fit"] = [
    Case(command, broken, (named,))
    for command, broken, named in [
        ("teacher_outputs", with_other_tokenizer(BASE), BASE),
        ("teacher_outputs", with_json(f"{BASE}/config.json", model_type="nonsense"), BASE),
        ("teacher_outputs", with_json(f"{BASE}/config.json", vocab_size="x"), BASE),
        ("teacher_outputs", with_json(f"{BASE}/config.json", hidden_size=10), BASE),
        ("distill", without(BASE), BASE),
        (
            "teacher_outputs",
            with_json(f"{BASE}/config.json", max_position_embeddings=4),
            "max_positions 4",
        ),
    ]
]
CAUSES["a student of another shape than its checkpoint"] = [
    Case(
        "distill",
        with_params(**{f"distill__student__{key}": value, "distill__init": BASE}),
        (f"distill.student.{key} is {value}", BASE),
    )
    for key, value in (("hidden_size", 16), ("num_layers", 2), ("max_positions", 99))
] + [
    Case(
        "pretrain",
        with_params(model__num_layers=2, pretrain__init=BASE),
        ("model.num_layers", BASE),
    )
]


def rewarded(part: str) -> Callable[[Path], None]:
    def weigh(directory: Path) -> None:
        for stage in ("grpo", "spo"):
            with_params(**{f"{stage}__rewards__{part}": 1.0})(directory)

    return weigh


def reward_case(command: str, part: str, broken: Callable[[Path], object], *named: str) -> Case:
    return Case(command, lambda directory: (rewarded(part)(directory), broken(directory)), named)


CUSTOM = {
    "": "no function score",
    "score = 3\n": "no function score",
    "def score(:\n": "cannot be imported",
    "import nonsense_module\n": "cannot be imported",
    "1 / 0\n": "cannot be imported",
    "raise SystemExit(0)\n": "cannot be imported",
    "def score(a, b): return 0\n": "score failed",
    "def score(a, b, c): return 1 / 0\n": "score failed",
    "def score(a, b, c): raise SystemExit(0)\n": "score failed",
    "def score(a, b, c): return None\n": "must be a number",
    "def score(a, b, c): return 'good'\n": "must be a number",
    "def score(a, b, c): return 2\n": "must be a number",
    "def score(a, b, c): return float('nan')\n": "must be a number",
    "def score(a, b, c): return [0]\n": "must be a number",
}
CAUSES["a custom reward that does not work"] = [
    reward_case(command, "custom", with_text("custom.py", code), "custom", named)
    for command, (code, named) in zip(["grpo", "spo"] * 7, CUSTOM.items(), strict=True)
] + [
    reward_case("grpo", "custom", without("custom.py"), "custom.py"),
    reward_case("grpo", "custom", with_text("custom.py", b"\xff\x00"), "custom.py"),
    reward_case("spo", "custom", as_folder("custom.py"), "custom.py"),
]
CAUSES["a reward model that is none"] = [
    reward_case(command, "reward_model", broken, "models/reward")
    for command, broken in zip(
        ["grpo", "spo"] * 8,
        [
            without("models/reward"),
            without("models/reward/config.json"),
            without("models/reward/model.safetensors"),
            without("models/reward/tokenizer.json"),
            cut("models/reward/model.safetensors", 0.5),
            with_text("models/reward/config.json", b"{"),
            with_json("models/reward/config.json", id2label={"0": "a", "1": "b"}),
            with_json(
                "models/reward/config.json", architectures=["LlamaForCausalLM"], id2label=...
            ),
            with_weights("models/reward", lambda weights: weights.pop("score.weight")),
            with_weights("models/reward", lambda weights: weights.pop("model.norm.weight")),
            with_weights(
                "models/reward", lambda weights: weights.update({"score.weight": torch.ones(2, 8)})
            ),
            with_json("models/reward/config.json", pad_token_id=5),
            with_json("models/reward/config.json", model_type="nonsense"),
            with_json("models/reward/config.json", hidden_size=16),
            with_text("models/reward/tokenizer.json", b"{}"),
            with_text("models/reward/chat_template.jinja", "{{ raise_exception('no') }}"),
            with_text("models/reward/chat_template.jinja", "{{ messages"),
        ],
        strict=False,
    )
] + [
    reward_case(
        "grpo",
        "reward_model",
        with_weights("models/reward", lambda weights: weights["score.weight"].fill_(np.nan)),
        "reward_model",
    )
]
ADAPTER = "models/lora/adapter_config.json"
CAUSES["an adapter that does not fit"] = [
    Case("merge", broken, ("models/lora",))
    for broken in [
        without("models/lora"),
        as_file("models/lora"),
        without(ADAPTER),
        without("models/lora/adapter_model.safetensors"),
        cut("models/lora/adapter_model.safetensors", 0.7),
        with_text("models/lora/adapter_model.safetensors", b"\x80\x04 a pickle"),
        with_text(ADAPTER, b"{"),
        with_text(ADAPTER, b"[]"),
        with_text(ADAPTER, b"\xff"),
        with_json(ADAPTER, r=3),
        with_json(ADAPTER, r="two"),
        with_json(ADAPTER, r=0),
        with_json(ADAPTER, target_modules=["x_proj"]),
        with_json(ADAPTER, target_modules=[]),
        with_json(ADAPTER, peft_type="IA3"),
        with_json(ADAPTER, peft_type=...),
        with_json(ADAPTER, lora_alpha="x"),
        with_json(ADAPTER, use_dora=True),
        with_weights("models/lora", lambda w: w.pop(sorted(w)[0]), "adapter_model"),
        with_weights("models/lora", lambda w: w[sorted(w)[0]].fill_(np.nan), "adapter_model"),
        with_weights("models/lora", lambda w: w.update(more=torch.ones(1)), "adapter_model"),
    ]
]
CAUSES["results that cannot be reported"] = [
    Case("report", broken, (named,))
    for named, broken in [
        ("evaluated/sft.json", without("evaluated/sft.json")),
        ("evaluated/sft.json", as_folder("evaluated/sft.json")),
        ("evaluated/sft.json", with_text("evaluated/sft.json", b"{")),
        ("evaluated/sft.json", with_text("evaluated/sft.json", b"[]")),
        ("evaluated/sft.json", with_text("evaluated/sft.json", b"{}")),
        ("evaluated/sft.json", with_text("evaluated/sft.json", b'{"sft": 5}')),
        ("evaluated/sft.json", with_text("evaluated/sft.json", b'{"a": {}, "b": {}}')),
        ("evaluated/sft.json", with_text("evaluated/sft.json", b'{"sft": {"in_form": "x"}}')),
        (
            "evaluated/sft.json",
            with_text("evaluated/sft.json", b'{"sft": {"complete_think": [1]}}'),
        ),
        ("evaluated/sft.json", with_text("evaluated/sft.json", b"[" * 50_000)),
        ("predictions/sft.jsonl", without("predictions/sft.jsonl")),
        ("predictions/sft.jsonl:1", with_text("predictions/sft.jsonl", b"")),
        ("predictions/sft.jsonl:2", with_line("predictions/sft.jsonl", 2, "{")),
        ("predictions/sft.jsonl:2", with_line("predictions/sft.jsonl", 2, "{}")),
        ("predictions/sft.jsonl", with_line("predictions/sft.jsonl", 2, b"\xff")),
        *(
            (
                "predictions/sft.jsonl:2",
                with_row(
                    "predictions/sft.jsonl",
                    2,
                    {"id": "x", "problem": "x", "level": 1, "task": None, "prompt": "a"}
                    | {"output": "b", "answer": "1", "correct": True, "choice_correct": None}
                    | wrong,
                ),
            )
            for wrong in (
                {"level": "one"},
                {"level": [1]},
                {"task": 1},
                {"output": None},
                {"output": 7},
                {"correct": "yes"},
                {"correct": None},
                {"choice_correct": "no"},
                {"id": []},
                {"problem": None},
            )
        ),
        ("trained/sft.json", without("trained/sft.json")),
        ("trained/sft.json", with_text("trained/sft.json", b"7")),
        ("trained/sft.json", with_text("trained/sft.json", b'{"sft": {"loss": null}}')),
        ("trained/sft.json", with_text("trained/sft.json", b'{"sft": {"loss": "low"}}')),
        ("trained/sft.csv", without("trained/sft.csv")),
        ("trained/sft.csv:2", with_text("trained/sft.csv", b"step,loss\n1,low\n")),
        ("trained/sft.csv:2", with_text("trained/sft.csv", b"step,loss\n1,nan\n")),
        ("trained/sft.csv:2", with_text("trained/sft.csv", b"step,loss\n1,2,3\n")),
        ("trained/sft.csv:2", with_text("trained/sft.csv", b"loss\n1\n")),
        ("record.json", as_folder("record.json")),
        ("record.json", with_text("record.json", b"{")),
        ("record.json", with_text("record.json", b"{}")),
        ("record.json: run 1", with_text("record.json", b'{"runs": [{}]}')),
    ]
]
CAUSES["a preset that cannot be applied"] = [
    Case("preset", with_text("presets/mine.yaml", text), ("preset",))
    for text in [
        b"",
        b"[]",
        b"7",
        b"sft: {",
        b"\xff",
        b"nonsense: {lr: 1}",
        b"sft: 5",
        b"sft: {lr: {a: 1}}",
        b"extends: none",
        b"extends: mine",
        b"extends: 7",
        b"a: 1\na: 2\n",
        b"[" * 20_000,
    ]
] + [
    Case("preset", without("presets/mine.yaml"), ("mine",)),
    Case("preset", without("presets"), ("mine",)),
    Case("preset", with_text("params.yaml", b"sft: {"), ("params.yaml",)),
    Case("preset", with_text("params.yaml", b"[]"), ("params.yaml",)),
    Case("preset", with_text("params.yaml", b"\xff"), ("params.yaml",)),
]

# What is wrong: where outputs are to go

OUTPUT_OPTIONS = ("--output", "--metrics", "--history", "--predictions", "--rejected", "--page")


def in_the_way(command: str, option: str) -> Case:
    """A file stands where the folder of an output should be."""
    return Case(command, with_text("wall", ""), ("wall",), (option, "wall/inside/it"))


CAUSES["a file where a folder should be"] = [
    in_the_way(command, option)
    for command, (_, arguments) in COMMANDS.items()
    for option in OUTPUT_OPTIONS
    if option in arguments.split() and not (command == "report" and option == "--predictions")
]

# What is wrong: numbers that overflow on the way


def scaled(factor: float) -> Callable[[Path], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for weight in weights.values():
            weight.mul_(factor)

    return with_weights(BASE, change)


CAUSES["losses that are not finite"] = [
    Case(command, scaled(1e19), (named,))
    for command, named in [
        *((stage, "after 0 steps") for stage in ("sft", "reason", "reward", "lora")),
        *((stage, "out of bounds") for stage in ("grpo", "spo", "evaluate")),
        ("reference", "finite"),
        ("teacher_outputs", "finite"),
    ]
]
NO_LIMIT = {"validation_share": 0.0, "lr": 1e38, "grad_clip": 1e38, "max_steps": 9}
CAUSES["a learning rate that throws the weights out of bounds"] = [
    Case(
        command,
        with_params(**{f"{command}__{key}": value for key, value in NO_LIMIT.items()}),
        ("at step", "learning rate", "rows", "The last good checkpoint is kept"),
    )
    for command in ("pretrain", "sft", "dpo", "reason", "reward", "lora", "distill")
]


# The tests

PYTHONS_WORDS = re.compile("has no attribute|object is not|indices must be")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("malformed") / "whole")


SEEN: dict[str, set[int]] = {}  # different inputs of each cause


def check(cause: str, case: Case, workspace: Path) -> None:
    directory = workspace.with_name("broken")
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(workspace, directory)
    copied = contents(directory)
    case.broken(directory)
    before = contents(directory)
    changed = {name for name, _ in copied.items() ^ before.items()}
    breakage = [
        (name, (directory / name).is_file() and (directory / name).read_bytes())
        for name in sorted(changed)
    ]
    outcome = run(case.command, directory, *case.options, **case.environment)
    stage = COMMANDS[case.command][0].stage
    lines = outcome.stderr.splitlines()

    assert outcome.crash is None, f"{case} ended in a traceback: {outcome.crash!r}"
    assert outcome.exit_code == 1, f"{case}: {outcome}"
    assert lines, f"{case} says nothing"
    assert all(line.startswith(f"{stage}: ") for line in lines), outcome.stderr
    assert max(map(len, lines)) < 2000, "a line, not a book"
    for name in case.named:
        assert name in lines[-1], f"{name} is not named: {lines[-1]}"
    assert "Traceback" not in outcome.stderr
    assert not PYTHONS_WORDS.search(lines[-1]), lines[-1]
    assert contents(directory) == before, "something was written"
    seen = (case.command, case.options, *case.environment.items(), *breakage)
    SEEN.setdefault(cause, set()).add(hash(seen))


@pytest.mark.parametrize("cause", CAUSES)
def test_malformed_input_is_one_line(cause: str, workspace: Path) -> None:
    cases = CAUSES[cause]
    if isinstance(cases, list):
        for case in cases:
            check(cause, case, workspace)
        return

    @settings(
        max_examples=NUM_DRAWN,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def drawn(case: Case) -> None:
        check(cause, case, workspace)

    drawn()


def test_so_many_inputs_of_so_many_causes() -> None:
    if set(SEEN) != set(CAUSES):
        pytest.skip("only when all causes have been tried")
    assert len(SEEN) >= 40
    assert sum(map(len, SEEN.values())) >= 300


# What is not malformed, or not to be trusted to a single process


def test_windows_line_ends_and_byte_order_marks_are_fine(workspace: Path) -> None:
    directory = workspace.with_name("windows")
    shutil.copytree(workspace, directory)
    for file in ("chats.jsonl", "params.yaml"):
        data = (directory / file).read_bytes().replace(b"\n", b"\r\n")
        (directory / file).write_bytes(b"\xef\xbb\xbf" + data)
    outcome = run("encode sft", directory)
    assert outcome.exit_code == 0, outcome
    for file in ("tokens.bin", "meta.json"):
        encoded = (workspace / "encoded/sft" / file).read_bytes()
        assert (directory / "out/data" / file).read_bytes() == encoded


@pytest.mark.parametrize("file", ["tensors.safetensors", "values.json"])
def test_a_damaged_resume_state_is_passed_over_and_named(workspace: Path, file: str) -> None:
    directory = workspace.with_name(f"resumed-{file}")
    shutil.copytree(workspace, directory)
    assert run("sft", directory, DVC_STAGE="sft").exit_code == 0
    expected = (directory / "out/model/model.safetensors").read_bytes()
    shutil.rmtree(directory / "out")
    for state in (directory / ".resume").glob("sft/*/checkpoint-*"):
        cut(str(state.relative_to(directory) / file), 0.6)(directory)
    outcome = run("sft", directory, DVC_STAGE="sft")
    assert outcome.exit_code == 0, outcome
    assert "is damaged" in outcome.stderr
    assert (directory / "out/model/model.safetensors").read_bytes() == expected


def test_a_process_of_its_own_says_the_same(workspace: Path) -> None:
    """Its exit code is 1 and its line the only one: nothing else of a process says anything."""
    directory = workspace.with_name("process")
    shutil.copytree(workspace, directory)
    with_params(encode__sft__max_length="long")(directory)
    words = COMMANDS["encode sft"][1].split()
    done = subprocess.run(
        [sys.executable, "-m", "stages.encode", *words],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"encode: params.yaml: encode.sft.max_length is 'long'; .*\n", done.stderr)
