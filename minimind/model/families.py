"""Families of models: what config.json says of a shape, in transformers' words, and back."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from minimind.errors import UserError, complaint
from minimind.model.transformer import ModelConfig, Yarn

# What our configuration's fields are called in config.json.
SHAPE = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
YARN = {
    "factor": "factor",
    "original_max_positions": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}


# What transformers takes where config.json says nothing, unless a family has its own.
DEFAULTS = {
    "head_dim": None,
    "num_key_value_heads": None,
    "rope_theta": 1e4,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


class Family(NamedTuple):
    """A model of transformers that ours can be: see `ModelShape.model_type`."""

    name: str  # of its classes
    fields: dict[str, str]  # as SHAPE, of what is a family's own
    written: dict[str, Any]  # what its config.json says of every model of ours
    defaults: dict[str, Any]  # as DEFAULTS


_DENSE = {"intermediate_size": "intermediate_size"}
_EXPERTS = {
    "intermediate_size": "moe_intermediate_size",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
_PLAIN = {"attention_bias": False, "attention_dropout": 0.0}
_NO_WINDOW = {"sliding_window": None, "use_sliding_window": False}
FAMILIES = {
    "llama": Family("Llama", _DENSE, _PLAIN | {"mlp_bias": False}, {}),
    # A Llama but for its window: written as one.
    "mistral": Family("Mistral", _DENSE, {}, {"sliding_window": 4096, "use_sliding_window": True}),
    "qwen2": Family("Qwen2", _DENSE, {"attention_dropout": 0.0} | _NO_WINDOW, {}),
    "qwen3": Family("Qwen3", _DENSE, _PLAIN | _NO_WINDOW, {"head_dim": 128}),
    "qwen3_moe": Family(
        "Qwen3Moe",
        _EXPERTS | {"num_experts": "num_experts", "num_experts_per_token": "num_experts_per_tok"},
        _PLAIN
        | _NO_WINDOW
        | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
        {"norm_topk_prob": False},
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_Moe",
        _EXPERTS
        | {
            "num_experts": "moe_num_experts",
            "num_experts_per_token": "moe_k",
            "num_shared_experts": "moe_num_shared_experts",
        },
        {
            "moe_layer_interval": 1,
            "moe_layer_start_index": 0,
            "moe_norm_min": 1e-12,
            "use_bias": False,
        },
        {"rope_theta": 5e5, "tie_word_embeddings": True},
    ),
}
# What MiniMind 2 calls the keys of an Ernie: it has the same experts.
_MINIMIND2 = {
    "moe_num_experts": "n_routed_experts",
    "moe_k": "num_experts_per_tok",
    "moe_num_shared_experts": "n_shared_experts",
    "moe_intermediate_size": "intermediate_size",
    "router_aux_loss_coef": "aux_loss_alpha",
}


def read_config(path: Path) -> ModelConfig:
    """The shape of a model of a family that is known.

    Raises:
        UserError: the file is not valid, of another family, or says something that our model does
            not do.
    """
    fields: dict[str, str] = {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise UserError(f"{path} is {config!r:.40}; it must be an object with keys.")
        for key in ("rope_parameters", "rope_scaling"):  # of transformers 5 and 4
            if not isinstance(found := config.get(key) or {}, dict):
                raise UserError(f"{path}: {key} is {found!r:.40}; it must be an object with keys.")
        if config["model_type"] == "minimind":
            config = _minimind_as_stock(config)
        if config["model_type"] not in FAMILIES:
            raise UserError(
                f"{path}: model_type is {config['model_type']!r}; "
                f"allowed is {', '.join(map(repr, FAMILIES))} or 'minimind'."
            )
        family = FAMILIES[config["model_type"]]
        if "num_local_experts" in config:  # transformers 5 writes it so
            config.setdefault("num_experts", config["num_local_experts"])
        config = DEFAULTS | family.defaults | config
        fields = SHAPE | family.fields
        shape = {"num_shared_experts": 0} | {field: config[key] for field, key in fields.items()}
        if shape.get("num_experts") == 0:
            raise UserError(f"{path}: {fields['num_experts']} is 0; there must be one or more.")
        shape["head_size"] = shape["head_size"] or 0
        shape["num_kv_heads"] = shape["num_kv_heads"] or shape["num_heads"]
        shape["qk_norm"] = config["model_type"].startswith("qwen3")
        shape["qkv_bias"] = config["model_type"] == "qwen2"
        shape |= _positions(config)
        loaded = ModelConfig.model_validate(shape, strict=True)
        _require_our_arithmetic(config, loaded, path)
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing.") from None
    except ValidationError as error:
        detail = error.errors()[0]
        keys = [(fields | YARN).get(str(field), field) for field in detail["loc"]]
        where = f"{keys[-1]} is {detail['input']!r}; " if keys else ""
        raise UserError(f"{path}: {where}{complaint(detail)}.") from None
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not valid: {error}.") from None
    return loaded


def _minimind_as_stock(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of MiniMind's own class as that of the stock model that computes the same."""
    config = {"tie_word_embeddings": True} | config | {"auto_map": None}
    mixture = bool(config.get("use_moe"))
    if "n_routed_experts" not in config:  # MiniMind 3
        return config | {"model_type": "qwen3_moe" if mixture else "qwen3"}
    config["model_type"] = "ernie4_5_moe" if mixture else "llama"
    # Null is 8/3 of the hidden size.
    config["intermediate_size"] = config.get("intermediate_size") or 0
    if mixture:
        config |= {key: config[theirs] for key, theirs in _MINIMIND2.items()}
    return config


def _positions(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and yarn, from either place that versions of transformers write them to."""
    scaling = _rotary(config)
    theta = scaling.get("rope_theta", config["rope_theta"])
    if _rope_type(scaling) != "yarn":
        return {"rope_theta": theta}
    yarn = {field: scaling[key] for field, key in YARN.items() if scaling.get(key) is not None}
    yarn.setdefault("original_max_positions", config["max_position_embeddings"])
    # As the paper recommends, eq. 22, and transformers does where nothing is said.
    yarn.setdefault("attention_factor", 0.1 * math.log(max(1, scaling["factor"])) + 1)
    return {"rope_theta": theta, "yarn": Yarn.model_validate(yarn, strict=True)}


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rope_type(scaling: dict[str, Any]) -> str:
    return scaling.get("rope_type", scaling.get("type", "default"))


def _require_our_arithmetic(config: dict[str, Any], loaded: ModelConfig, path: Path) -> None:
    """Raises UserError where a model of our shape would compute something else with its weights."""
    scaling, shared = _rotary(config), loaded.num_shared_experts
    rope_type = _rope_type(scaling)
    turned = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    found = {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "rope_type": (rope_type, rope_type if rope_type in ("default", "yarn") else "default"),
        "partial_rotary_factor": (turned, 1),
        "truncate": (scaling.get("truncate", True), True),
        "norm_topk_prob": (config.get("norm_topk_prob", True), True),
        "decoder_sparse_step": (config.get("decoder_sparse_step", 1), 1),
        "mlp_only_layers": (config.get("mlp_only_layers") or [], []),
        # MiniMind 2, whose list of shared experts is one wider expert here.
        "scoring_func": (config.get("scoring_func", "softmax"), "softmax"),
        "n_shared_experts": (config.get("n_shared_experts", 1) if shared else 1, 1),
    }
    for key in ("mscale", "mscale_all_dim"):
        found[key] = (scaling.get(key), None)
    for key in ("auto_map", "quantization_config"):
        found[key] = (config.get(key), None)
    for key in ("attention_bias", "mlp_bias", "use_bias"):
        found[key] = (config.get(key) or False, False)
    for key, (value, supported) in found.items():
        if value != supported:
            raise UserError(f"{path}: {key} is {value!r}; only {supported!r} is supported.")
    window = config["sliding_window"] if config.get("use_sliding_window") else None
    if window is not None and window < loaded.max_positions:
        raise UserError(
            f"{path}: sliding_window is {window}, but max_position_embeddings "
            f"{loaded.max_positions}; windows are not supported: where {window} positions will "
            "do, make max_position_embeddings that."
        )


def config_json(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model's shape, for stock transformers."""
    family = FAMILIES[config.model_type]
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.yarn.factor > 1:
        rope |= {"rope_type": "yarn"}
        rope |= {key: getattr(config.yarn, field) for field, key in YARN.items()}
    written: dict[str, Any] = {
        "architectures": [f"{family.name}ForCausalLM"],
        "dtype": "float32",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "model_type": config.model_type,
        # transformers 4 reads the first, 5 the second; with neither, theta is another one.
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **family.written,
        **{key: getattr(config, field) for field, key in (SHAPE | family.fields).items()},
    }
    if config.yarn.factor > 1:
        written["rope_scaling"] = rope
    if config.model_type == "ernie4_5_moe":
        written["moe_layer_end_index"] = config.num_layers - 1  # every layer has experts
    return written
