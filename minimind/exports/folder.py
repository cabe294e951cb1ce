"""A checkpoint as a folder to hand out: bf16 weights, a model card and a receipt."""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file

from minimind.errors import UserError
from minimind.exports.card import ADAPTER_CONFIG, card
from minimind.exports.receipt import Receipt, write_receipt
from minimind.files import replacing
from minimind.model.checkpoint import INDEX, load_model, save_checkpoint, save_weights, write_json
from minimind.report.results import Evaluation

LARGEST_FILE = "2GB"  # what hubs and browsers take without trouble


def write_export(
    output: Path,
    checkpoint: Path,
    receipt: Receipt,
    evaluation: Evaluation | None = None,
    largest_file: str = LARGEST_FILE,
) -> None:
    """Write a Hugging Face directory, or a peft one of an adapter, whole or not at all.

    Raises:
        UserError: the checkpoint is missing or damaged.
    """
    with replacing(output) as partial:
        if (checkpoint / ADAPTER_CONFIG).is_file():
            _copy_adapter(partial, checkpoint)
        else:
            save_checkpoint(partial, load_model(checkpoint), checkpoint)
            _round_weights(partial, largest_file)
        text = card(partial, output.name, receipt, evaluation)
        (partial / "README.md").write_text(text + "\n", encoding="utf-8")
        write_receipt(partial, receipt)


def _copy_adapter(folder: Path, adapter: Path) -> None:
    file = adapter / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        base = config["r"] and config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not of an adapter: {error!r}; run stage lora again.") from None
    if not base:
        raise UserError(
            f"{file}: base_model_name_or_path is {base!r}, so that nobody could tell what the "
            "adapter is for; run stage lora again."
        )
    folder.mkdir()
    for part in sorted(adapter.iterdir()):
        shutil.copyfile(part, folder / part.name)  # contents only: DVC makes files read-only


def _round_weights(folder: Path, largest_file: str) -> None:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors*")):
        if file.suffix == ".safetensors":
            weights |= {name: t.to(torch.bfloat16) for name, t in load_file(file).items()}
        file.unlink()
    plan = split_torch_state_dict_into_shards(weights, max_shard_size=largest_file)
    for name, tensors in plan.filename_to_tensors.items():
        save_weights(folder / name, {tensor: weights[tensor] for tensor in tensors})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"dtype": "bfloat16"})
