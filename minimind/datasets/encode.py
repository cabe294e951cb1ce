"""Rows to arrays on disk, as a stream: memory does not grow with the data.

A text longer than ``max_length`` tokens is split into several rows, so that none of it is lost.
Chats and preferences are cut at their end: a turn without what it answers teaches nothing. What
would teach something false is dropped: a thought without its answer, a pair whose sides are equal.
A chat may be followed by variations of itself (:mod:`minimind.datasets.augment`).
"""

import json
import math
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from minimind.chat.template import Message
from minimind.chat.tokenizer import CONTEXT, ChatTokenizer, EncodedRow
from minimind.datasets.augment import Augmentation, AugmentConfig
from minimind.datasets.formats import (
    BadRowError,
    Formats,
    Preference,
    Row,
    parse_chat,
    parse_preference,
    parse_reasoning,
    parse_text,
    read_rows_and_bad_rows,
)
from minimind.datasets.row_checks import EvaluationQuestions, RowChecks
from minimind.datasets.sources import Taken, mixture
from minimind.datasets.unread_keys import UnreadKeys
from minimind.errors import UserError
from minimind.files import replacing
from minimind.metrics import rounded
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


class Tally:
    """How many rows have each kind of something, and the first of them."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, kind: str, example: str) -> None:
        self.rows[kind] += 1
        self.first.setdefault(kind, example)

    def __str__(self) -> str:
        """The three kinds that most rows have, and how many rows have others."""
        shown = self.rows.most_common(3)
        parts = [f"{number} {kind} (first {self.first[kind]})" for kind, number in shown]
        if others := self.rows.total() - sum(number for _, number in shown):
            parts.append(f"{others} for other reasons")
        return ", ".join(parts)


class EncodingCounts(NamedTuple):
    """What an encoding did. A sample is what training draws: a row, or a pair of them."""

    rows: int  # of the source, skipped ones included
    samples: int
    tokens: int
    truncated_rows: int
    trained_tokens: int
    skipped_rows: int
    dropped_rows: int  # too long: the answer of a thought, or what makes a pair differ, is cut off
    duplicate_rows: int  # the same as one before
    eval_overlap_rows: int  # that ask what evaluation data asks
    lossy_rows: int  # with characters that the tokenizer does not give back
    formats: Mapping[str, int]  # rows of each, those left out for their length among them
    left_out: Tally  # rows skipped and dropped, by their fault
    doubts: Tally
    unread: UnreadKeys
    parts: Sequence[Taken]  # of a mixture

    def metrics(self) -> dict[str, Any]:
        """The counts, trained tokens as a share of all, with an example of each fault."""
        counts: dict[str, Any] = {k: v for k, v in self._asdict().items() if isinstance(v, int)}
        counts["trained_share"] = rounded(counts.pop("trained_tokens") / self.tokens)
        counts["formats"] = dict(self.formats)
        if self.parts:
            counts["parts"] = {taken.part.path: taken.taken for taken in self.parts}
        if self.left_out.rows:
            counts |= {"left_out": dict(self.left_out.rows), "first_left_out": self.left_out.first}
        return counts

    def said(self, listed: Path) -> Iterator[str]:
        """What became of the rows, a line each; ``listed`` is where those left out are."""
        for part, _, taken, rows in self.parts:
            yield f"{part.path}: {taken} of its {rows} rows are in the mixture"
        of_formats = ", ".join(f"{number} {name}" for name, number in self.formats.items())
        share = f"{self.trained_tokens / self.tokens:.0%} of {self.tokens} tokens trained on"
        yield f"{self.rows} rows ({of_formats}), {self.samples} samples, {share}"
        if keys := self.unread.shown(warned=False):
            yield f"keys that are not read: {keys}"
        if keys := self.unread.shown(warned=True):
            yield f"warning: keys that are not read: {keys}"
        if self.skipped_rows:
            yield f"left out {self.skipped_rows} rows: {listed}"
        if self.dropped_rows:
            what = "rows whose answer, or what makes a pair differ, is cut off"
            yield f"dropped {self.dropped_rows} {what}: {listed}"
        if self.left_out.rows:
            yield f"why: {self.left_out}"
        if self.truncated_rows:
            yield f"cut off the end of {self.truncated_rows} rows longer than max_length"
        for doubt, what in SAID_DOUBTS.items():
            if number := self.doubts.rows[doubt]:
                yield f"{number} rows {what}: first {self.doubts.first[doubt]}"


SAID_DOUBTS = {
    "duplicate": "are the same as one before",
    "overlap": "ask what evaluation data asks",
    "lossy": "have characters that the tokenizer does not give back",
}


class EncodedSample(NamedTuple):
    """What one row of the source became: several rows if it was split or varied, two of a pair."""

    rows: list[EncodedRow]
    is_truncated: bool
    lost: str = ""  # what is wrong with what is left

    @property
    def is_usable(self) -> bool:
        """Whether each row has something to train on."""
        return not self.lost and all(row.num_trained for row in self.rows)


class DroppedRow(BadRowError):
    """A good row that is too long, and left out whatever `on_bad_row` says."""


class Encoding(NamedTuple):
    """How the rows of a format are read and encoded."""

    parse: Formats[Any]
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
    """Encode a source of rows into the directory ``output``, or nothing at all.

    The layout is that of :class:`minimind.datasets.encoded.EncodedDataset`. Rows left out are
    listed in ``skipped.jsonl`` beside the arrays. ``evaluation`` are sources to count overlaps
    with.

    Raises:
        UserError: the source is missing or empty, a row cannot be used and ``on_bad_row`` is
            "error", or no row at all can be used.
    """
    encoding = ENCODINGS[data_format]
    assert augmentation is None or encoding.format == "chat", "only chats have variations"
    num_rows = num_truncated = num_skipped = num_dropped = 0
    checks = RowChecks(tokenizer, EvaluationQuestions(evaluation))
    unread, doubts, left_out, formats = UnreadKeys(), Tally(), Tally(), Counter[str]()

    def checked_rows() -> Iterator[Row[Any] | BadRowError]:
        for row in read_rows_and_bad_rows(source, encoding.parse):
            if isinstance(row, Row):
                unread.add(row)
                formats[row.format] += 1
                for warned in checks.warnings(row.place, row.value):
                    doubts.add(warned.doubt, f"{row.place}, {warned.message}")
            yield row

    rows = checked_rows()
    with replacing(output) as partial:
        partial.mkdir()
        with _ArrayWriter(partial, tokenizer.vocab_size, encoding.rows_per_sample) as arrays:
            for sample in _encoded_ahead(rows, tokenizer, data_format, max_length, augmentation):
                num_rows += 1
                if isinstance(sample, EncodedSample):
                    arrays.write(sample.rows)
                    num_truncated += sample.is_truncated
                elif on_bad_row == "skip" or isinstance(sample, DroppedRow):
                    num_dropped += isinstance(sample, DroppedRow)
                    num_skipped += not isinstance(sample, DroppedRow)
                    left_out.add(sample.fault, str(sample))
                    entry = {"file": str(sample.place.file), "line": sample.place.line}
                    entry |= {"fault": sample.fault, "reason": sample.reason}
                    # Of a file's name, bytes that are not UTF-8 become JSON's escapes.
                    line = json.dumps(entry, ensure_ascii=False) + "\n"
                    with (partial / "skipped.jsonl").open("ab") as skipped:
                        skipped.write(line.encode(errors="backslashreplace"))
                else:
                    raise UserError(f"{sample} (data.on_bad_row: skip leaves such rows out).")
        if num_skipped + num_dropped == num_rows:
            raise UserError(f"{source}: none of its {num_rows} rows can be used: {left_out}.")
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
        dropped_rows=num_dropped,
        duplicate_rows=doubts.rows["duplicate"],
        eval_overlap_rows=doubts.rows["overlap"],
        lossy_rows=doubts.rows["lossy"],
        formats=formats,
        left_out=left_out,
        doubts=doubts,
        unread=unread,
        parts=mixture(source),
    )


def encode_rows(
    rows: Sequence[Row[Any] | BadRowError],
    tokenizer: ChatTokenizer,
    data_format: Format,
    max_length: int,
    augmentation: Augmentation | None = None,
    first_row: int = 0,
) -> list[EncodedSample | BadRowError]:
    """What each row becomes, with its variations; a bad row, also if nothing is left to train on.

    A variation of which nothing is left to train on gives way to the original.
    """
    values: list[Any] = []
    for number, row in enumerate(rows, first_row):
        if isinstance(row, Row):
            values += augmentation.variants(row.value, number) if augmentation else [row.value]
    samples = iter(ENCODINGS[data_format].encode(tokenizer, values, max_length))
    num_copies = augmentation.config.augment_copies if augmentation else 0
    encoded: list[EncodedSample | BadRowError] = []
    for row in rows:
        if isinstance(row, BadRowError):
            encoded.append(row)
            continue
        original, *copies = islice(samples, 1 + num_copies)
        if original.lost:
            reason = f"within {max_length} tokens {original.lost}"
            reason += "; shorten it, or raise max_length"
            encoded.append(DroppedRow(row.place, reason, "length"))
            continue
        if not original.is_usable:
            reason = f"nothing to train on is left of it within {max_length} tokens"
            advice = "shorten what comes before, or raise max_length"
            encoded.append(BadRowError(row.place, f"{reason}; {advice}", "length"))
            continue
        variants = [original, *(copy if copy.is_usable else original for copy in copies)]
        varied = [one for variant in variants for one in variant.rows]
        encoded.append(EncodedSample(varied, any(variant.is_truncated for variant in variants)))
    return encoded


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


def _encoded_ahead(
    rows: Iterable[Row[Any] | BadRowError],
    tokenizer: ChatTokenizer,
    data_format: Format,
    max_length: int,
    augmentation: Augmentation | None,
) -> Iterator[EncodedSample | BadRowError]:
    """What every row becomes, in their order; some batches are encoded ahead by threads.

    The tokenizer leaves Python's lock and uses all cores, while this thread reads and writes.
    """
    num_copies = augmentation.config.augment_copies if augmentation else 0
    with ThreadPoolExecutor(BATCHES_AHEAD) as threads:
        ahead: deque[Future[list[EncodedSample | BadRowError]]] = deque()
        num_rows = 0
        for batch in row_batches(rows, 1 + num_copies):
            how = (tokenizer, data_format, max_length, augmentation, num_rows)
            ahead.append(threads.submit(encode_rows, batch, *how))
            num_rows += len(batch)
            if len(ahead) > BATCHES_AHEAD:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


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


def _encode_thoughts(
    tokenizer: ChatTokenizer, chats: list[list[Message]], max_length: int
) -> list[EncodedSample]:
    return [
        sample._replace(lost="its answer is cut off")
        if sample.is_truncated and sample.is_usable
        else sample
        for sample in _encode_chats(tokenizer, chats, max_length)
    ]


def _encode_preferences(
    tokenizer: ChatTokenizer, pairs: list[Preference], max_length: int
) -> list[EncodedSample]:
    chats = [pair.prompt + side for pair in pairs for side in (pair.chosen, pair.rejected)]
    num_context = [len(pair.prompt) for pair in pairs for _ in range(2)]  # is not compared
    rows = tokenizer.encode_chats(chats, num_context)
    samples = [_cut(rows[i : i + 2], max_length) for i in range(0, len(rows), 2)]
    return [
        sample._replace(lost="both sides are the same")
        if sample.rows[0].ids == sample.rows[1].ids and sample.is_usable
        else sample
        for sample in samples
    ]


def _cut(rows: list[EncodedRow], max_length: int) -> EncodedSample:
    cut = [EncodedRow(row.ids[:max_length], row.loss_mask[:max_length]) for row in rows]
    return EncodedSample(cut, is_truncated=any(len(row.ids) > max_length for row in rows))


ENCODINGS: dict[Format, Encoding] = {
    "text": Encoding(parse_text, _encode_texts, "text", 1),
    "chat": Encoding(parse_chat, _encode_chats, "chat", 1),
    "reason": Encoding(parse_reasoning, _encode_thoughts, "chat", 1),
    "preference": Encoding(parse_preference, _encode_preferences, "preference", 2),
}


class _ArrayWriter(ExitStack):
    """Appends rows to the arrays of an encoded data set."""

    def __init__(self, directory: Path, vocab_size: int, rows_per_sample: int) -> None:
        super().__init__()
        self.token_dtype, self._typecode = (
            ("uint16", "H") if vocab_size <= 2**16 else ("uint32", "I")
        )
        self._rows_per_sample = rows_per_sample
        self.num_rows = self.num_tokens = self.num_trained = self.num_sources = 0
        self._tokens, self._loss_mask, self._offsets, self._trained_offsets, self._sources = (
            self.enter_context((directory / f"{name}.bin").open("wb"))
            for name in ("tokens", "loss_mask", "offsets", "trained_offsets", "sources")
        )
        for index in (self._offsets, self._trained_offsets, self._sources):
            index.write(array("q", [0]))

    def write(self, rows: Iterable[EncodedRow]) -> None:
        """Append what one row of the source became."""
        for row in rows:
            self._tokens.write(array(self._typecode, row.ids))
            self._loss_mask.write(row.loss_mask)
            self.num_rows += 1
            self.num_tokens += len(row.ids)
            self.num_trained += row.num_trained
            self._offsets.write(array("q", [self.num_tokens]))
            self._trained_offsets.write(array("q", [self.num_trained]))
        self.num_sources += 1
        self._sources.write(array("q", [self.num_rows // self._rows_per_sample]))
