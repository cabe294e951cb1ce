"""Saving a reward model as a directory that stock transformers loads."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from minimind.files import replacing
from minimind.model.checkpoint import WEIGHTS, save_checkpoint, save_weights, write_json
from minimind.model.reward import RewardModel

CLASSIFIER = "SequenceClassification"


def save_reward_model(directory: Path, model: RewardModel, tokenizer_directory: Path) -> None:
    """Write a model of class ``...ForSequenceClassification`` with one label.

    Stock transformers reads the score at the last token that is not padding, as training does.
    The directory appears whole or not at all.
    """
    with replacing(directory) as partial:
        save_checkpoint(partial, model.transformer, tokenizer_directory)
        (partial / "generation_config.json").unlink()
        config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        config |= {
            "architectures": [config["architectures"][0].replace("CausalLM", CLASSIFIER)],
            "id2label": {"0": "reward"},  # transformers takes the number of labels from here
            "label2id": {"reward": 0},
            "tie_word_embeddings": False,
        }
        write_json(partial / "config.json", config)
        weights = load_file(partial / WEIGHTS)
        weights["score.weight"] = model.score.weight.detach().to("cpu", torch.float32).contiguous()
        save_weights(partial / WEIGHTS, weights)
