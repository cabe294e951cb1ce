"""Makes the directory of a tokenizer: trained on the user's text, or taken over from elsewhere.

Apart from ``minimind/chat/tokenizer.py`` so that a change here does not retrain a model that was
given its tokenizer.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tokenizers
from pydantic import Field
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from minimind.chat.agreement import pieces_of_text, require_agreement
from minimind.chat.template import CHAT_TEMPLATE
from minimind.chat.tokenizer import (
    CONTROL_TOKENS,
    END,
    PAD,
    START,
    TAGS,
    TEMPLATE_FILE,
    TOOL_TAGS,
    ChatTokenizer,
    add_tokens,
    copy_tokenizer,
    read_tokenizer,
)
from minimind.errors import UserError
from minimind.files import replacing
from minimind.params import Section

SMALLEST_VOCAB = 256 + len(CONTROL_TOKENS) + len(TAGS + TOOL_TAGS)
"""One piece for every byte, so that any text can be encoded, and the tokens added by name."""


class TokenizerConfig(Section):
    """The section ``tokenizer``."""

    vocab_size: int = Field(ge=SMALLEST_VOCAB, le=2**24)  # of one that is trained here
    # Added to it, or to one that is adopted.
    extend: tuple[Annotated[str, Field(min_length=1)], ...] = ()


_ADDED_PATTERN = re.compile("|".join(map(re.escape, CONTROL_TOKENS + TAGS + TOOL_TAGS)))
_CHINESE = re.compile("[\u4e00-\u9fff]")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` pieces; fewer where the texts do not give more.

    Ids 0, 1, 2 are the control tokens, the last eight the tags. Digits are single pieces. A newline
    is one too: so a turn's header and content encode the same together and apart.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # Learned from text that is split at newlines besides, so that no piece holds one with something
    # else. Then the split makes no difference to encoding: what is left out below is never missed.
    newlines = pre_tokenizers.Split("\n", behavior="isolated")
    # And what no space ends, as base64, in parts: time grows with the square of their length.
    parts = pre_tokenizers.Split(Regex(".{1,1000}"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([newlines, *pieces_of_text(), parts])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS + TOOL_TAGS),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in CONTROL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Tokens added by name must not also be learned piece by piece.
    pieces = (piece for text in texts for piece in _ADDED_PATTERN.split(text))
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces_of_text())
    add_tokens(tokenizer, TAGS + TOOL_TAGS)
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, directory: Path | str) -> None:
    """Write a directory that transformers opens as ``PreTrainedTokenizerFast``."""
    config = {"clean_up_tokenization_spaces": False, "bos_token": START}
    with replacing(Path(directory)) as partial:
        partial.mkdir()
        tokenizer.save(str(partial / "tokenizer.json"))
        (partial / TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")
        _write_config(partial, config)


def adopt_tokenizer(source: Path, directory: Path, extend: Sequence[str] = ()) -> None:
    """Copy the files of an existing tokenizer; its chat template becomes ours.

    extend: tokens that it gets besides.

    Ours whatever it had: a checkpoint's template must be the one it was trained with.

    Raises:
        UserError: it lacks a control token that it is not to get, one of its files is broken, or
            transformers gives chats other ids.
    """
    name = f"{source / 'tokenizer.json'}"
    ChatTokenizer(read_tokenizer(source, extend), name)  # which changes what it is given
    config_file = source / "tokenizer_config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{config_file} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{config_file} must hold a JSON object.")
    with replacing(directory) as partial:
        partial.mkdir()
        if extend:  # the other files do not have the new tokens
            read_tokenizer(source, extend).save(str(partial / "tokenizer.json"))
            config = {k: v for k, v in config.items() if k != "added_tokens_decoder"}
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            (partial / TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")
        else:
            copy_tokenizer(source, partial)
        _write_config(partial, config)
        require_agreement(partial, source)


def measure_tokenizer(tokenizer: ChatTokenizer, texts: Iterable[str]) -> dict[str, int | float]:
    """Size of the vocabulary, and tokens per character in all and by language.

    A text with any Chinese character counts as Chinese (``zh``), every other as English (``en``).
    """
    num_tokens, num_characters = Counter[str](), Counter[str]()
    for text in texts:
        language = "zh" if _CHINESE.search(text) else "en"
        num_tokens[language] += len(tokenizer.encode_text(text))
        num_characters[language] += len(text)
    measured: dict[str, int | float] = {"vocab_size": tokenizer.vocab_size}
    if num_tokens:
        measured["tokens_per_character"] = num_tokens.total() / num_characters.total()
    for name in sorted(num_tokens):
        measured[f"tokens_per_character_{name}"] = num_tokens[name] / num_characters[name]
    return measured


def _write_config(directory: Path, config: dict[str, Any]) -> None:
    # transformers 5 writes TokenizersBackend, which transformers 4 refuses.
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config |= {"pad_token": PAD, "eos_token": END, "chat_template": CHAT_TEMPLATE}
    content = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    (directory / "tokenizer_config.json").write_text(content, encoding="utf-8")
