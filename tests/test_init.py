"""Stages start from any checkpoint: one of theirs, or a Hugging Face directory from elsewhere."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from minimind.chat.template import CHAT_TEMPLATE
from minimind.model.checkpoint import load_model, save_checkpoint
from tests.broken import SHAPE, build, run, write_params


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("init") / "project")


@pytest.fixture(scope="module")
def foreign(workspace: Path) -> Path:
    """What stock transformers writes of a model and of a tokenizer, outside of the project."""
    directory = workspace.parent / "elsewhere" / "a llama"
    tokenizer = AutoTokenizer.from_pretrained(workspace / "models/tokenizer")
    own = load_model(workspace / "models/base").config
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 9,  # as of those who round it up
        hidden_size=own.hidden_size,
        intermediate_size=own.intermediate_size,
        num_hidden_layers=own.num_layers,
        num_attention_heads=own.num_heads,
        num_key_value_heads=own.num_kv_heads,
        max_position_embeddings=own.max_positions,
        rope_theta=own.rope_theta,
        rms_norm_eps=own.norm_eps,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def set_params(workspace: Path, **sections: dict[str, float | str]) -> None:
    params = yaml.safe_load((workspace / "params.yaml").read_text(encoding="utf-8"))
    for section, values in sections.items():
        params[section] |= values
    write_params(workspace, params)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "reason", "reward", "distill", "grpo"])
def test_a_foreign_checkpoint_is_a_start(workspace: Path, foreign: Path, stage: str) -> None:
    """Its tokenizer encodes the data. At a learning rate of next to nothing it stays as it is."""
    name = {"pretrain": "pretrain", "dpo": "dpo", "reward": "dpo", "reason": "reason"}.get(
        stage, "sft"
    )
    set_params(
        workspace,
        encode={"tokenizer": str(foreign)},
        distill={"teacher": str(foreign), "data": "data"},
    )
    set_params(workspace, **{stage: {"lr": 1e-12, "init": str(foreign)}})
    outcome = run(f"encode {name}", workspace)
    assert outcome.exit_code == 0, outcome
    data = {"pretrain": "--text", "dpo": "--preferences", "reward": "--preferences"}
    options = [] if stage == "grpo" else [data.get(stage, "--conversations"), "out/data"]
    if stage == "dpo":
        referred = run("reference", workspace, *options)
        assert referred.exit_code == 0, referred
        options += ["--reference", "out/ref.npy"]
    if stage == "distill":
        taught = run("teacher_outputs", workspace, "--encoded", "out")
        assert taught.exit_code == 0, taught
        options = ["--encoded", "out", "--teacher-outputs", "out/outputs"]
    outcome = run(stage, workspace, *options)
    assert outcome.exit_code == 0, outcome
    before = load_file(foreign / "model.safetensors")
    after = load_file(workspace / "out/model/model.safetensors")
    for weight in before.keys() & after.keys():
        torch.testing.assert_close(after[weight], before[weight], atol=1e-6, rtol=0)
    assert "model.embed_tokens.weight" in before.keys() & after.keys()


def test_a_start_may_have_its_weights_in_parts(foreign: Path, tmp_path: Path) -> None:
    """Of its files, a checkpoint gets the tokenizer's and no other."""
    parts = tmp_path / "parts"
    stock = LlamaForCausalLM.from_pretrained(foreign)
    stock.save_pretrained(parts, max_shard_size="4KB")
    assert len(list(parts.glob("model-*.safetensors"))) > 1
    AutoTokenizer.from_pretrained(foreign).save_pretrained(parts)
    (parts / "chat_template.jinja").write_text("another")
    (parts / "modeling.py").write_text("1 / 0")
    whole, loaded = load_model(foreign).state_dict(), load_model(parts).state_dict()
    assert all(torch.equal(whole[name], loaded[name]) for name in whole)
    save_checkpoint(tmp_path / "saved", load_model(parts), parts)
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
        "chat_template.jinja",
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert (tmp_path / "saved/chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_a_directory_with_a_tokenizer_alone_gives_a_new_model(workspace: Path) -> None:
    weights = []
    for seed in (1, 1, 2):
        set_params(workspace, pretrain={"lr": 1e-12, "seed": seed, "init": "models/tokenizer"})
        assert run("pretrain", workspace).exit_code == 0
        weights.append((workspace / "out/model/model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert load_model(workspace / "out/model").config.hidden_size == SHAPE["hidden_size"]
