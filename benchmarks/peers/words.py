"""A tokenizer for peers that insist on one: a token's text is its number."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast


def words_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    vocabulary = {str(number): number for number in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="0", bos_token="1", eos_token="2"
    )
