"""A tokenizer for peers that insist on one: a token's text is its number."""

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from benchmarks.material import END, PAD, START

# Not their numbers: a special token is found anywhere, also inside of other numbers.
SPECIAL = {PAD: "<pad>", START: "<start>", END: "<end>"}


def words_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    vocabulary = {_word(number): number for number in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL[PAD]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[START],
        eos_token=SPECIAL[END],
    )


def words(ids: Iterable[int]) -> str:
    """The text that the tokenizer makes these tokens of."""
    return " ".join(map(_word, ids))


def _word(token: int) -> str:
    return SPECIAL.get(token, str(token))
