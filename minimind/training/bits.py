"""How well a model predicts, in a unit that does not depend on the tokenizer."""

import math

import numpy as np

from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.batches import count
from minimind.datasets.encoded import EncodedDataset
from minimind.metrics import Number
from minimind.training.fit import FitConfig, split
from minimind.training.session import History


def bits_per_byte(
    history: History, dataset: EncodedDataset, config: FitConfig, tokenizer: ChatTokenizer
) -> dict[str, Number]:
    """{"bits_per_byte": ..} of the rows that `fit` held out, or {} if there are none.

    This is -log2 of the probability of all their trained tokens, end tokens included, over the
    number of UTF-8 bytes of the text that these tokens spell (arXiv:2101.00027, section 3.1).
    """
    _, held_out = split(dataset, config)
    # As objectives call the negative log-likelihood; their loss may weigh tokens.
    mean = history.validation.get("nll", history.validation.get("ce"))
    if mean is None:
        return {}
    # All pieces of a text are decoded together: one may end in the middle of a character.
    sources = np.searchsorted(dataset.sources, held_out, side="right")
    num_bytes = 0
    for samples in np.split(held_out, np.flatnonzero(np.diff(sources)) + 1):
        ids = [ids[mask > 0] for ids, mask in map(dataset.row, samples)]
        num_bytes += len(tokenizer.decode(np.concatenate(ids)).encode())
    if not num_bytes:
        return {}
    return {"bits_per_byte": mean * count(dataset, held_out).tokens / math.log(2) / num_bytes}
