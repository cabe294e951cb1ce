"""Checkpoints: Hugging Face directories that stock transformers loads, weights as safetensors.

config.json  generation_config.json  model.safetensors  and the tokenizer's files
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minimind.datasets.encoded import EncodedDataset
from minimind.errors import UserError
from minimind.model.transformer import ModelConfig, Transformer
from minimind.tokenizer import ChatTokenizer

WEIGHTS = "model.safetensors"
# Everything else in a checkpoint's directory belongs to the tokenizer.
MODEL_FILES = ("config.json", "generation_config.json", WEIGHTS)


def save_checkpoint(directory: Path, model: Transformer, tokenizer_directory: Path) -> None:
    """Write `model` and a copy of a tokenizer's files as a Hugging Face directory.

    The directory appears whole or not at all.
    """
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for source in sorted(tokenizer_directory.iterdir()):
        if source.is_file() and source.name not in MODEL_FILES:
            # copyfile, not copy: files that DVC links into the workspace are read-only,
            # and their mode must not come along.
            shutil.copyfile(source, partial / source.name)
    _write_json(partial / "config.json", _config_json(model.config))
    _write_json(partial / "generation_config.json", _generation_json())
    weights = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
    }
    # More metadata than this would change the file's bytes from run to run.
    save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def load_model(directory: Path) -> Transformer:
    """Load a checkpoint onto the CPU in float32.

    Raises:
        UserError: a file is missing, cut short or of another architecture; weights are missing,
            of other shapes or not finite.
    """
    config = load_config(directory)
    try:
        weights = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{directory / WEIGHTS} cannot be read: {error}") from None
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights.pop("lm_head.weight", None)  # some writers store the tied head a second time
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        name = sorted(expected.items() ^ found.items())[0][0]
        raise UserError(
            f"{directory / WEIGHTS}: {name} is {found.get(name, 'missing')}, but config.json "
            f"calls for {expected.get(name, 'no such weight')}."
        )
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{directory / WEIGHTS}: {name} holds NaN or infinite values.")
    model = Transformer(config)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def load_config(directory: Path) -> ModelConfig:
    """The shape of a checkpoint's model.

    Raises:
        UserError: there is no readable config.json of a model we know.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; {directory} is not a checkpoint: run its stage first.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["model_type"] != "llama":
            raise UserError(f"{path}: model_type is {config['model_type']!r}; allowed is 'llama'.")
        loaded = ModelConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            max_positions=config["max_position_embeddings"],
            rope_theta=(config.get("rope_parameters") or config)["rope_theta"],
            norm_eps=config["rms_norm_eps"],
        )
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"{path} is not valid: {error}.") from None
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing.") from None
    except ValidationError as error:
        raise UserError(f"{path}: {error.errors()[0]['msg']}.") from None
    if config.get("intermediate_size") != loaded.intermediate_size:
        raise UserError(
            f"{path}: intermediate_size is {config.get('intermediate_size')}; "
            f"for hidden_size {loaded.hidden_size} only {loaded.intermediate_size} is supported."
        )
    return loaded


def require_same_tokenizer(checkpoint: Path, dataset: EncodedDataset) -> None:
    """Raises UserError unless `dataset` was encoded with the tokenizer in `checkpoint`."""
    dataset.check_tokenizer(ChatTokenizer.load(checkpoint).fingerprint, checkpoint)


def _config_json(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": config.norm_eps,
        # transformers 4 reads the first, 5 the second; with neither, theta is silently 1e4.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": config.vocab_size,
    }


def _generation_json() -> dict[str, Any]:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
