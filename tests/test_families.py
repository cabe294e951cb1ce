"""Models of transformers' own making go in and out: equal logits, and a start for stages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from minimind.errors import UserError
from minimind.model.checkpoint import load_config, load_model, save_checkpoint, start_model
from minimind.model.reward import RewardModel, dense_part
from minimind.model.reward_checkpoint import save_reward_model
from minimind.model.transformer import ModelShape, PackedTokens, Transformer
from tests.broken import build, run, write_params
from tests.tiny import TOKENIZER_SIZE, tiny_config, tiny_model, tiny_tokenizer

SIZES = {
    "vocab_size": TOKENIZER_SIZE + 5,  # as of those who round it up
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 24}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False, "rope_theta": 1e4}),
    "wide llama": ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral within its window": ("mistral", {"sliding_window": 256, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True, "head_dim": 16}),
    "qwen3_moe of two": (
        "qwen3_moe",
        EXPERTS | {"norm_topk_prob": True, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    ),
    "yarn": ("qwen3", {"rope_scaling": YARN | {"rope_theta": 1e6}}),
    "minimind's yarn": (
        "llama",
        {"rope_scaling": YARN | {"rope_theta": 1e4, "attention_factor": 1.0, "beta_fast": 4.0}},
    ),
}


def stock_model(family: str) -> PreTrainedModel:
    """Of random weights, biases and norms too, which transformers makes zeros and ones."""
    torch.manual_seed(1)
    model_type, changes = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel | Transformer, length: int = 90) -> torch.Tensor:
    ids = torch.randint(TOKENIZER_SIZE, (length,), generator=torch.Generator().manual_seed(2))
    if isinstance(model, PreTrainedModel):
        return model(ids[None]).logits[0]
    boundaries = torch.tensor([0, length], dtype=torch.int32)
    tokens = PackedTokens(ids, torch.arange(length), boundaries, length)
    return model(tokens, torch.arange(length)).logits


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return tiny_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_transformers_goes_in_and_out(
    tmp_path: Path, tokenizer: Path, family: str
) -> None:
    stock = stock_model(family)
    stock.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 1
    model = load_model(tmp_path / "in")
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-5, atol=1e-5)
    save_checkpoint(tmp_path / "out", model, tokenizer)
    back, problems = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=False, output_loading_info=True
    )
    assert not any(problems.values())
    assert back.config.model_type == stock.config.model_type.replace("mistral", "llama")
    torch.testing.assert_close(logits(back.eval()), logits(stock), rtol=1e-5, atol=1e-5)
    assert load_model(tmp_path / "out").config == model.config


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("num_experts", [0, 4])
@pytest.mark.parametrize("factor", [1.0, 16.0])
def test_a_model_of_ours_is_the_same_in_transformers(
    tmp_path: Path, tokenizer: Path, qk_norm: bool, num_experts: int, factor: float
) -> None:
    shape = {"qk_norm": qk_norm, "num_experts": num_experts, "num_shared_experts": int(not qk_norm)}
    yarn = {"factor": factor, "original_max_positions": 16}
    shape |= {"num_experts_per_token": 1, "vocab_size": SIZES["vocab_size"]}
    model = tiny_model(3, yarn=yarn, **shape)
    with torch.no_grad():
        for parameter in model.parameters():  # so that routers decide, and norms do something
            parameter.copy_(5 * parameter if parameter.dim() > 1 else torch.rand_like(parameter))
    save_checkpoint(tmp_path / "model", model, tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    kinds = {False: ("llama", "ernie4_5_moe"), True: ("qwen3", "qwen3_moe")}
    assert stock.config.model_type == kinds[qk_norm][num_experts > 0]
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)
    plain = tiny_model(3, **shape)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(plain), logits(model)) == (factor == 1)


ROTARY = YARN | {"rope_theta": 1e6}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 64}, "sliding_window is 64, but max_position_embeddings 256"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9}, "sliding_window is 9"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True; only False"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False; only True"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]; only \[\]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}}, "is 'llama3'; only"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
    (
        "yarn",
        {"rope_parameters": ROTARY | {"truncate": False}},
        "truncate is False",
    ),
    (
        "yarn",
        {"rope_parameters": ROTARY | {"factor": 0}},
        "factor is 0; it should",
    ),
    ("yarn", {"rope_parameters": ROTARY | {"mscale": 1.0}}, "mscale is 1.0; only"),
]


@pytest.mark.parametrize(("family", "change", "message"), REFUSED)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, family: str, change: dict[str, Any], message: str
) -> None:
    stock_model(family).config.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    load_config(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_config(tmp_path)


def test_a_mistral_that_says_nothing_of_its_window_has_one(tmp_path: Path) -> None:
    stock_model("mistral").config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sliding_window"]
    config["max_position_embeddings"] = 32768
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="sliding_window is 4096"):
        load_config(tmp_path)


MINIMIND2 = {
    "model_type": "minimind",
    "auto_map": {"AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM"},
    "use_moe": False,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "aux_loss_alpha": 0.1,
    "scoring_func": "softmax",
    "norm_topk_prob": True,
}


def _as_minimind_writes(directory: Path, model: Transformer, tokenizer: Path, **own: Any) -> None:
    """A checkpoint of ours with MiniMind's own config.json, and its names and rows of weights."""
    save_checkpoint(directory, model, tokenizer)
    config = json.loads((directory / "config.json").read_text())
    kept = [key for key in config if not key.startswith(("moe_", "num_experts", "tie_"))]
    (directory / "config.json").write_text(json.dumps({key: config[key] for key in kept} | own))
    size = model.config.head_size
    weights = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if own.get("use_moe") and "n_routed_experts" in own:
            if name.endswith(("q_proj.weight", "k_proj.weight")):  # pairs become halves
                rows = [2 * i + half for half in range(2) for i in range(size // 2)]
                weight = weight.unflatten(0, (-1, size))[:, rows].flatten(0, 1)
            name = name.replace("shared_experts.", "shared_experts.0.")
        if "bias" not in name:
            weights[name] = weight.half().contiguous()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("use_moe", [False, True])
def test_released_weights_of_minimind_are_read(
    tmp_path: Path, tokenizer: Path, version: int, use_moe: bool
) -> None:
    shape: dict[str, Any] = {"num_experts": 4 * use_moe, "vocab_size": TOKENIZER_SIZE}
    own: dict[str, Any] = MINIMIND2 | {"use_moe": use_moe}
    if version == 3:
        shape |= {"qk_norm": True, "num_shared_experts": 0, "num_experts_per_token": 1}
        own = {"model_type": "minimind", "use_moe": use_moe, "inference_rope_scaling": False}
        own |= {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 128}
        own |= {"norm_topk_prob": True, "router_aux_loss_coef": 0.1, "rope_scaling": None}
    model = tiny_model(1, **shape)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    _as_minimind_writes(tmp_path / "released", model, tokenizer, **own)
    read = load_model(tmp_path / "released")
    assert read.config == model.config
    torch.testing.assert_close(logits(read), logits(model))


def test_a_start_of_another_shape_says_what_to_set(tmp_path: Path) -> None:
    stock_model("qwen3").save_pretrained(tmp_path)
    shape = ModelShape(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=256)
    with pytest.raises(UserError) as error:
        start_model(tmp_path, shape, 1, "params.yaml: model")
    said = str(error.value)
    told = [option.strip("'") for option in said.split("make them agree: ")[1].split("-S ")[1:]]
    values = shape.model_dump()
    for option in told:
        key, value = option.strip().strip("'").removeprefix("++model.").split("=", 1)
        values[key] = yaml.safe_load(value)
    agreed = ModelShape(**values)
    assert start_model(tmp_path, agreed, 1, "params.yaml: model").config.qk_norm


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_a_reward_model_is_one_of_its_family(tmp_path: Path, tokenizer: Path, family: str) -> None:
    stock_model(family).save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")
    model = RewardModel(dense_part(base, 1) if base.config.num_experts else base)
    torch.nn.init.normal_(model.score.weight)
    save_reward_model(tmp_path / "reward", model, tokenizer)
    stock, problems = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "reward", output_loading_info=True
    )
    assert not any(problems.values())
    ids = torch.arange(3, 20)
    tokens = PackedTokens(ids, torch.arange(17), torch.tensor([0, 17], dtype=torch.int32), 17)
    torch.testing.assert_close(stock(ids[None]).logits[0], model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True, "qkv_bias": True}, "qkv_bias must be false"),
        ({"qk_norm": True, "num_experts": 2}, "num_shared_experts 0"),
        ({"qkv_bias": True, "num_experts": 2}, "num_experts must be 0"),
        ({"head_size": 7}, "it must be even"),
    ],
)
def test_what_no_stock_model_computes_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("families") / "project")


@pytest.fixture(scope="module")
def foreign(workspace: Path) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        directory = workspace.parent / "elsewhere" / family
        if not directory.exists():
            stock_model(family).save_pretrained(directory)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (directory / file).write_bytes((workspace / "models/tokenizer" / file).read_bytes())
        return directory

    return make


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_sft_starts_from_a_foreign_model_and_stays_in_its_family(
    workspace: Path, foreign: Callable[[str], Path], family: str
) -> None:
    start = foreign(family)
    _set(workspace, sft={"init": str(start), "lr": 1e-3})
    outcome = run("sft", workspace)
    assert outcome.exit_code == 0, outcome
    stock = AutoModelForCausalLM.from_pretrained(workspace / "out/model").eval()
    assert stock.config.model_type == family.replace("mistral", "llama")
    assert not torch.equal(logits(stock), logits(stock_model(family)))
    trained = load_model(workspace / "out/model")
    torch.testing.assert_close(logits(stock), logits(trained), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_a_foreign_model_teaches(
    workspace: Path, foreign: Callable[[str], Path], family: str
) -> None:
    _set(workspace, distill={"teacher": str(foreign(family))})
    taught = run("teacher_outputs", workspace)
    assert taught.exit_code == 0, taught
    outcome = run("distill", workspace, "--teacher-outputs", "out/outputs")
    assert outcome.exit_code == 0, outcome
    assert (workspace / "out/model/model.safetensors").is_file()


def _set(workspace: Path, **sections: dict[str, float | str]) -> None:
    params = yaml.safe_load((workspace / "params.yaml").read_text(encoding="utf-8"))
    for section, values in sections.items():
        params[section] |= values
    write_params(workspace, params)
