"""Text and chats as token ids, and which of those tokens a model is trained to predict.

What a chat's turns are, :mod:`minimind.chat.template` says.
Starts fast: needs ``tokenizers`` only, neither transformers nor torch.
"""

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from minimind.chat.template import CHAT_TEMPLATE, THOUGHT_BEGUN, Message, turns
from minimind.errors import UserError

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (PAD, START, END)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

TEMPLATE_FILE = "chat_template.jinja"
# Of a directory that may hold a model too.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)

# Class of a token: is it predicted in training, given the tokens before it?
CONTEXT, TRAINED, TAG = 0, 1, 2

_TAG_PATTERN = re.compile(f"({'|'.join(TAGS + TOOL_TAGS)})")
# What some tokenizers put before a text, as attributes of their normalizers and pre-tokenizers.
_PREFIXES = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}


class EncodedRow(NamedTuple):
    """Token ids of one row, and the class of each: CONTEXT, TRAINED or TAG."""

    ids: list[int]
    loss_mask: bytes

    @property
    def num_trained(self) -> int:
        return len(self.loss_mask) - self.loss_mask.count(CONTEXT)


class ChatTokenizer:
    """Encodes documents and chats with any tokenizer that has the three control tokens.

    The ids are those of the rendered template encoded as a whole, but that control tokens written
    inside a content stay text, and an assistant's turns are encoded in parts: the header apart, as
    in a prompt, and tags apart, so that a tag's tokens are exactly the tag, also with a tokenizer
    that has no single token for it. With a tokenizer trained here this makes no difference.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, name: str = "the tokenizer") -> None:
        """name: how messages name it.

        Raises:
            UserError: it lacks a control token, or cannot encode a tag or header.
        """
        self._name = name
        tokenizer.no_padding()
        tokenizer.no_truncation()
        for part in _parts(tokenizer.normalizer, tokenizer.pre_tokenizer):
            # At the beginning of a whole text, where there is always a control token.
            if getattr(part, "prepend_scheme", None) == "first":
                part.prepend_scheme = "never"
        # Two tokenizers: for text behind a single token, and for text that goes on behind other
        # text, before which nothing may be put. Few put anything, and need a second one.
        self._tokenizer = self._within = tokenizer
        if any(map(_prefixes, _parts(tokenizer.normalizer, tokenizer.pre_tokenizer))):
            self._within = copy.deepcopy(tokenizer)
            for part in _parts(self._within.normalizer, self._within.pre_tokenizer):
                for prefix in _prefixes(part):
                    setattr(part, prefix, _PREFIXES[prefix])
        # Encoded before special tokens become plain text: a foreign tag may be a special token.
        self._tag_ids = {tag: self._encode(tag, self._within) for tag in TAGS + TOOL_TAGS}
        # Tags that split any text, whoever encodes it.
        added = {token.content: token.special for token in _added_tokens(tokenizer)}
        if missing := [token for token in CONTROL_TOKENS if not added.get(token)]:
            raise UserError(
                f"{name} has no special token {' '.join(missing)}; a tokenizer must have "
                f"{' '.join(CONTROL_TOKENS)}: tokenizer.extend adds them (docs/models.md)."
            )
        self.added_tags = {tag for tag in self._tag_ids if tag in added}
        self._added_pattern = re.compile(f"({'|'.join(sorted(self.added_tags)) or '(?!)'})")
        self._tokenizer.encode_special_tokens = self._within.encode_special_tokens = True
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.pad_id, self.start_id, self.end_id = (vocabulary[token] for token in CONTROL_TOKENS)
        self._newline_ids = self.encode_text("\n")
        self._spoken_ids = [self.start_id, *self.encode_text("assistant\n")]
        self.vocab_size = num_tokens(tokenizer)

    @classmethod
    def load(cls, directory: Path | str) -> "ChatTokenizer":
        """Open the ``tokenizer.json`` of a tokenizer's or checkpoint's directory.

        Raises:
            UserError: it is missing or broken, lacks one of the control tokens, or cannot encode
                a tag or header.
        """
        return cls(read_tokenizer(directory), f"{Path(directory) / 'tokenizer.json'}")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of vocabulary, merges and added tokens: equal for tokenizers that encode alike."""
        content = json.loads(self._tokenizer.to_str())
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        identity = [
            sorted((id, token) for token, id in vocabulary.items()),
            content["model"].get("merges"),
            sorted((token["id"], token["content"]) for token in content["added_tokens"]),
        ]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text behind a control token; control tokens written in it stay text.

        Raises:
            UserError: the tokenizer has nothing for a part of it.
        """
        return self._encode(text, self._tokenizer)

    def encode_document(self, text: str) -> tuple[list[int], list[int]]:
        """Ids and loss mask of ``<|im_start|> text <|im_end|>``; all but the first are trained."""
        (row,) = self.encode_documents([text])
        return row.ids, list(row.loss_mask)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids and loss mask of a chat; its assistant turns are trained, ``<|im_end|>`` included."""
        (row,) = self.encode_chats([messages])
        return row.ids, list(row.loss_mask)

    def encode_prompt(
        self, messages: Sequence[Message], open_thinking: bool | None = None
    ) -> list[int]:
        """Ids of a chat so far and of the header that makes the assistant speak.

        open_thinking: as in :data:`minimind.chat.template.CHAT_TEMPLATE`.
        """
        begun: Message = {"role": "assistant", "content": THOUGHT_BEGUN[open_thinking]}
        (row,) = self.encode_chats([[*messages, begun]])
        return row.ids[: -1 - len(self._newline_ids)]  # without what ends a turn

    def encode_documents(self, texts: Sequence[str]) -> list[EncodedRow]:
        """:meth:`encode_document` of many, on all cores."""
        return [
            EncodedRow(
                [self.start_id, *ids, self.end_id], bytes([CONTEXT, *[TRAINED] * (len(ids) + 1)])
            )
            for ids in self._encode_batch(texts, self._tokenizer)
        ]

    def encode_chats(
        self, chats: Sequence[Sequence[Message]], num_context: Sequence[int] | None = None
    ) -> list[EncodedRow]:
        """:meth:`encode_chat` of many, on all cores.

        Args:
            num_context: for each chat the number of first messages that are not trained, whatever
                their role (the shared prompt of a preference pair).
        """
        plans = [
            list(self._pieces(chat, n))
            for chat, n in zip(chats, num_context or [0] * len(chats), strict=True)
        ]
        pieces = [piece for plan in plans for piece in plan]
        encoded = [
            self._encode_batch(
                [p.content for p in pieces if p.goes_on is goes_on and isinstance(p.content, str)],
                tokenizer,
            )
            for goes_on, tokenizer in ((False, self._tokenizer), (True, self._within))
        ]
        rows = []
        for plan in plans:
            ids: list[int] = []
            loss_mask = bytearray()
            for content, token_class, goes_on in plan:
                piece_ids = next(encoded[goes_on]) if isinstance(content, str) else content
                ids += piece_ids
                loss_mask += bytes([token_class]) * len(piece_ids)
            rows.append(EncodedRow(ids, bytes(loss_mask)))
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids: tags are kept, control tokens dropped."""
        control = {self.pad_id, self.start_id, self.end_id}
        text_ids = [int(id) for id in ids if int(id) not in control]
        return str(self._tokenizer.decode(text_ids, skip_special_tokens=False))

    def _pieces(self, messages: Sequence[Message], num_context: int) -> Iterator["_Piece"]:
        for turn in turns(messages):
            is_trained = turn.role == "assistant" and turn.position >= num_context
            is_trained &= messages[turn.position].get("loss", True)
            trained = TRAINED if is_trained else CONTEXT
            # An answer is generated behind its header, and all of its tags are tokens of their own.
            goes_on = spoken = turn.role == "assistant"
            yield _Piece(self._spoken_ids if spoken else [self.start_id], CONTEXT)
            text = turn.text if spoken else f"{turn.role}\n{turn.text}"
            pattern = _TAG_PATTERN if spoken else self._added_pattern
            for number, part in enumerate(pattern.split(text)):
                if number % 2:  # a tag
                    token_class = TAG if trained and part in TAGS else trained
                    yield _Piece(self._tag_ids[part], token_class)
                    goes_on = part not in self.added_tags
                elif part:
                    yield _Piece(part, trained, goes_on)
            yield _Piece([self.end_id], trained)
            yield _Piece(self._newline_ids, CONTEXT)

    def _encode(self, text: str, tokenizer: tokenizers.Tokenizer) -> list[int]:
        try:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(
                f"{self._name} cannot encode {text[:60]!r}: {error}; take a tokenizer with byte "
                "fallback, or with an unknown token that is in its vocabulary."
            ) from None

    def _encode_batch(
        self, texts: Sequence[str], tokenizer: tokenizers.Tokenizer
    ) -> Iterator[list[int]]:
        try:
            # The fast variant leaves out offsets; it releases the GIL and uses all cores.
            batch = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception:  # one by one: the first that cannot be encoded is named
            return iter([self._encode(text, tokenizer) for text in texts])
        return (encoding.ids for encoding in batch)


def read_tokenizer(directory: Path | str, extend: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """The ``tokenizer.json`` of a directory, whatever its control tokens, and tokens added to it.

    Raises:
        UserError: it is missing or broken.
    """
    file = Path(directory) / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{file} is missing; {directory} must be a tokenizer's or checkpoint's directory."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(file.read_bytes())
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file} cannot be read as a tokenizer: {error}.") from None
    add_tokens(tokenizer, extend)
    return tokenizer


def add_tokens(tokenizer: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Tokens that a tokenizer does not have yet; of these, control tokens alone are special.

    Special ones vanish from text decoded with ``skip_special_tokens=True``.
    """
    there = {token.content for token in _added_tokens(tokenizer) if token.special}
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, special=token in CONTROL_TOKENS, normalized=False)
            for token in tokens
            if token not in there
        ]
    )


def _added_tokens(tokenizer: tokenizers.Tokenizer) -> list[tokenizers.AddedToken]:
    return [*tokenizer.get_added_tokens_decoder().values()]


def num_tokens(tokenizer: tokenizers.Tokenizer) -> int:
    """Rows that an embedding needs."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy a tokenizer's files, but for its template: ours, by which all chats are encoded."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            # Contents only: DVC makes files of its cache read-only.
            shutil.copyfile(source / name, directory / name)
    (directory / TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")


class _Piece(NamedTuple):
    """A part of a chat."""

    content: str | list[int]  # text still to encode, or ids
    token_class: int
    goes_on: bool = False  # behind other text, not a single token


def _parts(*components: Any) -> list[Any]:
    """Normalizers and pre-tokenizers, one by one: what can be indexed is a Sequence of them."""
    nested = (_parts(*part) if hasattr(part, "__getitem__") else [part] for part in components)
    return [part for parts in nested for part in parts]


def _prefixes(part: Any) -> list[str]:
    return [name for name, none in _PREFIXES.items() if getattr(part, name, none) != none]
