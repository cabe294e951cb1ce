"""Whether transformers gives chats the ids that they are trained with."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from minimind.chat.template import CHAT_TEMPLATE
from minimind.chat.tokenizer import TAGS, TEMPLATE_FILE, TOOL_TAGS, ChatTokenizer, read_tokenizer
from minimind.errors import UserError

# White space where tokenizers put, drop or merge some; not at an answer's beginning, which merges
# with its header where a text is encoded as a whole, but never where it is generated.
CHATS = (
    (
        {"role": "system", "content": "  Be brief.\n"},
        {"role": "user", "content": " How many\tapples?  12 + 3"},
        {"role": "assistant", "content": "15 apples.\n\n"},
        {"role": "user", "content": "\n\n  def f(x):\n    return x\n"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "x"},
    ),
    ({"role": "user", "content": ""}, {"role": "assistant", "content": "Yes"}),
    (
        {"role": "user", "content": "小明有3盒苹果， 每盒4个。现在有多少个苹果？"},
        {"role": "assistant", "content": "现在有12个。😀 Très bien ﬁn"},
        {"role": "user", "content": "ありがとう 1,000½"},
    ),
)


def is_asked_by_our_template(directory: Path) -> bool:
    """Whether a tokenizer's directory is one that a stage has written."""
    template = directory / TEMPLATE_FILE
    return template.is_file() and template.read_bytes() == CHAT_TEMPLATE.encode()


def pieces_of_text() -> list[pre_tokenizers.PreTokenizer]:
    """How a tokenizer that is trained here divides texts: as SmolLM's, llama.cpp's "smollm"."""
    return [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]


def is_as_trained(directory: Path) -> bool:
    """Whether a tokenizer does with text what one does that is trained here, whatever its pieces.

    If so, parts of a chat are encoded together as they are apart.
    """
    ours = tokenizers.Tokenizer(models.BPE())
    ours.pre_tokenizer = pre_tokenizers.Sequence(pieces_of_text())
    try:
        found = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        if any(token["lstrip"] or token["rstrip"] for token in found["added_tokens"]):
            return False
        return _without_pieces(found) == _without_pieces(json.loads(ours.to_str()))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _without_pieces(tokenizer: dict[str, Any]) -> dict[str, Any]:
    model = {**tokenizer["model"], "vocab": {}, "merges": []}
    return {**tokenizer, "model": model, "added_tokens": [], "decoder": None}


def require_agreement(directory: Path, name: Path) -> None:
    """Encode chats as in training, and with transformers by our template.

    name: of the tokenizer, in messages.

    Raises:
        UserError: the ids differ, or transformers cannot read the tokenizer; the message has the
            first difference.
    """
    from transformers import AutoTokenizer  # takes seconds, and few need it
    from transformers.utils import logging

    logging.set_verbosity_error()  # what is wrong is said in one line
    ours = ChatTokenizer.load(directory)
    if dropout := getattr(read_tokenizer(directory).model, "dropout", None):
        raise UserError(
            f"{name}: its dropout is {dropout}, which leaves merges out at random: no text is "
            "encoded the same twice; set it to null in tokenizer.json."
        )
    tags = [tag for tag in TAGS + TOOL_TAGS if tag in ours.added_tags]
    tagged = {"content": "".join(f"x{tag}\n y {tag}" for tag in tags)}
    chats = [*CHATS, [{"role": role} | tagged for role in ("user", "assistant")]]
    try:
        with _without_last_words():
            found = [ours.encode_prompt(chat) for chat in chats]
            theirs = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            expected = [
                theirs.apply_chat_template(
                    [*chat],
                    chat_template=CHAT_TEMPLATE,
                    add_generation_prompt=True,
                    return_dict=True,
                )["input_ids"]
                for chat in chats
            ]
    except UserError:
        raise
    except BaseException as error:  # transformers raises whatever its parts raise
        is_of_rust = type(error).__name__ == "PanicException"  # which is no Exception
        if not isinstance(error, Exception) and not is_of_rust:
            raise
        raise UserError(
            f"{name}: transformers cannot encode a chat with this tokenizer: {error!r}; "
            "take another one."
        ) from None
    for own, wanted in zip(found, expected, strict=True):
        if own != wanted:
            place = next(n for n in range(len(wanted) + 1) if own[: n + 1] != wanted[: n + 1])
            shown = [
                " ".join(
                    map(repr, theirs.convert_ids_to_tokens(ids[max(0, place - 2) : place + 4]))
                )
                for ids in (wanted, own)
            ]
            raise UserError(
                f"{name}: transformers encodes a chat of this tokenizer as {shown[0]}, "
                f"training would as {shown[1]}; take another tokenizer, or, if it is only that "
                "transformers does not read its tokenizer.json, write PreTrainedTokenizerFast as "
                "tokenizer_class into its tokenizer_config.json."
            )


@contextmanager
def _without_last_words() -> Iterator[None]:
    """Rust tells where it panics, past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
