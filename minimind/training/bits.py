"""How well a model predicts, in a unit that does not depend on the tokenizer."""

import math

import numpy as np

from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.batches import count
from minimind.datasets.encoded import EncodedDataset
from minimind.metrics import Number
from minimind.training.fit import FitConfig, split
from minimind.training.session import History

NEGATIVE_LOG_LIKELIHOODS = ("nll", "ce")  # what objectives call it; their loss may weigh tokens


def bits_per_byte(
    history: History, dataset: EncodedDataset, config: FitConfig, tokenizer: ChatTokenizer
) -> dict[str, Number]:
    """{"bits_per_byte": ..} of the rows that `fit` held out, or {} if there are none.

    This is -log2 of the probability of all their trained tokens, end tokens included, over the
    number of UTF-8 bytes of the text that these tokens spell (arXiv:2101.00027, section 3.1).
    """
    _, held_out = split(dataset, config)
    means = [history.validation[n] for n in NEGATIVE_LOG_LIKELIHOODS if n in history.validation]
    if not means:
        return {}
    # All pieces of a text are decoded together: one may end in the middle of a character.
    sources = np.searchsorted(dataset.sources, held_out, side="right")
    num_bytes = 0
    for samples in np.split(held_out, np.flatnonzero(np.diff(sources)) + 1):
        ids = [dataset.row(int(row))[0][dataset.row(int(row))[1] > 0] for row in samples]
        num_bytes += len(tokenizer.decode(np.concatenate(ids)).encode())
    if not num_bytes:
        return {}
    return {"bits_per_byte": means[0] * count(dataset, held_out).tokens / math.log(2) / num_bytes}
