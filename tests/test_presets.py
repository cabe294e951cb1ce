"""Presets: valid, of the documents' size, and applied without losing a comment."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from minimind.chat.tokenizer_training import TokenizerConfig
from minimind.cli.main import app
from minimind.errors import UserError
from minimind.model.transformer import ModelConfig, ModelShape, Transformer
from minimind.params import load_section
from stages._sections import SECTIONS
from stages.sft import SftConfig
from tests.graph import ROOT

PARAMETERS = {
    "small": 25_829_888,
    "base": 104_030_976,
    "moe": 145_029_760,
    "minimind3": 63_912_192,
    "minimind3-moe": 198_416_640,
}


def applied(tmp_path: Path, name: str) -> tuple[Path, str]:
    params = tmp_path / "params.yaml"
    shutil.copyfile(ROOT / "params.yaml", params)
    presets = ["--presets", str(ROOT / "presets"), "--params", str(params)]
    result = CliRunner().invoke(app, ["preset", name, *presets])
    assert result.exit_code == 0, result.output
    return params, result.output


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_is_valid_and_has_the_documents_size(tmp_path: Path, name: str) -> None:
    params, _ = applied(tmp_path, name)
    for section, config in SECTIONS.items():
        load_section(params, section, config)
    shape = load_section(params, "model", ModelShape)
    vocab_size = load_section(params, "tokenizer", TokenizerConfig).vocab_size
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab_size=vocab_size, **shape.model_dump()))
    assert model.num_parameters == PARAMETERS[name]


def test_after_any_preset_small_is_as_if_alone(tmp_path: Path) -> None:
    """Its own six steps, say, tiny must not leave there. What tiny leaves alone, it may keep."""
    (tmp_path / "alone").mkdir()
    alone, _ = applied(tmp_path / "alone", "small")
    for before in PARAMETERS.keys() | {"tiny"}:
        params, _ = applied(tmp_path, before)
        where = ["--presets", str(ROOT / "presets"), "--params", str(params)]
        assert CliRunner().invoke(app, ["preset", "small", *where]).exit_code == 0
        for section, config in SECTIONS.items():
            shapes = [load_section(path, section, config) for path in (alone, params)]
            assert shapes[0] == shapes[1], (before, section)


def test_comments_and_other_values_stay(tmp_path: Path) -> None:
    params, said = applied(tmp_path, "base")
    before, after = (p.read_text(encoding="utf-8") for p in (ROOT / "params.yaml", params))
    comments = [line.split("#", 1)[1] for line in before.splitlines() if "#" in line]
    for comment in comments:
        assert comment in after
    changed = dict(line.strip().split(": ", 1) for line in said.splitlines() if " -> " in line)
    old, new = _flat(yaml.safe_load(before)), _flat(yaml.safe_load(after))
    assert {key for key in new if old.get(key) != new[key]} == set(changed)
    assert new["model.num_layers"] == 16
    assert changed.get("model.num_layers", "") in ("", f"{old['model.num_layers']} -> 16")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def test_a_preset_applied_twice_changes_nothing_more(tmp_path: Path) -> None:
    params, _ = applied(tmp_path, "small")
    once = params.read_bytes()
    presets = ["--presets", str(ROOT / "presets"), "--params", str(params)]
    assert CliRunner().invoke(app, ["preset", "small", *presets]).exit_code == 0
    assert params.read_bytes() == once


def test_a_preset_may_give_a_section_a_seed_of_its_own(tmp_path: Path) -> None:
    params, _ = applied(tmp_path, "small")
    (tmp_path / "mine.yaml").write_text("seed: 2\nsft: {seed: 5}\nevaluate: {dtype: float32}\n")
    where = ["--presets", str(tmp_path), "--params", str(params)]
    said = CliRunner().invoke(app, ["preset", "mine", *where]).output
    assert "sft.seed: None -> 5" in said
    assert "seed: 1 -> 2" in said
    values = yaml.safe_load(params.read_text(encoding="utf-8"))
    assert (values["seed"], values["sft"]["seed"], values["evaluate"]["dtype"]) == (2, 5, "float32")


def test_a_preset_may_set_what_params_yaml_does_not_list(tmp_path: Path) -> None:
    params, _ = applied(tmp_path, "small")
    (tmp_path / "mine.yaml").write_text("sft: {grad_clip: 0.5}\n")
    where = ["--presets", str(tmp_path), "--params", str(params)]
    assert CliRunner().invoke(app, ["preset", "mine", *where]).exit_code == 0
    assert load_section(params, "sft", SftConfig).grad_clip == 0.5
    (tmp_path / "mine.yaml").write_text("sft: {learning_rate: 1.0}\n")
    assert CliRunner().invoke(app, ["preset", "mine", *where]).exit_code == 0
    with pytest.raises(UserError, match=r"sft\.learning_rate is not a known key"):
        load_section(params, "sft", SftConfig)


def test_a_preset_says_what_runs_meanwhile(tmp_path: Path) -> None:
    stages = {"sft": {"cmd": "true", "outs": ["models/sft"]}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    writer = {str(tmp_path.resolve() / "models/sft"): {"pid": os.getpid(), "cmd": "dvc"}}
    (tmp_path / ".dvc/tmp/rwlock").write_text(json.dumps({"write": writer, "read": {}}))
    _, said = applied(tmp_path, "small")
    assert "DVC runs sft now:" in said
    (tmp_path / ".dvc/tmp/rwlock").write_text("{}")
    _, said = applied(tmp_path, "small")
    assert "DVC runs" not in said


def test_an_unknown_preset_or_section_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    params, _ = applied(tmp_path, "small")
    once = params.read_bytes()
    (tmp_path / "mine.yaml").write_text("sft: {lr: 1.0e-4}\nstf: {lr: 1.0}\n")
    where = ["--presets", str(tmp_path), "--params", str(params)]
    unknown = CliRunner().invoke(app, ["preset", "huge", *where])
    misspelt = CliRunner().invoke(app, ["preset", "mine", *where])
    nowhere = CliRunner().invoke(app, ["preset", "mine", *where[:3], str(tmp_path / "no.yaml")])
    assert unknown.exit_code == misspelt.exit_code == nowhere.exit_code == 1
    assert "no.yaml is missing; run from" in nowhere.stderr
    assert "there are: mine, params" in unknown.stderr
    assert "stf" in misspelt.stderr
    assert params.read_bytes() == once
