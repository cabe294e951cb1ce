"""JSONL to arrays on disk, as a stream: memory does not grow with the data.

A text longer than ``max_length`` tokens is split into several rows, so that none of it is lost.
Chats and preferences are cut at their end: a turn without what it answers teaches nothing.
A chat may be followed by variations of itself (:mod:`minimind.datasets.augment`).
"""

import json
import math
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from minimind.chat.template import Message
from minimind.chat.tokenizer import CONTEXT, ChatTokenizer, EncodedRow
from minimind.datasets.augment import Augmentation, AugmentConfig
from minimind.datasets.formats import (
    BadRowError,
    Preference,
    Record,
    Row,
    parse_chat,
    parse_preference,
    parse_reasoning,
    parse_text,
    read_rows_and_bad_rows,
)
from minimind.datasets.row_checks import Doubt, EvaluationQuestions, RowChecks
from minimind.errors import UserError
from minimind.files import replacing
from minimind.metrics import Number, rounded
from minimind.params import Section

Format = Literal["text", "chat", "reason", "preference"]
OnBadRow = Literal["error", "skip"]

# A batch goes through the tokenizer as one: enough for all cores, little enough for memory.
BATCH_ROWS = 1024
BATCH_BYTES = 2**20
BATCHES_AHEAD = 2


class DataConfig(Section, extra="ignore"):
    """What all data sets share; the section's other keys are paths, read by `load_path`."""

    on_bad_row: OnBadRow


class EncodeConfig(Section):
    """How one data set is encoded."""

    max_length: int = Field(ge=8)  # tokens a row


class ChatEncodeConfig(EncodeConfig, AugmentConfig):
    """How one data set of chats is encoded."""


class EncodingCounts(NamedTuple):
    """What an encoding did. A sample is what training draws: a row, or a pair of them."""

    rows: int  # of the source, skipped ones included
    samples: int
    tokens: int
    truncated_rows: int
    trained_tokens: int
    skipped_rows: int
    duplicate_rows: int  # the same as one before
    eval_overlap_rows: int  # that ask what evaluation data asks
    lossy_rows: int  # with characters that the tokenizer does not give back

    def metrics(self) -> dict[str, Number]:
        """The counts, trained tokens as a share of all."""
        counts: dict[str, Number] = self._asdict()
        return counts | {"trained_share": rounded(counts.pop("trained_tokens") / self.tokens)}


class EncodedSample(NamedTuple):
    """What one row of the source became.

    Texts may become several rows, as chats with variations do; pairs are two.
    """

    rows: list[EncodedRow]
    is_truncated: bool


class _Encoding(NamedTuple):
    parse: Callable[[Record], Any]
    encode: Callable[[ChatTokenizer, list[Any], int], list[EncodedSample]]
    format: str  # as training sees it: reasoning is chats
    rows_per_sample: int


def encode_dataset(
    source: Path,
    output: Path,
    tokenizer: ChatTokenizer,
    data_format: Format,
    max_length: int,
    on_bad_row: OnBadRow,
    augmentation: Augmentation | None = None,
    evaluation: Sequence[Path] = (),
) -> EncodingCounts:
    """Encode a JSONL file, or a folder of shards, into the directory ``output``.

    The layout is that of :class:`minimind.datasets.encoded.EncodedDataset`. Skipped rows are
    listed in ``skipped.jsonl`` beside the arrays. The directory appears whole or not at all.
    With ``augmentation`` every chat is followed by its variations. ``evaluation`` are sources to
    count overlaps with.

    Raises:
        UserError: the source is missing or empty, a row cannot be used and ``on_bad_row`` is
            "error", or no row at all can be used.
    """
    encoding = _ENCODINGS[data_format]
    assert augmentation is None or encoding.format == "chat", "only chats have variations"
    num_rows = num_truncated = num_skipped = 0
    checks = RowChecks(tokenizer, EvaluationQuestions(evaluation))
    doubts: Counter[Doubt] = Counter()
    source_rows = _watched(read_rows_and_bad_rows(source, encoding.parse), checks, doubts)
    with replacing(output) as partial:
        partial.mkdir()
        with _ArrayWriter(partial, tokenizer.vocab_size, encoding.rows_per_sample) as arrays:
            for row in _encoded_rows(source_rows, tokenizer, encoding, max_length, augmentation):
                num_rows += 1
                if isinstance(row, EncodedSample):
                    arrays.write(row.rows)
                    num_truncated += row.is_truncated
                elif on_bad_row == "skip":
                    _list_skipped(partial / "skipped.jsonl", row)
                    num_skipped += 1
                else:
                    raise UserError(f"{row} (data.on_bad_row: skip leaves such rows out).")
        if num_skipped == num_rows:
            raise UserError(f"{source}: none of its {num_rows} rows can be used.")
        meta = {
            "format": encoding.format,
            "rows": arrays.num_rows,
            "sources": arrays.num_sources,
            "tokens": arrays.num_tokens,
            "trained_tokens": arrays.num_trained,
            "token_dtype": arrays.token_dtype,
            "rows_per_sample": encoding.rows_per_sample,
            "tokenizer": tokenizer.fingerprint,
            "max_length": max_length,
        }
        if augmentation:
            meta["copies"] = augmentation.config.augment_copies
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return EncodingCounts(
        rows=num_rows,
        samples=arrays.num_rows // encoding.rows_per_sample,
        tokens=arrays.num_tokens,
        truncated_rows=num_truncated,
        trained_tokens=arrays.num_trained,
        skipped_rows=num_skipped,
        duplicate_rows=doubts["duplicate"],
        eval_overlap_rows=doubts["overlap"],
        lossy_rows=doubts["lossy"],
    )


def encode_rows(
    rows: Sequence[Row[Any]], tokenizer: ChatTokenizer, data_format: Format, max_length: int
) -> list[EncodedSample | BadRowError]:
    """What each row of that format becomes, or why nothing is left of it within the length."""
    samples = _ENCODINGS[data_format].encode(tokenizer, [row.value for row in rows], max_length)
    return [_checked(row, sample, max_length) for row, sample in zip(rows, samples, strict=True)]


def split_document(document: EncodedRow, max_length: int) -> list[EncodedRow]:
    """Pieces of about equal length, at most ``max_length`` tokens.

    Each begins with the last token of the one before, as context: so each token of the document
    is predicted once, as it is in the whole.
    """
    num_targets = len(document.ids) - 1
    num_pieces = math.ceil(num_targets / (max_length - 1))
    bounds = [num_targets * piece // num_pieces for piece in range(num_pieces + 1)]
    return [
        EncodedRow(
            document.ids[start : end + 1],
            bytes([CONTEXT]) + document.loss_mask[start + 1 : end + 1],
        )
        for start, end in pairwise(bounds)
    ]


def _watched(
    rows: Iterable[Row[Any] | BadRowError], checks: RowChecks, doubts: Counter[Doubt]
) -> Iterator[Row[Any] | BadRowError]:
    """The same rows; what is doubtful about them is counted."""
    for row in rows:
        if isinstance(row, Row):
            for warned in checks.warnings(row.place, row.value):
                doubts[warned.doubt] += 1
        yield row


def _encoded_rows(
    rows: Iterable[Row[Any] | BadRowError],
    tokenizer: ChatTokenizer,
    encoding: _Encoding,
    max_length: int,
    augmentation: Augmentation | None,
) -> Iterator[EncodedSample | BadRowError]:
    """What every row of the source becomes, in their order.

    Some batches are encoded ahead by threads: the tokenizer leaves Python's lock and uses all
    cores, while this thread reads what comes next and writes what is done.
    """
    num_copies = augmentation.config.augment_copies if augmentation else 0

    def encode(
        first_row: int, batch: list[Row[Any] | BadRowError]
    ) -> list[EncodedSample | BadRowError]:
        values = []
        for number, row in enumerate(batch, first_row):
            if isinstance(row, Row):
                values.append(row.value)
                values += augmentation.copies(row.value, number) if augmentation else []
        samples = iter(encoding.encode(tokenizer, values, max_length))
        encoded: list[EncodedSample | BadRowError] = []
        for row in batch:
            if isinstance(row, Row):
                sample = _checked(row, next(samples), max_length)
                encoded.append(_with_copies(sample, [next(samples) for _ in range(num_copies)]))
            else:
                encoded.append(row)
        return encoded

    with ThreadPoolExecutor(BATCHES_AHEAD) as threads:
        ahead: deque[Future[list[EncodedSample | BadRowError]]] = deque()
        num_rows = 0
        for batch in row_batches(rows, 1 + num_copies):
            ahead.append(threads.submit(encode, num_rows, batch))
            num_rows += len(batch)
            if len(ahead) > BATCHES_AHEAD:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def _checked(row: Row[Any], sample: EncodedSample, max_length: int) -> EncodedSample | BadRowError:
    if all(encoded.num_trained for encoded in sample.rows):
        return sample
    reason = f"nothing to train on is left of it within {max_length} tokens"
    advice = "shorten what comes before, or raise max_length"
    return BadRowError(row.place, f"{reason}; {advice}", "length")


def _with_copies(
    original: EncodedSample | BadRowError, copies: Sequence[EncodedSample]
) -> EncodedSample | BadRowError:
    """The original's rows and those of its variations.

    A variation that became too long to leave anything to train on gives way to the original.
    """
    if isinstance(original, BadRowError) or not copies:
        return original
    usable = [copy if all(row.num_trained for row in copy.rows) else original for copy in copies]
    samples = [original, *usable]
    return EncodedSample(
        [row for sample in samples for row in sample.rows],
        is_truncated=any(sample.is_truncated for sample in samples),
    )


def row_batches(
    rows: Iterable[Row[Any] | BadRowError], samples_per_row: int
) -> Iterator[list[Row[Any] | BadRowError]]:
    """Rows in lists of limited numbers and bytes."""
    batch: list[Row[Any] | BadRowError] = []
    num_bytes = 0
    for row in rows:
        batch.append(row)
        num_bytes += row.num_bytes if isinstance(row, Row) else 0
        num_samples = len(batch) * samples_per_row
        if num_samples >= BATCH_ROWS or num_bytes * samples_per_row >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _encode_texts(
    tokenizer: ChatTokenizer, texts: list[str], max_length: int
) -> list[EncodedSample]:
    documents = tokenizer.encode_documents(texts)
    return [EncodedSample(split_document(document, max_length), False) for document in documents]


def _encode_chats(
    tokenizer: ChatTokenizer, chats: list[list[Message]], max_length: int
) -> list[EncodedSample]:
    return [_cut([row], max_length) for row in tokenizer.encode_chats(chats)]


def _encode_preferences(
    tokenizer: ChatTokenizer, pairs: list[Preference], max_length: int
) -> list[EncodedSample]:
    chats = [pair.prompt + side for pair in pairs for side in (pair.chosen, pair.rejected)]
    # Assistant turns of the prompt are not compared.
    num_context = [len(pair.prompt) for pair in pairs for _ in range(2)]
    rows = tokenizer.encode_chats(chats, num_context)
    return [_cut(rows[i : i + 2], max_length) for i in range(0, len(rows), 2)]


def _cut(rows: list[EncodedRow], max_length: int) -> EncodedSample:
    cut = [EncodedRow(row.ids[:max_length], row.loss_mask[:max_length]) for row in rows]
    return EncodedSample(cut, is_truncated=any(len(row.ids) > max_length for row in rows))


_ENCODINGS: dict[Format, _Encoding] = {
    "text": _Encoding(parse_text, _encode_texts, "text", 1),
    "chat": _Encoding(parse_chat, _encode_chats, "chat", 1),
    "reason": _Encoding(parse_reasoning, _encode_chats, "chat", 1),
    "preference": _Encoding(parse_preference, _encode_preferences, "preference", 2),
}


class _ArrayWriter(ExitStack):
    """Appends rows to the arrays of an encoded data set."""

    def __init__(self, directory: Path, vocab_size: int, rows_per_sample: int) -> None:
        super().__init__()
        self.token_dtype = "uint16" if vocab_size <= 2**16 else "uint32"
        self._typecode = "H" if vocab_size <= 2**16 else "I"
        self._rows_per_sample = rows_per_sample
        self.num_rows = self.num_tokens = self.num_trained = self.num_sources = 0
        self._tokens, self._loss_mask, self._offsets, self._trained_offsets, self._sources = (
            self.enter_context((directory / f"{name}.bin").open("wb"))
            for name in ("tokens", "loss_mask", "offsets", "trained_offsets", "sources")
        )
        self._write_offsets()
        self._write_source()

    def write(self, rows: Iterable[EncodedRow]) -> None:
        """Append what one row of the source became."""
        for row in rows:
            self._tokens.write(array(self._typecode, row.ids))
            self._loss_mask.write(row.loss_mask)
            self.num_rows += 1
            self.num_tokens += len(row.ids)
            self.num_trained += row.num_trained
            self._write_offsets()
        self.num_sources += 1
        self._write_source()

    def _write_offsets(self) -> None:
        self._offsets.write(array("q", [self.num_tokens]))
        self._trained_offsets.write(array("q", [self.num_trained]))

    def _write_source(self) -> None:
        self._sources.write(array("q", [self.num_rows // self._rows_per_sample]))


def _list_skipped(file: Path, row: BadRowError) -> None:
    entry = {
        "file": str(row.place.file),
        "line": row.place.line,
        "fault": row.fault,
        "reason": row.reason,
    }
    with file.open("a", encoding="utf-8") as skipped:
        skipped.write(json.dumps(entry, ensure_ascii=False) + "\n")
