"""A model's answer token by token, with what else it might have said.

Shapes: T new tokens, L tokens in all, H query heads, K key/value heads, E head size, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.errors import UserError
from minimind.model.transformer import Transformer

AT_A_TIME = 512  # tokens of a prompt, between which one may stop
ROOM = 256  # columns by which the cache grows


class Token(NamedTuple):
    """A token, and natural logarithms of probabilities: at temperature 1, over the vocabulary."""

    id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]  # the likeliest tokens, be it among them or not


class Stream:
    """A model and its cache of one text; of a prompt that goes on from it only the rest is read."""

    def __init__(self, model: Transformer) -> None:
        self.model = model.eval()
        config = model.config
        self._ids: list[int] = []  # in the cache
        weight = model.model.embed_tokens.weight
        shape = config.num_layers, 2, config.num_kv_heads, 0, config.head_size
        self._cache = weight.new_empty(shape)  # keys and values: [layers, 2, K, L, E]

    def tokens(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        end_ids: Collection[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 1,
        num_alternatives: int = 5,
    ) -> Iterator[Token]:
        """What follows a prompt: the likeliest token each time, or drawn above temperature 0.

        Ends with an end token, after `max_new_tokens`, or where the model's positions are full.

        Raises:
            UserError: the prompt leaves no position, or the model's weights are out of bounds.
        """
        positions = self.model.config.max_positions
        if not 0 < len(prompt) < positions:
            raise UserError(
                f"the conversation has {len(prompt):,} tokens, the model {positions:,} positions "
                "for it and the answer."
            )
        known = zip(self._ids, prompt[:-1], strict=False)
        kept = next((n for n, (old, new) in enumerate(known) if old != new), len(prompt) - 1)
        self._ids = self._ids[:kept]
        for start in range(len(self._ids), len(prompt), AT_A_TIME):
            logits = self._read(prompt[start : start + AT_A_TIME])
        generator = torch.Generator().manual_seed(seed)
        limit = min(max_new_tokens, positions - len(prompt))
        for number in range(1, limit + 1):
            logprobs = logits.log_softmax(-1)
            likeliest = logprobs.topk(min(num_alternatives, len(logprobs)))
            if temperature:
                id_ = _drawn((logits / temperature).softmax(-1), top_p, generator)
            else:
                id_ = int(logits.argmax())
            best = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            yield Token(id_, float(logprobs[id_]), tuple(best))
            if id_ in end_ids:
                return
            if number < limit:
                logits = self._read([id_])

    @torch.no_grad()
    def _read(self, ids: Sequence[int]) -> Tensor:
        """Logits [V], on the CPU, of what follows the text so far and these."""
        start, end = len(self._ids), len(self._ids) + len(ids)
        if (missing := end - self._cache.shape[3]) > 0:
            self._cache = F.pad(self._cache, (0, 0, 0, -(-missing // ROOM) * ROOM))
        device = self._cache.device
        positions = torch.arange(start, end, device=device)
        seen = torch.arange(end, device=device) <= positions[:, None]  # [T, L]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._cache[layer, :, :, start:end] = torch.stack((key, value)).transpose(1, 2)
            keys, values = self._cache[layer, :, :, :end]
            queries = query.transpose(0, 1)[None]
            attended = F.scaled_dot_product_attention(
                queries, keys[None], values[None], attn_mask=seen, enable_gqa=True
            )
            return attended[0].transpose(0, 1)

        hidden = self.model.model(torch.tensor(ids, device=device), positions, attend)
        logits = self.model.logits(hidden[-1]).cpu()
        if not logits.isfinite().all():
            raise UserError(
                "the model's logits are no numbers: its weights are out of bounds; take a "
                "checkpoint from before they became so."
            )
        self._ids += ids  # at last: who stops before has read nothing
        return logits


def _drawn(probabilities: Tensor, top_p: float, generator: torch.Generator) -> int:
    """One of the fewest tokens that make up top_p (arXiv:1904.09751, section 3.1)."""
    values, order = probabilities.sort(descending=True)
    if top_p < 1:
        values[values.cumsum(0) - values >= top_p] = 0
    return int(order[torch.multinomial(values, 1, generator=generator)])
