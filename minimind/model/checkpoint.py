"""Checkpoints: Hugging Face directories that stock transformers loads, weights as safetensors.

config.json  generation_config.json  model.safetensors  and the tokenizer's files
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimind.chat.tokenizer import ChatTokenizer, copy_tokenizer
from minimind.errors import UserError, complaint
from minimind.files import replacing
from minimind.model.transformer import ModelConfig, ModelShape, Transformer

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # where weights are in several files
# model_type in config.json, without and with experts.
DENSE, MIXTURE = "llama", "ernie4_5_moe"
EMBEDDING = "model.embed_tokens.weight"
# A part of the Hugging Face mixture that ours does not have: it can choose experts by probability
# plus a bias; we balance them by a loss instead.
SELECTION_BIAS = "moe_statics.e_score_correction_bias"
# What our configuration's fields are called in config.json.
SHAPE = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
EXPERTS = {
    "num_experts": "moe_num_experts",
    "num_experts_per_token": "moe_k",
    "num_shared_experts": "moe_num_shared_experts",
    "router_aux_loss_coef": "router_aux_loss_coef",
}


# What else there may be instead of a checkpoint, and what to do with it.
FOREIGN = {
    "adapter_config.json": "is an adapter's; merge it into its base with peft",
    "*.gguf": "is llama.cpp's; take the checkpoint that it was made from",
    "*.bin": "is pickled, which may run anything; save the model as safetensors",
    "*.pt*": "is pickled, which may run anything; save the model as safetensors",
    "*.h5": "is TensorFlow's; save the model as safetensors",
    "*.msgpack": "is Flax's; save the model as safetensors",
    "*.safetensors*": "is of a checkpoint that is not whole; take it from its source again",
}


def save_checkpoint(
    directory: Path | str, model: Transformer, tokenizer_directory: Path | str
) -> None:
    """Write `model` and a copy of a tokenizer's files as a Hugging Face directory.

    The directory appears whole or not at all.
    """
    directory, tokenizer_directory = Path(directory), Path(tokenizer_directory)
    tokenizer = ChatTokenizer.load(tokenizer_directory)
    control_ids = {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }
    weights = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
    }
    if num_experts := model.config.num_experts:
        for layer in range(model.config.num_layers):
            weights[f"model.layers.{layer}.mlp.{SELECTION_BIAS}"] = torch.zeros(1, num_experts)
    with replacing(directory) as partial:
        partial.mkdir()
        copy_tokenizer(tokenizer_directory, partial)
        write_json(partial / "config.json", config_json(model.config) | control_ids)
        write_json(partial / "generation_config.json", control_ids)
        # More metadata than this would change the file's bytes from run to run.
        save_weights(partial / WEIGHTS, weights)


def write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def save_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Write safetensors that whoever may read other files may read: the library lets nobody."""
    save_file(dict(weights), file, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def load_model(directory: Path | str) -> Transformer:
    """Load a checkpoint onto the CPU in float32.

    Raises:
        UserError: a file is missing, damaged or of another architecture, weights are not as
            config.json says or not finite, or the tokenizer has more tokens than the model.
    """
    directory = Path(directory)
    config, weights = load_config(directory), _read_weights(directory)
    path = directory / WEIGHTS  # or its parts
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    head = weights.pop("lm_head.weight", None)  # some writers store the tied head a second time
    if head is not None and not torch.equal(head, weights.get(EMBEDDING, head.new_empty(0))):
        raise UserError(
            f"{path}: lm_head.weight is not {EMBEDDING}; "
            "a head with weights of its own is not supported."
        )
    for name in [name for name in weights if name.endswith(SELECTION_BIAS)]:
        if weights.pop(name).any():
            raise UserError(
                f"{path}: {name} is not zero; experts chosen with a bias are not supported."
            )
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        name = sorted(expected.items() ^ found.items())[0][0]
        raise UserError(
            f"{path}: {name} is {found.get(name, 'missing')}, but config.json "
            f"calls for {expected.get(name, 'no such weight')}; these are not of one checkpoint."
        )
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise UserError(
                f"{path}: {name} holds NaN, values that are infinite in float32, or whole ones; "
                "take a checkpoint from before they came in."
            )
    if (directory / "tokenizer.json").is_file():
        num_tokens = ChatTokenizer.load(directory).vocab_size
        if num_tokens > config.vocab_size:
            raise UserError(
                f"{directory}: its tokenizer has {num_tokens} tokens, its model only "
                f"{config.vocab_size}; they do not belong together."
            )
    model = Transformer(config)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """All weights, of one file or of the several that an index names.

    Raises:
        UserError: a file is missing or damaged, or the index names what is not so.
    """
    index = directory / INDEX
    if (directory / WEIGHTS).exists() or not index.is_file():
        return _read_file(directory / WEIGHTS)
    try:
        weight_map = _Index.model_validate_json(index.read_bytes()).weight_map
    except ValidationError as error:
        detail = error.errors()[0]
        where = "".join(f"{part}: " for part in detail["loc"])
        raise UserError(
            f"{index}: {where}{complaint(detail)}; take the checkpoint from its source again."
        ) from None
    weights: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        part = _read_file(directory / file)
        if wrong := sorted(part.keys() ^ {name for name in weight_map if weight_map[name] == file}):
            raise UserError(
                f"{index}: {wrong[0]} is said to be in {weight_map.get(wrong[0], 'no file')}, but "
                f"{file} {'has' if wrong[0] in part else 'does not have'} it; "
                "these files are not of one checkpoint."
            )
        weights |= part
    return weights


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        advice = _advice(path.parent) or "run its stage again"
        raise UserError(f"{path} is missing; {advice}.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}; run its stage again.") from None


class _Index(BaseModel):
    """model.safetensors.index.json: the file beside it that has a weight."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")]] = Field(
        min_length=1
    )


def _advice(directory: Path) -> str:
    """What to do with a directory that is not a whole checkpoint; nothing where there is none."""
    for pattern, advice in FOREIGN.items():
        if found := sorted(directory.glob(pattern)):
            return f"{found[0].name} {advice}"
    return ""


def start_model(init: Path, shape: ModelShape, seed: int, asked_by: str) -> Transformer:
    """The checkpoint in `init`; a new model where there is nothing but a tokenizer.

    asked_by: the section that `shape` is of.

    Raises:
        UserError: the checkpoint has another shape, or cannot be read; or there is what is left of
            one, or of another kind.
    """
    if (init / "config.json").exists():
        model = load_model(init)
        wanted = ModelConfig(vocab_size=model.config.vocab_size, **shape.model_dump())
        for key, value in wanted:
            if value != (found := getattr(model.config, key)):
                raise UserError(
                    f"{asked_by}.{key} is {value}, but {init} has {found}; make them agree."
                )
        return model
    if advice := _advice(init):
        raise UserError(f"{init} is no tokenizer alone: {advice}.")
    vocab_size = ChatTokenizer.load(init).vocab_size
    model = Transformer(ModelConfig(vocab_size=vocab_size, **shape.model_dump()))
    model.initialize(seed)
    return model


def load_config(directory: Path) -> ModelConfig:
    """The shape of a checkpoint's model.

    Raises:
        UserError: there is no readable config.json of a model we know.
    """
    path = directory / "config.json"
    if not path.is_file():
        advice = _advice(directory) or "run its stage first"
        raise UserError(f"{path} is missing; {directory} is not a checkpoint: {advice}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["model_type"] not in (DENSE, MIXTURE):
            raise UserError(
                f"{path}: model_type is {config['model_type']!r}; "
                f"allowed is {DENSE!r} or {MIXTURE!r}."
            )
        mixture = config["model_type"] == MIXTURE
        shape = {field: config[key] for field, key in SHAPE.items()}
        shape["rope_theta"] = (config.get("rope_parameters") or config)["rope_theta"]
        shape |= {field: config[key] if mixture else 0 for field, key in EXPERTS.items()}
        loaded = ModelConfig.model_validate(shape, strict=True)
        _require_our_arithmetic(config, loaded, path)
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing.") from None
    except ValidationError as error:
        detail = error.errors()[0]
        keys = [(SHAPE | EXPERTS).get(str(field), field) for field in detail["loc"]]
        where = f"{keys[0]} is {detail['input']!r}; " if keys else ""
        raise UserError(f"{path}: {where}{complaint(detail)}.") from None
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not valid: {error}.") from None
    if mixture and not loaded.num_experts:
        raise UserError(f"{path}: moe_num_experts is 0; {MIXTURE!r} needs at least one.")
    width = "moe_intermediate_size" if mixture else "intermediate_size"
    if config.get(width) != loaded.intermediate_size:
        raise UserError(
            f"{path}: {width} is {config.get(width)}; "
            f"for hidden_size {loaded.hidden_size} only {loaded.intermediate_size} is supported."
        )
    return loaded


def _require_our_arithmetic(config: dict[str, Any], loaded: ModelConfig, path: Path) -> None:
    """Raises UserError where a model of our shape would compute something else with its weights."""
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "rope_type": (rotary.get("rope_type", rotary.get("type", "default")), "default"),
        **{
            key: (config.get(key) or False, False)
            for key in ("attention_bias", "mlp_bias", "use_bias")
        },
    }
    if config.get("head_dim") is not None:
        found["head_dim"] = (config["head_dim"], loaded.head_size)
    if config.get("auto_map"):  # code that comes with a model
        found["auto_map"] = (config["auto_map"], None)
    for key, (value, supported) in found.items():
        if value != supported:
            raise UserError(f"{path}: {key} is {value!r}; only {supported!r} is supported.")


def config_json(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model's shape, for stock transformers."""
    shared = {
        "dtype": "float32",
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        # transformers 4 reads the first, 5 the second; with neither, theta is another one.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: getattr(config, field) for field, key in SHAPE.items()},
    }
    if not config.num_experts:
        return shared | {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "model_type": DENSE,
        }
    return shared | {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": MIXTURE,
        "moe_intermediate_size": config.intermediate_size,
        "moe_layer_end_index": config.num_layers - 1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 0,  # every layer has experts
        "moe_norm_min": 1e-12,
        "use_bias": False,
        **{key: getattr(config, field) for field, key in EXPERTS.items()},
    }
