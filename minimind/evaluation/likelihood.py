"""Log-probabilities of given continuations: for multiple choice and for held-out text.

Shapes: T tokens laid end to end, H query heads, K key/value heads, E head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.compute.precision import DType, autocast
from minimind.model.generate import num_alike
from minimind.model.transformer import Transformer

TOKENS_AT_A_TIME = 8192  # bounds the memory that logits take
SHARED_FROM = 64  # tokens: prefixes that begin with as many in common have that part computed once


@dataclass(frozen=True)
class Fork:
    """Alternatives for what follows a prefix; the prefix is computed once for all of them."""

    prefix: Sequence[int]  # one token or more
    branches: Sequence[Sequence[int]]  # each one token or more

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]]) -> "Fork":
        """Whole rows, split where the first two of them differ."""
        num_shared = num_alike(rows)
        assert num_shared > 0, "rows start alike"
        return cls(rows[0][:num_shared], [row[num_shared:] for row in rows])

    @property
    def num_tokens(self) -> int:
        """Those that are read: what follows a branch's last one is not asked."""
        return len(self.prefix) + sum(len(branch) - 1 for branch in self.branches)


class Likelihood(NamedTuple):
    """What a model gives a branch after its prefix."""

    logprob: float  # sum over its tokens
    is_greedy: bool  # whether each of them is the likeliest


class _Part(NamedTuple):
    """A part of a batch: what forks begin with, or a fork behind that."""

    num_tokens: int
    shared: int | None = None  # the number of the part that it goes on from
    view: Tensor | None = None  # who sees whom; None: simply what came before


def branch_logprobs(model: Transformer, forks: Sequence[Fork], dtype: DType) -> list[list[float]]:
    """Sum of log-probabilities of each branch's tokens after its prefix, fork by fork."""
    found = branch_likelihoods(model, forks, dtype)
    return [[branch.logprob for branch in branches] for branches in found]


def branch_likelihoods(
    model: Transformer, forks: Sequence[Fork], dtype: DType
) -> list[list[Likelihood]]:
    """The likelihood of each branch, fork by fork.

    Forks that follow one another and begin alike take the less time for it: sort them.
    """
    found: list[list[Likelihood]] = []
    for batch in _batches(forks):
        per_branch = iter(_batch_likelihoods(model, batch, dtype).tolist())
        for _, fork in batch:
            sums = [next(per_branch) for _ in fork.branches]
            found.append([Likelihood(logprob, misses == 0) for logprob, misses in sums])
    return found


def _batches(forks: Sequence[Fork]) -> Iterator[list[tuple[Sequence[int], Fork]]]:
    """Forks without what they begin with, and that: the same object for all that share it."""
    batch: list[tuple[Sequence[int], Fork]] = []
    num_tokens = 0
    for shared, fork in _split(forks):
        is_new = not batch or batch[-1][0] is not shared
        if batch and num_tokens + is_new * len(shared) + fork.num_tokens > TOKENS_AT_A_TIME:
            yield batch
            batch, num_tokens, is_new = [], 0, True
        batch.append((shared, fork))
        num_tokens += is_new * len(shared) + fork.num_tokens
    if batch:
        yield batch


def _split(forks: Sequence[Fork]) -> Iterator[tuple[Sequence[int], Fork]]:
    """Each fork as what it shares with those beside it, and the rest, whose prefix has a token."""
    for _, group in groupby(forks, lambda fork: tuple(fork.prefix[:SHARED_FROM])):
        alike = list(group)
        num_shared = num_alike([fork.prefix for fork in alike])
        if len(alike) == 1 or num_shared < SHARED_FROM:
            num_shared = 0
        shared = tuple(alike[0].prefix[:num_shared])
        yield from ((shared, Fork(fork.prefix[num_shared:], fork.branches)) for fork in alike)


def _batch_likelihoods(
    model: Transformer, batch: Sequence[tuple[Sequence[int], Fork]], dtype: DType
) -> Tensor:
    """float64 [branches, 2]: log-probability, and how many tokens are not the likeliest."""
    device = model.model.embed_tokens.weight.device
    ids: list[int] = []
    positions: list[int] = []
    parts: list[_Part] = []
    predict_at: list[int] = []  # into ids: the token before each one that is scored
    targets: list[int] = []
    branch_of_target: list[int] = []
    num_branches = 0
    before: Sequence[int] = ()
    shared_part = None
    for shared, fork in batch:
        if shared is not before:
            before, shared_part = shared, len(parts) if shared else None
            ids += shared
            positions += range(len(shared))
            parts += [_Part(len(shared))] * bool(shared)
        parts.append(_Part(fork.num_tokens, shared_part, _view(fork, len(shared), device)))
        ids += fork.prefix
        end = len(shared) + len(fork.prefix)
        positions += range(len(shared), end)
        last_of_prefix = len(ids) - 1
        for branch in fork.branches:
            predict_at += [last_of_prefix, *range(len(ids), len(ids) + len(branch) - 1)]
            targets += branch
            branch_of_target += [num_branches] * len(branch)
            num_branches += 1
            ids += branch[:-1]
            positions += range(end, end + len(branch) - 1)

    on_device = partial(torch.tensor, device=device)
    with torch.inference_mode(), autocast(device, dtype):
        hidden = model.model(on_device(ids), on_device(positions), partial(_attend, parts=parts))
        logits = model.logits(hidden[on_device(predict_at)])
    wanted = on_device(targets)
    logprobs = -F.cross_entropy(logits, wanted, reduction="none").cpu().double()
    misses = (logits.argmax(-1) != wanted).cpu().double()
    sums = torch.zeros(num_branches, 2, dtype=torch.float64)
    return sums.index_add(0, torch.tensor(branch_of_target), torch.stack((logprobs, misses), 1))


def _view(fork: Fork, num_shared: int, device: torch.device) -> Tensor | None:
    """Who sees whom in a fork of n tokens, bool [n, num_shared + n]: all that is shared, and of
    the fork what came before, but no other branch.

    None where that is simply what came before, however long.
    """
    lengths = torch.tensor([len(fork.prefix), *(len(b) - 1 for b in fork.branches)], device=device)
    is_line = int((lengths > 0).sum()) <= 2
    if is_line and not num_shared:
        return None
    part = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    own = ((part == 0) | (part == part[:, None])).tril()
    return F.pad(own, (num_shared, 0), value=True)


def _attend(
    _layer: int, query: Tensor, key: Tensor, value: Tensor, *, parts: Sequence[_Part]
) -> Tensor:
    """Attention of [T, H, E] to [T, K, E] inside each fork, in float32: 16 bits are slow on CPU."""
    lengths = [part.num_tokens for part in parts]
    with torch.autocast(query.device.type, enabled=False):  # it would round what is widened here
        q, k, v = (tensor.float().split(lengths) for tensor in (query, key, value))
        outs = []
        for number, (_, shared, view) in enumerate(parts):
            seen = [number] if shared is None else [shared, number]
            out = F.scaled_dot_product_attention(
                q[number].transpose(0, 1)[None],
                torch.cat([k[part] for part in seen]).transpose(0, 1)[None],
                torch.cat([v[part] for part in seen]).transpose(0, 1)[None],
                attn_mask=view,
                is_causal=view is None,
                enable_gqa=True,
            )
            outs.append(out[0].transpose(0, 1))
    return torch.cat(outs).to(query.dtype)
