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

from minimind.chat.tokenizer import ChatTokenizer, copy_tokenizer, num_tokens, read_tokenizer
from minimind.errors import UserError, complaint
from minimind.files import replacing
from minimind.model.families import config_json, read_config
from minimind.model.transformer import ModelConfig, ModelShape, Transformer

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # where weights are in several files
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# A part of the Ernie mixture that ours does not have: it can choose experts by probability plus a
# bias; we balance them by a loss instead.
SELECTION_BIAS = "moe_statics.e_score_correction_bias"

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
    if model.config.model_type == "ernie4_5_moe":
        num_experts = model.config.num_experts
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
    if config.tie_embeddings:  # some writers store the tied head a second time
        head = weights.pop(HEAD, None)
        if head is not None and not torch.equal(head, weights.get(EMBEDDING, head.new_empty(0))):
            raise UserError(
                f"{path}: {HEAD} is not {EMBEDDING}, but tie_word_embeddings is true in "
                "config.json; if the head has weights of its own, make it false."
            )
    weights = {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.num_experts and any(".shared_experts.0." in name for name in weights):
        weights = dict(_as_ernie(name, w, config) for name, w in weights.items())
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
        num_known = num_tokens(read_tokenizer(directory))
        if num_known > config.vocab_size:
            raise UserError(
                f"{directory}: its tokenizer has {num_known} tokens, its model only "
                f"{config.vocab_size}; they do not belong together."
            )
    model = Transformer(config)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def _as_ernie(name: str, weight: Tensor, config: ModelConfig) -> tuple[str, Tensor]:
    """MiniMind 2's mixture: its one shared expert stands in a list, its rotation pairs halves."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        halves = weight.unflatten(0, (-1, 2, config.head_size // 2))
        weight = halves.transpose(1, 2).flatten(0, 2).contiguous()
    return name.replace(".shared_experts.0.", ".shared_experts."), weight


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
        advice = "run its stage again, or take it from its source again"
        raise UserError(f"{path} cannot be read: {error}; {advice}.") from None


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
        found = model.config.model_dump(exclude={"vocab_size"})
        wanted = shape.model_dump()
        if others := [key for key in wanted if wanted[key] != found[key]]:
            section = asked_by.rpartition(" ")[2]
            values = [json.dumps(found[key]).replace('"', "") for key in others]
            told = [f"-S '++{section}.{k}={v}'" for k, v in zip(others, values, strict=True)]
            raise UserError(
                f"{asked_by}.{others[0]} is {wanted[others[0]]}, but {init} has "
                f"{found[others[0]]}; make them agree: {' '.join(told)}"
            )
        return model
    if advice := _advice(init):
        raise UserError(f"{init} is no tokenizer alone: {advice}.")
    vocab_size = ChatTokenizer.load(init).vocab_size
    model = Transformer(ModelConfig(vocab_size=vocab_size, **shape.model_dump()))
    model.initialize(seed)
    return model


def extend_checkpoint(source: Path, directory: Path) -> None:
    """Put the model of `source` beside a tokenizer that has more tokens than that of `source`.

    What the model knows nothing of starts as the mean of all tokens that it knows.

    Raises:
        UserError: there is no checkpoint in `source` that can be read.
    """
    model, num_known = load_model(source), num_tokens(read_tokenizer(source))
    num_wanted = ChatTokenizer.load(directory).vocab_size
    vocab_size = max(num_wanted, model.config.vocab_size)  # some models have more than they use
    weights = model.state_dict()
    for name in {EMBEDDING, HEAD} & weights.keys():
        known, unused = weights[name][:num_known], weights[name][num_wanted:]
        new = known.double().mean(0).float().expand(num_wanted - num_known, -1)
        weights[name] = torch.cat([known, new, unused])
    extended = Transformer(model.config.model_copy(update={"vocab_size": vocab_size}))
    extended.load_state_dict(weights)
    save_checkpoint(directory, extended, directory)


def load_config(directory: Path) -> ModelConfig:
    """The shape of a checkpoint's model.

    Raises:
        UserError: there is no readable config.json of a model we know, or it says something that
            our model does not do.
    """
    path = directory / "config.json"
    if not path.is_file():
        advice = _advice(directory) or "run its stage first"
        raise UserError(f"{path} is missing; {directory} is not a checkpoint: {advice}.")
    return read_config(path)
