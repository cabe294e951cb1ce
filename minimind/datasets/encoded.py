"""An encoded data set: flat arrays on disk, opened without reading them.

tokens.bin           uint16 or uint32, the ids of all rows end to end
loss_mask.bin          uint8 for each token: 0 context, 1 trained, 2 trained and part of a tag
offsets.bin          int64 [rows + 1], row r is tokens[offsets[r]:offsets[r + 1]]
trained_offsets.bin  int64 [rows + 1], trained tokens before each row
sources.bin          int64 [sources + 1], samples before each row of the source, which became the
                     samples sources[s] up to sources[s + 1]: pieces of a text, a chat and its
                     variations, or one
meta.json            the sizes of these, the row format and the tokenizer's fingerprint
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError

from minimind.chat.tokenizer import TAG, ChatTokenizer, EncodedRow
from minimind.errors import UserError

ROWS_AT_A_TIME = 2**16  # of a check: bounds its memory


class _Meta(BaseModel, strict=True):
    """meta.json."""

    format: str
    rows: PositiveInt
    sources: PositiveInt
    tokens: int
    trained_tokens: int
    token_dtype: Literal["uint16", "uint32"]
    rows_per_sample: int = Field(ge=1, le=2)
    tokenizer: str
    max_length: int
    copies: NonNegativeInt = 0


@dataclass(frozen=True)
class EncodedDataset:
    """Rows of token ids and loss mask; the arrays are read-only and mapped from disk."""

    directory: Path  # how messages name it
    format: str  # "text", "chat" or "preference"
    rows: int
    num_sources: int  # rows of the source that became these
    rows_per_sample: int  # 2 for preference pairs: chosen, rejected, chosen, ...
    max_length: int
    copies: int  # variations that follow the original among the samples of a source row
    tokenizer: str  # fingerprint of the tokenizer that encoded it
    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    loss_mask: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    trained_offsets: NDArray[np.int64]
    sources: NDArray[np.int64]

    @classmethod
    def open(cls, directory: Path) -> "EncodedDataset":
        """Map the arrays of a data set.

        Raises:
            UserError: a file is missing or of another size than meta.json says, or they disagree.
        """
        meta = _read_meta(directory / "meta.json")
        dataset = cls(
            directory=directory,
            format=meta.format,
            rows=meta.rows,
            num_sources=meta.sources,
            rows_per_sample=meta.rows_per_sample,
            max_length=meta.max_length,
            copies=meta.copies,
            tokenizer=meta.tokenizer,
            tokens=_map(directory / "tokens.bin", meta.token_dtype, meta.tokens),
            loss_mask=_map(directory / "loss_mask.bin", "uint8", meta.tokens),
            offsets=_map(directory / "offsets.bin", "int64", meta.rows + 1),
            trained_offsets=_map(directory / "trained_offsets.bin", "int64", meta.rows + 1),
            sources=_map(directory / "sources.bin", "int64", meta.sources + 1),
        )
        ends = [int(dataset.offsets[-1]), int(dataset.trained_offsets[-1])]
        if ends != [meta.tokens, meta.trained_tokens]:
            raise UserError(f"{directory} does not agree with its meta.json; encode it again.")
        dataset._check_rows()
        return dataset

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[EncodedRow],
        tokenizer: ChatTokenizer,
        row_format: Literal["text", "chat", "preference"] = "chat",
        max_length: int | None = None,
    ) -> "EncodedDataset":
        """A data set in memory.

        rows: as `tokenizer.encode_chats` or `encode_documents` gives them; of preference pairs the
            chosen row, then the rejected one.
        max_length: tokens that a row is cut to.

        Raises:
            UserError: there are no rows, or one has no token to train on.
        """
        cut = [EncodedRow(row.ids[:max_length], row.loss_mask[:max_length]) for row in rows]
        rows_per_sample = 2 if row_format == "preference" else 1
        if not cut or len(cut) % rows_per_sample:
            raise UserError(
                f"{len(cut)} rows are no samples of {rows_per_sample}; give one or more."
            )
        if untrained := [number for number, row in enumerate(cut) if not row.num_trained]:
            raise UserError(
                f"row {untrained[0]} has no token to train on; leave it out, or raise max_length."
            )
        lengths, trained = [len(row.ids) for row in cut], [row.num_trained for row in cut]
        num_samples = len(cut) // rows_per_sample
        ids = np.concatenate([np.asarray(row.ids) for row in cut])
        return cls(
            directory=Path("rows in memory"),
            format=row_format,
            rows=len(cut),
            num_sources=num_samples,
            rows_per_sample=rows_per_sample,
            max_length=max_length or max(lengths),
            copies=0,
            tokenizer=tokenizer.fingerprint,
            tokens=ids.astype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32"),
            loss_mask=np.frombuffer(b"".join(row.loss_mask for row in cut), dtype=np.uint8),
            offsets=np.cumsum([0, *lengths], dtype=np.int64),
            trained_offsets=np.cumsum([0, *trained], dtype=np.int64),
            sources=np.arange(num_samples + 1, dtype=np.int64),
        )

    @property
    def num_samples(self) -> int:
        """What training draws from: rows, or pairs of them."""
        return self.rows // self.rows_per_sample

    def row(self, index: int) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.uint8]]:
        """Ids and loss mask of one row, as views."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.loss_mask[span]

    def check_tokenizer_of(self, checkpoint: Path) -> None:
        """Raise UserError unless the tokenizer of ``checkpoint`` is the one that encoded this."""
        tokenizer = ChatTokenizer.load(checkpoint)
        if tokenizer.fingerprint != self.tokenizer:
            raise UserError(
                f"{self.directory} was encoded with another tokenizer than that of {checkpoint}; "
                "encode it with the tokenizer of the checkpoint."
            )
        if (largest := int(self.tokens.max())) >= tokenizer.vocab_size:
            raise UserError(
                f"{self.directory / 'tokens.bin'} has the token {largest}, but the tokenizer only "
                f"{tokenizer.vocab_size} of them; encode the data set again."
            )

    def check_format(self, *allowed: str) -> None:
        """Raise UserError unless the rows are of one of these formats."""
        if self.format not in allowed:
            raise UserError(
                f"{self.directory} has rows of format {self.format}, but this stage learns from "
                f"{' or '.join(allowed)}; give it another data set."
            )

    def check_positions(self, max_positions: int, model: str = "the model") -> None:
        """Raise UserError where a row is longer than the model has positions."""
        longest = int(np.diff(self.offsets).max())
        if longest > max_positions:
            raise UserError(
                f"{self.directory} has a row of {longest} tokens, but {model} has max_positions "
                f"{max_positions}; encode it with a max_length of at most {max_positions}, or "
                "take a model with more positions."
            )

    def _check_rows(self) -> None:
        """Each source row has a sample, each row a token, and as many trained as indexed."""
        damaged = UserError(f"{self.directory} contradicts itself; encode it again.")
        if (
            self.offsets[0]
            or self.trained_offsets[0]
            or self.sources[0]
            or (self.offsets[1:] <= self.offsets[:-1]).any()
            or (self.sources[1:] <= self.sources[:-1]).any()
            or (np.diff(self.sources) % (1 + self.copies)).any()
            or self.sources[-1] != self.num_samples
            or self.rows % self.rows_per_sample
            or self.loss_mask.max() > TAG
        ):
            raise damaged
        for start in range(0, self.rows, ROWS_AT_A_TIME):
            bounds = self.offsets[start : start + ROWS_AT_A_TIME + 1]
            trained = self.loss_mask[bounds[0] : bounds[-1]] > 0
            starts = bounds[:-1] - bounds[0]
            counts = np.add.reduceat(trained, starts, dtype=np.int64)
            index = self.trained_offsets[start : start + ROWS_AT_A_TIME + 1]
            if trained[starts].any() or (counts != np.diff(index)).any():
                raise damaged  # a row's first token has nothing to be predicted from


def _read_meta(file: Path) -> _Meta:
    if not file.is_file():
        raise UserError(f"{file} is missing; {file.parent} must be written by the encode stage.")
    try:
        meta = _Meta.model_validate_json(file.read_bytes())
    except ValidationError:
        meta = None
    if meta is None or not meta.sources <= meta.rows <= meta.tokens:
        raise UserError(f"{file} is damaged; encode the data set again.")
    return meta


def _map(file: Path, dtype: str, length: int) -> NDArray[Any]:
    if not file.is_file():
        raise UserError(f"{file} is missing; encode the data set again.")
    expected, found = length * np.dtype(dtype).itemsize, file.stat().st_size
    if found != expected:
        raise UserError(
            f"{file} has {found} bytes, but meta.json calls for {expected}; "
            "encode the data set again."
        )
    # As a plain array: slices of a memmap object are slower to make.
    return np.asarray(np.memmap(file, dtype=dtype, mode="r"))
