"""Log-probabilities of given continuations: for multiple choice and for held-out text.

Shapes: T tokens laid end to end, H query heads, K key/value heads, E head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.compute.precision import DType, autocast
from minimind.model.transformer import Transformer

TOKENS_AT_A_TIME = 8192  # bounds the memory that logits take


@dataclass(frozen=True)
class Fork:
    """Alternatives for what follows a prefix; the prefix is computed once for all of them."""

    prefix: Sequence[int]  # one token or more
    branches: Sequence[Sequence[int]]  # each one token or more

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]]) -> "Fork":
        """Whole rows, split where the first two of them differ."""
        columns = zip(*(row[:-1] for row in rows), strict=False)
        num_shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
        assert num_shared > 0, "rows start alike"
        return cls(rows[0][:num_shared], [row[num_shared:] for row in rows])

    @property
    def num_tokens(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))


def branch_logprobs(model: Transformer, forks: Sequence[Fork], dtype: DType) -> list[list[float]]:
    """Sum of log-probabilities of each branch's tokens after its prefix, fork by fork."""
    sums: list[list[float]] = []
    for batch in _batches(forks):
        per_branch = iter(_batch_logprobs(model, batch, dtype).tolist())
        sums += [[next(per_branch) for _ in fork.branches] for fork in batch]
    return sums


def _batches(forks: Sequence[Fork]) -> Iterator[list[Fork]]:
    batch: list[Fork] = []
    num_tokens = 0
    for fork in forks:
        if batch and num_tokens + fork.num_tokens > TOKENS_AT_A_TIME:
            yield batch
            batch, num_tokens = [], 0
        batch.append(fork)
        num_tokens += fork.num_tokens
    if batch:
        yield batch


def _batch_logprobs(model: Transformer, forks: Sequence[Fork], dtype: DType) -> Tensor:
    """float64 [branches of all forks]."""
    ids: list[int] = []
    positions: list[int] = []
    predict_at: list[int] = []  # into ids: the token before each one that is scored
    targets: list[int] = []
    branch_of_target: list[int] = []
    num_branches = 0
    for fork in forks:
        ids += fork.prefix
        positions += range(len(fork.prefix))
        last_of_prefix = len(ids) - 1
        for branch in fork.branches:
            predict_at += [last_of_prefix, *range(len(ids), len(ids) + len(branch) - 1)]
            targets += branch
            branch_of_target += [num_branches] * len(branch)
            num_branches += 1
            ids += branch
            positions += range(len(fork.prefix), len(fork.prefix) + len(branch))

    device = model.model.embed_tokens.weight.device
    attend = partial(
        _attend_in_forks,
        lengths=[fork.num_tokens for fork in forks],
        views=[_view(fork, device) for fork in forks],
    )

    on_device = partial(torch.tensor, device=device)
    with torch.inference_mode(), autocast(device, dtype):
        hidden = model.model(on_device(ids), on_device(positions), attend)
        logits = model.logits(hidden[on_device(predict_at)])
    logprobs = -F.cross_entropy(logits, on_device(targets), reduction="none").cpu().double()
    sums = torch.zeros(num_branches, dtype=torch.float64)
    return sums.index_add(0, torch.tensor(branch_of_target), logprobs)


def _view(fork: Fork, device: torch.device) -> Tensor | None:
    """Who sees whom in a fork, bool [n, n]: what came before, but no other branch.

    None for a single branch: simply what came before, however long.
    """
    if len(fork.branches) == 1:
        return None
    lengths = torch.tensor([len(fork.prefix), *map(len, fork.branches)], device=device)
    part = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    return ((part == 0) | (part == part[:, None])).tril()


def _attend_in_forks(
    _layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: list[int],
    views: list[Tensor | None],
) -> Tensor:
    """Attention of [T, H, E] to [T, K, E] inside each fork, in float32: 16 bits are slow on CPU."""
    with torch.autocast(query.device.type, enabled=False):  # it would round what is widened here
        q, k, v = (tensor.float().split(lengths) for tensor in (query, key, value))
        outs = [
            F.scaled_dot_product_attention(
                q[fork].transpose(0, 1)[None],
                k[fork].transpose(0, 1)[None],
                v[fork].transpose(0, 1)[None],
                attn_mask=view,
                is_causal=view is None,
                enable_gqa=True,
            )[0].transpose(0, 1)
            for fork, view in enumerate(views)
        ]
    return torch.cat(outs).to(query.dtype)
