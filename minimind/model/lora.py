"""Low-rank adapters (arXiv:2106.09685) through peft, in directories that stock peft loads.

Our modules are named as Llama's, so an adapter trained here fits the stock model and back.
Importing this module is slow: peft imports transformers.
"""

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from pydantic import Field, field_validator
from safetensors.torch import load_file

from minimind.errors import UserError
from minimind.files import replacing
from minimind.model.checkpoint import save_weights
from minimind.model.transformer import Transformer
from minimind.params import Section

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class AdapterShape(Section):
    """Keys of the `lora` section that make an adapter."""

    rank: int = Field(16, gt=0, le=2**14)
    alpha: float = Field(32.0, gt=0)  # the product of the two matrices is scaled by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1)  # of the adapter's input
    projections: list[Projection] = Field([*get_args(Projection)], min_length=1)

    @field_validator("projections")
    @classmethod
    def _stand_once(cls, names: list[Projection]) -> list[Projection]:
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]} stands there twice")
        return names


def add_adapter(model: Transformer, shape: AdapterShape, seed: int) -> PeftModel:
    """Put an adapter beside each projection, in place; of the whole, the adapter alone is trained.

    Its second matrix is zero, so the model still computes what it did.

    Raises:
        UserError: a projection of an expert is asked for. Experts are modules here, but slices of
            one tensor in the stock model: no adapter would fit both.
    """
    if model.config.num_experts and (others := set(shape.projections) - {*ATTENTION}):
        raise UserError(
            f"lora.projections has {', '.join(sorted(others))}, but the checkpoint has experts; "
            f"with experts, allowed are {', '.join(ATTENTION)}."
        )
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=list(shape.projections),
        task_type="CAUSAL_LM",
        inference_mode=False,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws the first matrix from the global one
        torch.manual_seed(seed)
        return PeftModel(model, config)


def save_adapter(directory: Path, model: PeftModel, base: Path | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors; same adapter, same bytes.

    The directory appears whole or not at all.
    base: the checkpoint that peft's AutoPeftModel is to load beneath it.
    """
    config = model.peft_config["default"].to_dict() | {
        "inference_mode": True,
        "base_model_name_or_path": base.as_posix() if base else None,
    }

    def as_json(value: Any) -> Any:
        """Sets are sorted: their order differs from process to process. Enums are strings."""
        return sorted(value) if isinstance(value, set) else value.value

    text = json.dumps(config, default=as_json, indent=2, sort_keys=True)
    weights = {name: tensor.cpu().contiguous() for name, tensor in _adapter_weights(model).items()}
    with replacing(directory) as partial:
        partial.mkdir()
        (partial / CONFIG).write_text(text + "\n", encoding="utf-8")
        save_weights(partial / WEIGHTS, weights)


def merge_adapter(base: Transformer, directory: Path) -> Transformer:
    """Add the adapter in `directory` to the weights of `base`, in place.

    Raises:
        UserError: a file is missing or damaged, or the adapter does not fit the base.
    """
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing; {directory} is not an adapter.")
    try:
        found = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("peft_type") != "LORA":
            raise UserError(
                f"{directory / CONFIG} is not as peft writes it for LoRA: its peft_type must be "
                "LORA; run its stage again, or take it from its source again."
            )
        config = LoraConfig.from_pretrained(str(directory))
        _require_low_rank_alone(config, directory)
        model = PeftModel(base, config)
        weights = load_file(directory / WEIGHTS)
    except UserError:
        raise
    except Exception as error:  # peft raises whatever its parts raise
        raise UserError(
            f"the adapter {directory} cannot be read: {error}; run its stage again, or take it "
            "from its source again."
        ) from None
    expected = {name: tuple(tensor.shape) for name, tensor in _adapter_weights(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        name = sorted(expected.items() ^ found.items())[0][0]
        raise UserError(
            f"the adapter {directory} does not fit its base: {name} is "
            f"{found.get(name, 'missing')}, but the base calls for {expected.get(name, 'none')}."
        )
    for name, tensor in weights.items():
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{directory / WEIGHTS}: {name} holds NaN or infinite values.")
    set_peft_model_state_dict(model, weights)
    for layer in model.modules():  # what peft's merge_and_unload does, but for Hugging Face models
        if isinstance(layer, LoraLayer):
            layer.merge()
    merged = model.unload()
    assert isinstance(merged, Transformer)
    return merged.requires_grad_(True)


def _require_low_rank_alone(config: LoraConfig, directory: Path) -> None:
    """Raises UserError where an adapter has more than two matrices a layer."""
    for key in ("modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters"):
        if value := getattr(config, key, None):
            raise UserError(
                f"{directory / CONFIG}: {key} is {value!r}; only low-rank matrices of linear "
                "layers can be merged here: merge this adapter with peft."
            )


def _adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    # Without "False" peft would ask the hub about the base model's vocabulary.
    return get_peft_model_state_dict(model, save_embedding_layers=False)
