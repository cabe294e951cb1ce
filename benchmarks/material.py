"""What all peers work on: one model's weights, and rows of tokens with the lengths of real text.

Rows are random tokens: time does not depend on which. Their lengths are log-normal with a mean of
130 tokens, as those of the documents' data sets are; of a chat, 35 % is context.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from minimind.cli.presets import merge, read_preset
from minimind.datasets.batches import Batches, Rows
from minimind.datasets.encoded import EncodedDataset
from minimind.model.transformer import ModelConfig, PackedTokens, Transformer

PAD, START, END = 0, 1, 2
FIRST_WORD = 3  # of the tokens that rows are made of
MEAN_LENGTH, SPREAD = 130, 0.7  # of the log-normal lengths
CONTEXT_SHARE = 0.35
SUPERVISED = ("pretrain", "sft", "dpo", "reason", "distill")

Row = tuple[list[int], list[int]]  # token ids, and their loss_mask


@dataclass(frozen=True)
class Sizes:
    """How much is done in one timed step of each work."""

    samples: dict[str, int]  # of supervised works; pairs for dpo
    num_prompts: int  # of rollouts, each with num_samples completions
    num_samples: int
    new_tokens: int
    grpo_prompts: int
    grpo_tokens: int
    num_steps: int  # that there is different data for


class Material:
    """Weights, rows and parameters, all made from the seed."""

    def __init__(self, root: Path, folder: Path, sizes: Sizes, seed: int = 0) -> None:
        self.folder, self.sizes, self.seed = folder, sizes, seed
        params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
        self.params: dict[str, Any] = merge(params, read_preset(root / "presets", "small"))
        teacher = merge(params, read_preset(root / "presets", "base"))["model"]
        vocab_size = self.params["tokenizer"]["vocab_size"]
        self.config = ModelConfig(**self.params["model"], vocab_size=vocab_size)
        self.teacher_config = ModelConfig(**teacher, vocab_size=vocab_size)
        rng = np.random.default_rng([seed, 1])
        lengths = np.clip(rng.lognormal(3.3, 0.5, sizes.num_prompts), 8, 96).astype(int)
        self.prompts = [self._words(rng, int(length)) for length in lengths]

    def model(self, seed: int = 0) -> Transformer:
        model = Transformer(self.config)
        model.initialize(seed)
        return model

    def teacher(self) -> Transformer:
        model = Transformer(self.teacher_config)
        model.initialize(1)
        return model

    def ending_model(self, mean_length: int) -> Transformer:
        """A model whose completions end after `mean_length` tokens, more or less.

        All embeddings share a direction that then stands in every hidden state; the end token's
        has more of it, as much as makes it likely enough.
        """
        model = self.model()
        weight = model.model.embed_tokens.weight
        with torch.no_grad():
            weight[:, 0] = 0.5
            low, high = 0.5, 2.0
            for _ in range(20):
                weight[END, 0] = (low + high) / 2
                too_likely = _mean_probability(model, self.prompts[:4], END) > 1 / mean_length
                low, high = (low, weight[END, 0]) if too_likely else (weight[END, 0], high)
        return model

    def max_length(self, work: str) -> int:
        """What a peer that pads to a fixed length pads to: the presets' length of the data."""
        return int(self.params["encode"]["sft" if work == "distill" else work]["max_length"])

    def dataset(self, work: str) -> EncodedDataset:
        """The rows of a work, as an encoded data set of the project."""
        directory = self.folder / work
        if not directory.is_dir():
            write_rows(directory, self._rows(work), pairs=work == "dpo")
        return EncodedDataset.open(directory)

    def batches(self, work: str) -> Batches:
        """Which samples each step takes."""
        data, size = self.dataset(work), self.sizes.samples[work]
        return Batches(data, np.arange(data.num_samples), size, 1, 1.0, 0, self.seed, {})

    def rows_of_step(self, work: str, step: int) -> list[Row]:
        """The rows of a step; of pairs, chosen and rejected alternate."""
        data, batches = self.dataset(work), self.batches(work)
        samples: Rows = batches.samples_of(step % batches.num_steps)
        per_sample = data.rows_per_sample
        rows = (samples[:, None] * per_sample + np.arange(per_sample)).ravel()
        return [(data.row(r)[0].tolist(), data.row(r)[1].tolist()) for r in rows]

    def all_rows(self, work: str) -> list[Row]:
        data = self.dataset(work)
        return [(data.row(r)[0].tolist(), data.row(r)[1].tolist()) for r in range(data.rows)]

    def _rows(self, work: str) -> list[Row]:
        rng = np.random.default_rng([self.seed, 0, SUPERVISED.index(work)])
        rows = []
        for _ in range(self.sizes.samples[work] * self.sizes.num_steps):
            length = self._length(rng)
            context = 1 if work == "pretrain" else max(1, round(CONTEXT_SHARE * length))
            prompt = self._words(rng, context)
            for _side in range(2 if work == "dpo" else 1):
                ids = [*prompt, *self._words(rng, length - context - 1), END]
                rows.append((ids, [0] * context + [1] * (length - context)))
        return rows

    def _length(self, rng: np.random.Generator) -> int:
        mean_of_log = np.log(MEAN_LENGTH) - SPREAD**2 / 2
        return int(np.clip(rng.lognormal(mean_of_log, SPREAD), 12, 512))

    def _words(self, rng: np.random.Generator, length: int) -> list[int]:
        return [START, *rng.integers(FIRST_WORD, self.config.vocab_size, length - 1).tolist()]


def write_rows(directory: Path, rows: Sequence[Row], pairs: bool) -> None:
    """Write an encoded data set, in the format of minimind/datasets/encoded.py."""
    directory.mkdir(parents=True)
    lengths = [len(ids) for ids, _ in rows]
    trained = [sum(c > 0 for c in loss_mask) for _, loss_mask in rows]
    rows_per_sample = 2 if pairs else 1
    arrays = {
        "tokens": np.concatenate([ids for ids, _ in rows]).astype(np.uint16),
        "loss_mask": np.concatenate([loss_mask for _, loss_mask in rows]).astype(np.uint8),
        "offsets": np.cumsum([0, *lengths]).astype(np.int64),
        "trained_offsets": np.cumsum([0, *trained]).astype(np.int64),
        "sources": np.arange(len(rows) // rows_per_sample + 1),
    }
    for name, array in arrays.items():
        array.tofile(directory / f"{name}.bin")
    meta = {
        "format": "preference" if pairs else "chat",
        "rows": len(rows),
        "sources": len(rows) // rows_per_sample,
        "tokens": sum(lengths),
        "trained_tokens": sum(trained),
        "token_dtype": "uint16",
        "rows_per_sample": rows_per_sample,
        "tokenizer": "none",
        "max_length": max(lengths),
    }
    (directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def padded(rows: Sequence[Row], length: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and labels (-100 where nothing is trained) [N, L], padded to the longest or `length`."""
    length = length or max(len(ids) for ids, _ in rows)
    all_ids = torch.full((len(rows), length), PAD)
    labels = torch.full((len(rows), length), -100)
    for i, (ids, loss_mask) in enumerate(rows):
        all_ids[i, : len(ids)] = torch.tensor(ids)
        is_trained = torch.tensor(loss_mask) > 0
        labels[i, : len(ids)] = torch.where(is_trained, torch.tensor(ids), -100)
    return all_ids, labels


def num_trained(rows: Sequence[Row]) -> int:
    return sum(c > 0 for _, loss_mask in rows for c in loss_mask)


def _mean_probability(model: Transformer, prompts: list[list[int]], token: int) -> float:
    """Probability of a token after each position of the prompts: its mean."""
    lengths = [len(prompt) for prompt in prompts]
    boundaries = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(length) for length in lengths])
    packed = PackedTokens(ids, positions, boundaries, max(lengths))
    return float(model(packed, torch.arange(len(ids))).logits.softmax(-1)[:, token].mean())
