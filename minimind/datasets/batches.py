"""Batches: samples laid end to end, with the positions that are trained on.

What a step holds is a pure function of (seed, step): resuming needs the step's number only,
and any number of processes divides the same step among itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minimind.chat.tokenizer import TAG
from minimind.datasets.encoded import EncodedDataset
from minimind.datasets.epochs import exact, num_steps, steps_per_epoch
from minimind.model.transformer import PackedTokens

Rows = NDArray[np.int64]
# What a loss term is divided by: trained tokens, rows, or samples (a preference pair is one
# sample of two rows).
Unit = Literal["tokens", "rows", "samples"]


class Counts(NamedTuple):
    """The denominators of a micro-batch or a whole optimizer step."""

    tokens: int
    rows: int
    samples: int


@dataclass(frozen=True)
class PackedBatch:
    """N rows of T tokens in all, of which M are trained on.

    extras: whatever else belongs to rows ([N, ..]) or to trained tokens ([M, ..]).
    """

    tokens: PackedTokens
    predict_at: Tensor  # int64 [M], the position in T before each trained token
    targets: Tensor  # int64 [M], the trained tokens
    is_tag: Tensor  # bool [M], whether it is part of a think or answer tag
    row_of_target: Tensor  # int64 [M], 0..N-1
    counts: Counts
    rows: Rows  # [N], numbers of the rows in the data set, for messages
    extras: dict[str, Tensor]
    weight: float = 1.0  # 0 for a stand-in, computed as any other but not counted: see divide

    def to(self, device: torch.device) -> PackedBatch:
        if device.type == "cpu":
            return self

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        moved = {name: move(value) for name, value in vars(self).items()}
        moved["tokens"] = PackedTokens(*map(move, self.tokens))
        moved["extras"] = {name: move(tensor) for name, tensor in self.extras.items()}
        return PackedBatch(**moved)


@dataclass(frozen=True)
class Extra:
    """An array that travels with the rows (``per="rows"``) or the trained tokens of a data set."""

    values: NDArray[np.generic]  # [rows, ..] or [trained tokens, ..]
    per: Literal["rows", "tokens"]


def split_samples(
    sources: NDArray[np.int64], validation_share: float, seed: int, copies: int
) -> tuple[Rows, Rows]:
    """Numbers of the samples to train on and to validate on, each in ascending order.

    Drawn is a share of the source's rows, rounded down: with one of them all its pieces are held
    out, and all its variations, which are not validated on.

    sources: int64 [source rows + 1], the first sample of each source row.
    copies: variations that follow each original among the samples of a source row.
    """
    num_sources = len(sources) - 1
    num_held_out = math.floor(exact(validation_share) * num_sources)
    is_held_out = np.zeros(num_sources, dtype=bool)
    is_held_out[np.random.default_rng([seed, 0]).permutation(num_sources)[:num_held_out]] = True
    lengths = np.diff(sources)
    held_out_samples = np.repeat(is_held_out, lengths)
    position = np.arange(sources[-1]) - np.repeat(sources[:-1], lengths)
    is_original = position < np.repeat(lengths // (1 + copies), lengths)
    return np.flatnonzero(~held_out_samples), np.flatnonzero(held_out_samples & is_original)


def pack(
    dataset: EncodedDataset, samples: Rows, extras: dict[str, Extra], weight: float = 1.0
) -> PackedBatch:
    """Lay the rows of some samples end to end."""
    per_sample = dataset.rows_per_sample
    rows = (samples[:, None] * per_sample + np.arange(per_sample)).ravel()
    starts, ends = dataset.offsets[rows], dataset.offsets[rows + 1]
    lengths = ends - starts
    spans = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
    ids = np.concatenate([dataset.tokens[span] for span in spans]).astype(np.int64)
    loss_mask = np.concatenate([dataset.loss_mask[span] for span in spans])
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    trained = np.flatnonzero(loss_mask)
    row_of_token = np.repeat(np.arange(len(rows)), lengths)
    return PackedBatch(
        tokens=PackedTokens(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(np.arange(len(ids)) - boundaries[row_of_token]),
            boundaries=torch.from_numpy(boundaries.astype(np.int32)),
            longest=int(lengths.max()),
        ),
        predict_at=torch.from_numpy(trained - 1),  # a row's first token is never trained
        targets=torch.from_numpy(ids[trained]),
        is_tag=torch.from_numpy(loss_mask[trained] == TAG),
        row_of_target=torch.from_numpy(row_of_token[trained]),
        counts=Counts(tokens=len(trained), rows=len(rows), samples=len(samples)),
        rows=rows,
        extras={name: _select(dataset, rows, extra) for name, extra in extras.items()},
        weight=weight,
    )


def _select(dataset: EncodedDataset, rows: Rows, extra: Extra) -> Tensor:
    if extra.per == "rows":
        return torch.from_numpy(np.ascontiguousarray(extra.values[rows]))
    offsets = dataset.trained_offsets
    return torch.from_numpy(
        np.concatenate([extra.values[offsets[row] : offsets[row + 1]] for row in rows])
    )


class Step(NamedTuple):
    """One process's share of an optimizer step."""

    micro_batches: list[PackedBatch]
    totals: Counts  # of the whole step, over all micro-batches and processes


@dataclass(frozen=True)
class Batches:
    """All optimizer steps of a training run over some samples of a data set.

    A step takes batch_size * accumulation_steps samples; the last step of an epoch takes what
    is left. `epochs` may be a fraction. Processes divide a step as :func:`divide` says.
    """

    dataset: EncodedDataset
    samples: Rows
    batch_size: int
    accumulation_steps: int
    epochs: float
    max_steps: int  # 0: no limit
    seed: int
    extras: dict[str, Extra]

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.samples), self.samples_per_step)

    @property
    def num_steps(self) -> int:
        return num_steps(self.epochs, len(self.samples), self.samples_per_step, self.max_steps)

    def samples_of(self, step: int) -> Rows:
        """Numbers of the samples of optimizer step `step`, in their order."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _epoch_order(len(self.samples), self.seed, epoch)
        size = self.samples_per_step
        return self.samples[order[position * size : (position + 1) * size]]

    def step(self, step: int, rank: int, world: int) -> Step:
        samples = self.samples_of(step)
        shares = in_order(self.dataset, samples, self.batch_size, self.extras, rank, world)
        return Step(list(shares), count(self.dataset, samples))


def divide(samples: Rows, batch_size: int, rank: int, world: int) -> Iterator[tuple[Rows, float]]:
    """One process's micro-batches of some samples, `batch_size` being that of all processes.

    Process `rank` takes every world-th sample. All get the same number of micro-batches, since
    they compute in step: one that has no sample left gets a stand-in, of weight 0.
    """
    own = samples[rank::world]
    own_batch_size = math.ceil(batch_size / world)
    for start in range(0, math.ceil(len(samples) / world), own_batch_size):
        share = own[start : start + own_batch_size]
        yield (share, 1.0) if len(share) else (samples[:1], 0.0)


@lru_cache(maxsize=1)  # every step of an epoch asks for the same
def _epoch_order(num_samples: int, seed: int, epoch: int) -> Rows:
    return np.random.default_rng([seed, 1, epoch]).permutation(num_samples)


def count(dataset: EncodedDataset, samples: Rows) -> Counts:
    """Denominators of some samples, from the data set's index alone."""
    per_sample = dataset.rows_per_sample
    offsets = dataset.trained_offsets
    tokens = offsets[(samples + 1) * per_sample] - offsets[samples * per_sample]
    return Counts(int(tokens.sum()), len(samples) * per_sample, len(samples))


def in_order(
    dataset: EncodedDataset,
    samples: Rows,
    batch_size: int,
    extras: dict[str, Extra],
    rank: int = 0,
    world: int = 1,
) -> Iterator[PackedBatch]:
    """One pass over some samples in the given order, `batch_size` samples at a time."""
    for share, weight in divide(samples, batch_size, rank, world):
        yield pack(dataset, share, extras, weight)
