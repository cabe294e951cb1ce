"""Small real things that the tests are made of."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.datasets.encoded import EncodedDataset
from minimind.model.transformer import ModelConfig, Transformer

VOCAB_SIZE = 97
TOKENIZER_SIZE = 267  # of the tiny tokenizer: single bytes, control tokens and tags


def tiny_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_positions": 128,
        "rope_theta": 1e6,
        "norm_eps": 1e-5,
        "num_experts": 0,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "router_aux_loss_coef": 0.1,
    }
    return ModelConfig(**(values | changes))


def tiny_model(seed: int = 0, **changes: Any) -> Transformer:
    model = Transformer(tiny_config(**changes))
    model.initialize(seed)
    return model


def write_rows(
    directory: Path,
    rows: list[tuple[list[int], list[int]]],
    format: str = "chat",
    tokenizer: str = "none",
    copies: int = 0,
    sources: Sequence[int] | None = None,
) -> EncodedDataset:
    """An encoded data set of given (ids, loss_mask); each sample is a source row's, or as told."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = np.array([token for row, _ in rows for token in row], dtype=np.uint16)
    loss_mask = np.array([c for _, row in rows for c in row], dtype=np.uint8)
    offsets = np.cumsum([0] + [len(row) for row, _ in rows]).astype(np.int64)
    trained = np.cumsum([0] + [sum(c > 0 for c in row) for _, row in rows]).astype(np.int64)
    rows_per_sample = 2 if format == "preference" else 1
    firsts = sources or range(0, len(rows) // rows_per_sample + 1, 1 + copies)
    arrays = {
        "tokens": ids,
        "loss_mask": loss_mask,
        "offsets": offsets,
        "trained_offsets": trained,
        "sources": np.array(firsts, dtype=np.int64),
    }
    for name, array in arrays.items():
        array.tofile(directory / f"{name}.bin")
    meta = {
        "format": format,
        "rows": len(rows),
        "sources": len(firsts) - 1,
        "tokens": len(ids),
        "trained_tokens": int(trained[-1]),
        "token_dtype": "uint16",
        "rows_per_sample": rows_per_sample,
        "copies": copies,
        "tokenizer": tokenizer,
        "max_length": 128,
    }
    (directory / "meta.json").write_text(json.dumps(meta))
    return EncodedDataset.open(directory)


def random_rows(num_rows: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Rows of 4 to 20 tokens: a context, then trained tokens, some of them tags."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        length = int(rng.integers(4, 21))
        context = int(rng.integers(1, length - 1))
        trained = rng.choice([1, 1, 1, 2], size=length - context)
        rows.append(
            (rng.integers(3, VOCAB_SIZE, size=length).tolist(), [0] * context + trained.tolist())
        )
    return rows


def random_pairs(num_pairs: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Preference rows: chosen and rejected share their context."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_pairs):
        context = rng.integers(3, VOCAB_SIZE, size=int(rng.integers(2, 8))).tolist()
        for _side in range(2):
            answer = rng.integers(3, VOCAB_SIZE, size=int(rng.integers(1, 9))).tolist()
            rows.append((context + answer, [0] * len(context) + [1] * len(answer)))
    return rows


def tiny_tokenizer(directory: Path) -> Path:
    """A tokenizer of bytes and little else; its files are read-only, as DVC's links are."""
    save_tokenizer(train_tokenizer(["user", "assistant", "1+1=2"], TOKENIZER_SIZE), directory)
    for file in directory.iterdir():
        file.chmod(0o444)
    return directory
