"""Batched generation with a key/value cache: greedy, or sampled with noise of each row's own.

Shapes: N prompts of T tokens in all, B rows (completions), H query heads, K key/value heads,
E head size, L columns of the cache, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, takewhile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.compute.precision import DType, autocast
from minimind.errors import UserError
from minimind.model.attention import packed_attention
from minimind.model.transformer import Transformer

# The cache grows by so many columns at a time and is always used whole: a product with a part
# of a larger one would copy that part first, which costs as much as the product.
COLUMNS_AT_A_TIME = 16
# Finished rows leave the batch once so many of its rows have finished: it costs a copy of the
# others' cache. Some stay, to leave a multiple of FILL, as in minimind/model/transformer.py.
FINISHED_SHARE = 0.2
FILL = 16
BLOCK = 64  # tokens of the vocabulary among which one is drawn at last


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, whichever rows run together and in however many processes.

    The noise depends on the seed, the row's key and the number of the token alone.
    """

    temperature: float  # above 0
    top_p: float  # above 0; at 1 any token of the vocabulary can be drawn
    seed: int
    keys: Sequence[int]  # one for each row


@dataclass(frozen=True)
class Completions:
    """An entry for each row; the rows of a prompt follow one another."""

    ids: list[list[int]]  # up to and including the end token, if there is one
    finished: list[bool]  # whether there is one
    logprobs: list[list[float]] | None  # of each id, if asked for


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_id: int,
    other_end_ids: Sequence[int] = (),
    dtype: DType,
    sampling: Sampling | None = None,
    num_samples_per_prompt: int = 1,
    with_logprobs: bool = False,
    share_prefix: bool = False,
) -> Completions:
    """Continue each prompt up to the end token, or one of others; greedily without `sampling`.

    A row stops at `max_new_tokens`, and where it fills the model's `max_positions`.
    Log-probabilities are at the sampling temperature and over the whole vocabulary, whatever
    top_p. Call it outside of autocast regions: they may remember weights of before an update.

    share_prefix: what all prompts begin with, as a task's examples, is computed once for all of
        them; the last bits then depend on which prompts are asked together.

    Raises:
        UserError: a prompt leaves no position for an answer.
    """
    num_rows = len(prompts) * num_samples_per_prompt
    assert all(prompts), "a prompt needs a token"
    assert sampling is None or len(sampling.keys) == num_rows
    if num_rows == 0:
        return Completions([], [], [] if with_logprobs else None)
    max_positions = model.config.max_positions
    if (longest := max(map(len, prompts))) >= max_positions:
        raise UserError(
            f"a prompt has {longest} tokens, but the model has only {max_positions} positions "
            "for prompt and answer: shorten the prompt, or train with larger max_positions."
        )

    max_new_tokens = min(max_new_tokens, max_positions)
    device = model.model.embed_tokens.weight.device
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    num_shared = num_alike(prompts) if share_prefix else 0
    cache = _Cache(prompt_lengths, num_samples_per_prompt, num_shared)
    lengths = prompt_lengths.repeat_interleave(num_samples_per_prompt)
    limits = (max_positions - lengths).clamp(max=max_new_tokens)
    ends = torch.tensor([end_id, *other_end_ids], device=device)
    uniforms = _uniforms(sampling, max_new_tokens, device) if sampling else None
    ids = torch.zeros(num_rows, max_new_tokens, dtype=torch.int64, device=device)
    logprobs = torch.zeros(num_rows, max_new_tokens, device=device)
    rows = torch.arange(num_rows, device=device)  # the rows in the batch
    running = torch.ones(num_rows, dtype=torch.bool, device=device)  # which of these still run

    # One region around all tokens, because autocast remembers the weights it has cast until its
    # region ends. In inference mode it would not remember them.
    with torch.no_grad(), autocast(device, dtype):
        own = chain.from_iterable(prompt[num_shared:] for prompt in prompts)
        prompt_ids = torch.tensor([*prompts[0][:num_shared], *own], device=device)
        positions = cache.in_prompt[:, num_shared:].nonzero()[:, 1] + num_shared
        positions = torch.cat((torch.arange(num_shared, device=device), positions))
        hidden = model.model(prompt_ids, positions, cache.attend_prompts)
        last = num_shared + cache.boundaries[1:] - 1
        hidden = hidden[last].repeat_interleave(num_samples_per_prompt, 0)
        for step in range(int(limits.max())):
            logits = model.logits(hidden)
            if sampling is None or uniforms is None:
                tokens = logits.argmax(-1)  # of a NaN, if there is one
                _require_in_bounds(logits.gather(-1, tokens[:, None]))
                probabilities = logits.softmax(-1) if with_logprobs else logits
            else:
                probabilities = (logits / sampling.temperature).softmax(-1)
                tokens = _draw(probabilities, uniforms[rows, step], sampling.top_p)
            ids[rows, step] = tokens
            if with_logprobs:
                logprobs[rows, step] = probabilities.gather(-1, tokens[:, None])[:, 0].log()

            running &= ~torch.isin(tokens, ends) & (step + 1 < limits[rows])
            num_running = int(running.sum())
            if num_running == 0:
                break
            if num_running <= (1 - FINISHED_SHARE) * len(rows):
                kept = _filled_up(running)
                cache.keep(kept)
                rows, tokens, running = rows[kept], tokens[kept], running[kept]
            cache.add_column()
            hidden = model.model(tokens, lengths[rows] + step, cache.attend)
    return _completions(ids, logprobs if with_logprobs else None, limits, ends)


class _Cache:
    """Keys and values of every layer: the prompts from the left, then a column for each token.

    `mask` is 0 where a row may look and minus infinity elsewhere: behind a prompt shorter than
    the longest, and in columns not yet in use.
    """

    def __init__(
        self, prompt_lengths: Tensor, num_samples_per_prompt: int, num_shared: int = 0
    ) -> None:
        """num_shared: tokens that all prompts begin with, and have more behind."""
        self.num_samples_per_prompt, self.num_shared = num_samples_per_prompt, num_shared
        self.num_columns = int(prompt_lengths.max())
        capacity = -(-self.num_columns // COLUMNS_AT_A_TIME) * COLUMNS_AT_A_TIME
        own_lengths = prompt_lengths - num_shared
        self.boundaries = F.pad(own_lengths.cumsum(0), (1, 0)).int()  # of what is not shared, [N+1]
        columns = torch.arange(capacity, device=prompt_lengths.device)
        self.in_prompt = columns < prompt_lengths[:, None]  # [N, L]
        mask = torch.zeros_like(self.in_prompt, dtype=torch.float32)
        mask.masked_fill_(~self.in_prompt, float("-inf"))
        self.mask = mask.repeat_interleave(num_samples_per_prompt, 0)[:, None, None]  # [B, 1, 1, L]
        self.keys: list[Tensor] = []  # [B, K, L, E] a layer
        self.values: list[Tensor] = []

    def attend_prompts(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention inside prompts laid end to end [T, .., E], whose keys and values are kept."""
        assert layer == len(self.keys)
        self.keys.append(self._rows(key))
        self.values.append(self._rows(value))
        if self.num_shared:
            return self._attend_after_shared(query, key, value)
        return packed_attention(query, key, value, self.boundaries, self.num_columns)

    def _attend_after_shared(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same of prompts without what they share, which stands before them once."""
        lengths = [self.num_shared, *self.boundaries.diff().tolist()]
        shared, *own = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
        outs = [_causal_attention(*shared)]
        for q, k, v in own:
            outs.append(_causal_attention(q, torch.cat((shared[1], k)), torch.cat((shared[2], v))))
        return torch.cat(outs)

    def _rows(self, packed: Tensor) -> Tensor:
        """[T, K, E] -> [B, K, L, E], each prompt from the left."""
        padded = packed.new_zeros(*self.in_prompt.shape, *packed.shape[1:])
        if n := self.num_shared:
            padded[:, :n] = packed[:n]
            padded[:, n:][self.in_prompt[:, n:]] = packed[n:]
        else:
            padded[self.in_prompt] = packed
        return padded.transpose(1, 2).repeat_interleave(self.num_samples_per_prompt, 0)

    def add_column(self) -> None:
        """Open the next column, in which `attend` then puts the new tokens' keys and values."""
        if self.num_columns == self.mask.shape[-1]:
            more = COLUMNS_AT_A_TIME
            self.mask = F.pad(self.mask, (0, more), value=float("-inf"))
            self.keys = [F.pad(key, (0, 0, 0, more)) for key in self.keys]
            self.values = [F.pad(value, (0, 0, 0, more)) for value in self.values]
        self.mask[..., self.num_columns] = 0
        self.num_columns += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one new token a row [B, .., E] to what is in the cache and to itself."""
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.num_columns - 1] = key
        values[:, :, self.num_columns - 1] = value
        grouped = query.unflatten(1, (keys.shape[1], -1))  # heads that share keys, at once
        scores = torch.matmul(grouped, keys.transpose(-1, -2))
        scores = torch.add(self.mask, scores, alpha=query.shape[-1] ** -0.5)  # float32
        weights = scores.softmax(-1).to(query.dtype)
        return torch.matmul(weights, values).flatten(1, 2)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these: bool [B]."""
        self.mask = self.mask[rows]
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]


def num_alike(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, and have more behind."""
    columns = zip(*(row[:-1] for row in rows), strict=False)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))


def _causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the last tokens [T, H, E] of a text to all of it, [S + T, K, E]."""
    num_before = len(key) - len(query)
    view = torch.ones(len(query), len(key), dtype=torch.bool, device=key.device).tril(num_before)
    q, k, v = (tensor.float().transpose(0, 1)[None] for tensor in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):  # it would round what is widened here
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=view, enable_gqa=True)
    return out[0].transpose(0, 1).to(query.dtype)


def _require_in_bounds(values: Tensor) -> None:
    if not values.isfinite().all():
        raise UserError(
            "the model's probabilities are no numbers: its weights are out of bounds; take a "
            "checkpoint from before they became so, or lower lr."
        )


def _uniforms(sampling: Sampling, num_tokens: int, device: torch.device) -> Tensor:
    """Numbers in (0, 1], float64 [B, tokens], that depend on (seed, row's key, token) alone."""
    streams = [
        np.random.Generator(np.random.Philox(key=[sampling.seed, row])) for row in sampling.keys
    ]
    uniforms = torch.from_numpy(np.stack([1 - stream.random(num_tokens) for stream in streams]))
    return uniforms.to(device, torch.float32 if device.type == "mps" else None)  # has no float64


def _draw(probabilities: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """A token a row, [B, V] -> [B], by inverting the cumulative distribution."""
    _require_in_bounds(probabilities[:, 0])  # softmax makes NaN of a whole row
    if top_p < 1:
        threshold = _nucleus_threshold(probabilities, top_p)
        probabilities = probabilities.where(probabilities >= threshold, 0)
    # First the block, then the token in it: float64 sums over the whole vocabulary take long.
    blocks = F.pad(probabilities, (0, -probabilities.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    block_ends = blocks.sum(-1, dtype=uniforms.dtype).cumsum(-1)
    sought = uniforms[:, None] * block_ends[:, -1:]
    block = torch.searchsorted(block_ends, sought)
    inside = blocks.take_along_dim(block[..., None], 1)[:, 0]
    ends = inside.cumsum(-1, dtype=uniforms.dtype)
    rest = sought - F.pad(block_ends, (1, 0)).gather(-1, block)
    # The first token at which the sum reaches a number above 0: never one of probability 0. Both
    # sums of a block may differ in their last bit.
    token = torch.searchsorted(ends, torch.minimum(rest, ends[:, -1:]))
    return (block * BLOCK + token)[:, 0]


def _nucleus_threshold(probabilities: Tensor, top_p: float) -> Tensor:
    """The least probability in the nucleus, [B, 1]: the fewest tokens that make up top_p.

    Tokens as likely as the last one all belong to it (arXiv:1904.09751, section 3.1, leaves
    that open). Sorting a whole vocabulary would take longer than the model.
    """
    num_largest = min(64, probabilities.shape[-1])
    while True:
        largest = probabilities.topk(num_largest).values
        before = largest.cumsum(-1) - largest
        if num_largest == probabilities.shape[-1] or (before[:, -1] >= top_p).all():
            break
        num_largest = min(8 * num_largest, probabilities.shape[-1])
    last = (before < top_p).sum(-1, keepdim=True) - 1
    return largest.gather(-1, last)


def _filled_up(running: Tensor) -> Tensor:
    """The running rows, and of the finished ones as many as are there up to a multiple of FILL."""
    finished = (~running).nonzero()[:, 0]
    kept = running.clone()
    kept[finished[: -int(running.sum()) % FILL]] = True
    return kept


def _completions(ids: Tensor, logprobs: Tensor | None, limits: Tensor, ends: Tensor) -> Completions:
    columns = torch.arange(ids.shape[1], device=ids.device)
    is_end = torch.isin(ids, ends) & (columns < limits[:, None])
    has_end = is_end.any(1)
    # Of several largest values argmax gives the first.
    lengths = torch.where(has_end, is_end.int().argmax(1) + 1, limits).tolist()
    finished = has_end.tolist()
    rows = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    if logprobs is None:
        return Completions(rows, finished, None)
    kept = [values[: len(row)] for values, row in zip(logprobs.tolist(), rows, strict=True)]
    return Completions(rows, finished, kept)
