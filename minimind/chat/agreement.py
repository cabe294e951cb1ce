"""Whether transformers gives chats the ids that they are trained with."""

from pathlib import Path

from minimind.chat.template import CHAT_TEMPLATE
from minimind.chat.tokenizer import TAGS, TEMPLATE_FILE, TOOL_TAGS, ChatTokenizer
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
    tags = [tag for tag in TAGS + TOOL_TAGS if tag in ours.added_tags]
    tagged = {"content": "".join(f"x{tag}\n y {tag}" for tag in tags)}
    chats = [*CHATS, [{"role": role} | tagged for role in ("user", "assistant")]]
    try:
        theirs = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        expected = [
            theirs.apply_chat_template(
                [*chat], chat_template=CHAT_TEMPLATE, add_generation_prompt=True, return_dict=True
            )["input_ids"]
            for chat in chats
        ]
    except Exception as error:  # transformers raises whatever its parts raise
        raise UserError(
            f"{name}: transformers cannot encode a chat with this tokenizer: {error!r}; "
            "take another one."
        ) from None
    for chat, wanted in zip(chats, expected, strict=True):
        found = ours.encode_prompt(chat)
        if found != wanted:
            place = next(n for n in range(len(wanted) + 1) if found[: n + 1] != wanted[: n + 1])
            shown = [
                " ".join(
                    map(repr, theirs.convert_ids_to_tokens(ids[max(0, place - 2) : place + 4]))
                )
                for ids in (wanted, found)
            ]
            raise UserError(
                f"{name}: transformers encodes a chat of this tokenizer as {shown[0]}, "
                f"training would as {shown[1]}; take another tokenizer, or, if it is only that "
                "transformers does not read its tokenizer.json, write PreTrainedTokenizerFast as "
                "tokenizer_class into its tokenizer_config.json."
            )
