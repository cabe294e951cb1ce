"""Text and chats as token ids, and which of those tokens a model is trained to predict.

What a chat's turns are, :mod:`minimind.chat.template` says.
Starts fast: needs ``tokenizers`` only, neither transformers nor torch.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import tokenizers

from minimind.chat.template import Message, turns
from minimind.errors import UserError

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (PAD, START, END)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# Class of a token: is it predicted in training, given the tokens before it?
CONTEXT, TRAINED, TAG = 0, 1, 2

_TAG_PATTERN = re.compile(f"({'|'.join(TAGS + TOOL_TAGS)})")


class EncodedRow(NamedTuple):
    """Token ids of one row, and the class of each: CONTEXT, TRAINED or TAG."""

    ids: list[int]
    loss_mask: bytes

    @property
    def num_trained(self) -> int:
        return len(self.loss_mask) - self.loss_mask.count(CONTEXT)


class ChatTokenizer:
    """Encodes documents and chats with any tokenizer that has the three control tokens.

    Header and text of a turn are encoded apart, so that white space never merges with the header,
    and control tokens written inside a content stay text. So are tags and the text between them: a
    tag's tokens are exactly the tag, also with a tokenizer that has no single token for it. With a
    tokenizer trained here the ids are those of the rendered template encoded as a whole.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # Encoded before special tokens become plain text: a foreign tag may be a special token.
        self._tag_ids = {tag: _encode(tokenizer, tag) for tag in TAGS + TOOL_TAGS}
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._newline_ids = _encode(tokenizer, "\n")
        self._header_ids: dict[str, list[int]] = {}
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.pad_id, self.start_id, self.end_id = (vocabulary[token] for token in CONTROL_TOKENS)
        self.vocab_size = max(vocabulary.values()) + 1  # rows an embedding needs

    @classmethod
    def load(cls, directory: Path | str) -> "ChatTokenizer":
        """Open the ``tokenizer.json`` of a tokenizer's or checkpoint's directory.

        Raises:
            UserError: it is missing or broken, or lacks one of the control tokens.
        """
        file = Path(directory) / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"{file} is missing; {directory} must be a tokenizer's or checkpoint's directory."
            )
        content = file.read_bytes()
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{file} cannot be read as a tokenizer: {error}.") from None
        special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
        if missing := [token for token in CONTROL_TOKENS if token not in special]:
            raise UserError(
                f"{file} has no special token {' '.join(missing)}; "
                f"a tokenizer must have {' '.join(CONTROL_TOKENS)}."
            )
        return cls(tokenizer)

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
        """Ids of plain text; control tokens written in it stay text."""
        return _encode(self._tokenizer, text)

    def encode_document(self, text: str) -> tuple[list[int], list[int]]:
        """Ids and loss mask of ``<|im_start|> text <|im_end|>``; all but the first are trained."""
        (row,) = self.encode_documents([text])
        return row.ids, list(row.loss_mask)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids and loss mask of a chat; its assistant turns are trained, ``<|im_end|>`` included."""
        (row,) = self.encode_chats([messages])
        return row.ids, list(row.loss_mask)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat so far and of the header that makes the assistant speak."""
        (row,) = self.encode_chats([messages])
        return row.ids + self._header("assistant")

    def encode_documents(self, texts: Sequence[str]) -> list[EncodedRow]:
        """:meth:`encode_document` of many, on all cores."""
        return [
            EncodedRow(
                [self.start_id, *ids, self.end_id], bytes([CONTEXT, *[TRAINED] * (len(ids) + 1)])
            )
            for ids in self._encode_batch(texts)
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
        texts = [piece for plan in plans for piece, _ in plan if isinstance(piece, str)]
        encoded = self._encode_batch(texts)
        rows = []
        for plan in plans:
            ids: list[int] = []
            loss_mask = bytearray()
            for piece, token_class in plan:
                piece_ids = next(encoded) if isinstance(piece, str) else piece
                ids += piece_ids
                loss_mask += bytes([token_class]) * len(piece_ids)
            rows.append(EncodedRow(ids, bytes(loss_mask)))
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids: tags are kept, control tokens dropped."""
        control = {self.pad_id, self.start_id, self.end_id}
        text_ids = [int(id) for id in ids if int(id) not in control]
        return str(self._tokenizer.decode(text_ids, skip_special_tokens=False))

    def _pieces(
        self, messages: Sequence[Message], num_context: int
    ) -> Iterator[tuple[str | list[int], int]]:
        """A chat as text still to encode, or ids, each with the class of its tokens."""
        for turn in turns(messages):
            is_trained = turn.role == "assistant" and turn.position >= num_context
            trained = TRAINED if is_trained else CONTEXT
            yield self._header(turn.role), CONTEXT
            for text in _TAG_PATTERN.split(turn.text):
                if text in self._tag_ids:
                    yield self._tag_ids[text], TAG if trained and text in TAGS else trained
                elif text:
                    yield text, trained
            yield [self.end_id], trained
            yield self._newline_ids, CONTEXT

    def _header(self, role: str) -> list[int]:
        if role not in self._header_ids:
            self._header_ids[role] = [self.start_id, *self.encode_text(f"{role}\n")]
        return self._header_ids[role]

    def _encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        # The fast variant leaves out offsets; it releases the GIL and uses all cores.
        batch = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return (encoding.ids for encoding in batch)


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
