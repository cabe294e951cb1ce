"""Where rows come from: a file of one of several containers, a folder of them, or a mixture.

.jsonl    a JSON object a line; also what a file of any other name is read as
.json     a list of objects, one object over several lines, or as .jsonl
.csv      the first line has the keys; all values are text
.parquet  and .arrow (either form of Arrow's IPC): with pyarrow, the extra [data]; nulls count as
          missing, since a column has a cell for each row
.gz, .zst of the first three; .zst with pyarrow

A folder is all of its files that are named so, in it or in folders inside it, by name. With a
``mix.yaml`` it is a mixture: what that lists, in its order.
"""

import codecs
import csv
import gzip
import io
import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from minimind.errors import UserError, complaint
from minimind.lineage.paths import unreadable
from minimind.params import Section, Seed, read_params

MIX = "mix.yaml"
# Beside the .arrow files of a folder that the datasets library has saved.
NOTES = ("dataset_info.json", "dataset_dict.json", "state.json")
COMPRESSED = (".gz", ".zst")
MAX_LINE_BYTES = 64 * 2**20  # a file without line ends must not be read into memory whole
BATCH_ROWS = 1024

Record = dict[str, Any]

Fault = Literal[
    "json", "encoding", "schema", "role", "order", "empty", "tags", "identical", "length"
]
"""Why a row cannot be used, in a word; docs/data.md has their meaning."""


class Place(NamedTuple):
    """Where a row stands: its line, or, in a file without lines, its number; both from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        by_line = _container(self.file) in ("", ".jsonl", ".csv")
        return f"{shown_path(self.file)}{':' if by_line else ', row '}{self.line}"


class FaultError(UserError):
    """What is wrong with a row, wherever it stands."""

    def __init__(self, reason: str, fault: Fault = "schema") -> None:
        super().__init__(reason)
        self.fault = fault


class RawRow(NamedTuple):
    """A row before anything is made of it."""

    place: Place
    content: bytes | Record | FaultError  # bytes: JSON still to be parsed
    num_bytes: int
    format: str | None = None  # that a mixture says it has


class Part(Section):
    """A file or folder of a mixture."""

    path: str = Field(min_length=1)  # inside the mixture's folder
    share: float | None = Field(None, gt=0, le=1)  # of the mixture's rows; null: all that it has
    max_rows: int | None = Field(None, ge=1)
    format: str | None = None  # null: what each row is


class Mixture(Section):
    """What ``mix.yaml`` says."""

    parts: list[Part] = Field(min_length=1)
    seed: Seed = 1  # of which rows are taken, where not all are

    @model_validator(mode="after")
    def _shares_are_of_one_whole(self) -> Self:
        shares = [part.share for part in self.parts if part.share is not None]
        if shares and (len(shares) < len(self.parts) or abs(sum(shares) - 1) > 1e-6):
            found = (
                f"{len(shares)} of {len(self.parts)} parts have shares, of {sum(shares):g} in all"
            )
            raise ValueError(f"{found}; give one to each, of 1 in all, or to none")
        return self


class Taken(NamedTuple):
    """A part of a mixture: how many of its rows are taken."""

    part: Part
    source: Path
    taken: int
    rows: int


def read_raw_rows(source: Path) -> Iterator[RawRow]:
    """Every row of a source, still to be parsed.

    Raises:
        UserError: the source is missing, a folder without files that are read, a file without
            rows, or one that is broken.
    """
    if not (source / MIX).is_file():
        for file in _source_files(source):
            yield from _read_file(file)
        return
    seed = _mixture(source).seed
    for part, place, needed, left in mixture(source):
        random_ = random.Random(f"{seed} {part.path}")
        for row in read_raw_rows(place):
            # Of the rows that are left each is as likely as the others (Knuth's algorithm S).
            if random_.random() * left < needed:
                needed -= 1
                yield row._replace(format=part.format or row.format)
            left -= 1


def mixture(folder: Path) -> list[Taken]:
    """The parts of a mixture, none of what is none.

    With shares as many rows are taken as the scarcest part allows, none twice.

    Raises:
        UserError: ``mix.yaml`` is broken, or one of its parts cannot be read.
    """
    if not (folder / MIX).is_file():
        return []
    parts = _mixture(folder).parts
    sources = [folder / part.path for part in parts]
    counts = [count_rows(source) for source in sources]
    most = [min(count, part.max_rows or count) for part, count in zip(parts, counts, strict=True)]
    total = int(min(n / (part.share or 1) for part, n in zip(parts, most, strict=True)) + 1e-6)
    taken = [
        n if part.share is None else min(n, round(total * part.share))
        for part, n in zip(parts, most, strict=True)
    ]
    return [Taken(*one) for one in zip(parts, sources, taken, counts, strict=True)]


def count_rows(source: Path) -> int:
    """How many rows a source has, without parsing those of JSONL."""
    return sum(1 for _ in read_raw_rows(source))


def parse_json(text: bytes) -> Any:
    """What JSON says, if no key stands twice in an object; raises FaultError."""
    try:
        return json.loads(text.decode("utf-8").rstrip("\r\n"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        byte = f"0x{text[error.start]:02x} at byte {error.start + 1}"
        raise FaultError(f"not UTF-8 ({byte}); save the file as UTF-8", "encoding") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " * (error.lineno > 1) + f"column {error.colno}"
        reason = f"broken JSON at {where}: {error.msg}; write one whole object a line"
        raise FaultError(reason, "json") from None
    except FaultError:
        raise
    except (ValueError, RecursionError) as error:
        what = "brackets too deep" if isinstance(error, RecursionError) else "a number too long"
        raise FaultError(f"JSON that cannot be read: {what}; shorten it", "json") from None


def unread_files(source: Path) -> list[str]:
    """What a folder has and nobody reads, with the reasons; hidden files are not meant to be."""
    files = _files_of(source) if source.is_dir() else []
    return [f"{shown_path(file)} ({why})" for file, why in files if why]


def _mixture(folder: Path) -> Mixture:
    file = folder / MIX
    try:
        mix = Mixture.model_validate(read_params(file))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, d['loc']))}: {complaint(d)}" for d in error.errors()]
        keys = f"{', '.join(Mixture.model_fields)}, a part {', '.join(Part.model_fields)}"
        raise UserError(f"{shown_path(file)}: {'; '.join(wrong)}; it has {keys}.") from None
    for part in mix.parts:
        path = Path(part.path)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            advice = "DVC tracks the mixture as one"
            raise UserError(f"{shown_path(file)}: {part.path} is not inside its folder; {advice}.")
    return mix


def _source_files(source: Path) -> list[Path]:
    """The file itself, or a folder's by name."""
    if source.is_dir():
        if shards := [file for file, why in _files_of(source) if not why]:
            return shards
        raise UserError(
            f"{shown_path(source)} is a folder without *.jsonl files, or others that are read "
            f"({', '.join(CONTAINERS)}); put the shards into it."
        )
    if why := unreadable(source):
        advice = "correct the path, or run the stage that writes it"
        raise UserError(f"{shown_path(source)} is {why}; {advice}.")
    return [source]


def _files_of(folder: Path) -> list[tuple[Path, str]]:
    """Its visible files with the reason why they are not read: linked folders, which DVC does not
    look into either, and what stands for no file, too.
    """
    is_mixture = (folder / MIX).is_file()
    mixed = [folder / part.path for part in _mixture(folder).parts] if is_mixture else [folder]
    files = []
    for file in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        if file.is_dir():
            if file.is_symlink():
                files.append((file, "a linked folder; link its files, or copy it"))
        elif file.name == MIX and file.parent != folder:
            files.append((file, f"the {MIX} of a folder inside; only the data's own counts"))
        elif file.name != MIX:
            why = "" if _container(file) and file.name not in NOTES else "no file of rows"
            if file not in mixed and not any(place in file.parents for place in mixed):
                why = f"no part of {MIX}"
            files.append((file, unreadable(file) or why))
    return files


def _read_file(path: Path) -> Iterator[RawRow]:
    """Its rows, each with its line or number; UserError where it has none."""
    number = 0
    with _told_as_one_line(path):
        for number, content, num_bytes in CONTAINERS.get(_container(path), _json_lines)(path):
            yield RawRow(Place(path, number), content, num_bytes)
    if not number:
        raise UserError(f"{shown_path(path)} has no rows; it must hold one or more.")


def _container(path: Path) -> str:
    """What kind of file it is by its name, ".jsonl" of a.jsonl.gz; "" is none that is known."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in CONTAINERS else ""


@contextmanager
def _told_as_one_line(path: Path) -> Iterator[None]:
    """Raises UserError with the file's name for what its reader raises."""
    try:
        yield
    except FaultError as error:
        raise UserError(f"{shown_path(path)}: {error}.") from None
    except UserError:
        raise
    except (OSError, EOFError, ValueError, NotImplementedError, zlib.error, csv.Error) as error:
        if getattr(error, "errno", None):  # of the disk, not of what the file holds
            raise
        raise UserError(
            f"{shown_path(path)} cannot be read as {''.join(path.suffixes[-2:])}: {error}; it is "
            "cut short, or another kind of file."
        ) from None


def _opened(path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)  # type: ignore[return-value]
        case ".zst":
            return io.BufferedReader(_pyarrow(path).input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{shown_path(path)} needs pyarrow; `pip install 'minimind-dvc[data]'`, in a clone "
            "`pip install -e '.[data]'`."
        ) from None
    return pyarrow


_Rows = Iterator[tuple[int, bytes | Record | FaultError, int]]


def _json_lines(path: Path) -> _Rows:
    with _opened(path) as file:
        lines = iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_LINE_BYTES:
                limit = f"{MAX_LINE_BYTES // 2**20} MiB"
                raise UserError(
                    f"{Place(path, number)}: longer than {limit}; write one row a line."
                )
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line, len(line)


def _json_list(path: Path) -> _Rows:
    with _opened(path) as file:
        begun = file.read(1024).lstrip(codecs.BOM_UTF8 + b" \t\r\n")
    is_list, is_spread = begun[:1] == b"[", begun.splitlines()[:1] == [b"{"]
    if not is_list and not is_spread:
        yield from _json_lines(path)
        return
    with _opened(path) as file:
        text = file.read().removeprefix(codecs.BOM_UTF8)
    rows = parse_json(text) if is_list else [parse_json(text)]
    for number, row in enumerate(rows, 1):
        yield number, row, len(text) // len(rows)


def _csv(path: Path) -> _Rows:
    csv.field_size_limit(MAX_LINE_BYTES)
    with io.TextIOWrapper(_opened(path), "utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        _object([(key, None) for key in reader.fieldnames or ()])
        for row in reader:
            more = row.pop(None, None)
            reason = (
                f"{len(more or ())} cells more than the first line has; quote those with commas"
            )
            cells = {key: value for key, value in row.items() if value is not None}
            num_bytes = sum(map(len, cells.values()))
            yield reader.line_num, FaultError(reason) if more else cells, num_bytes


def _parquet(path: Path) -> _Rows:
    with path.open("rb") as file:
        yield from _of_batches(
            _pyarrow(path).parquet.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS)
        )


def _arrow(path: Path) -> _Rows:
    ipc = _pyarrow(path).ipc
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = ipc.open_file(file)
            yield from _of_batches(map(reader.get_batch, range(reader.num_record_batches)))
        else:
            yield from _of_batches(ipc.open_stream(file))


def _of_batches(batches: Iterator[Any]) -> _Rows:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, _without_nulls(row), batch.nbytes // batch.num_rows


def _without_nulls(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_nulls(item) for key, item in value.items() if item is not None}
        case list():
            return [_without_nulls(item) for item in value]
    return value


CONTAINERS: Mapping[str, Callable[[Path], _Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


def _object(pairs: list[tuple[str, Any]]) -> Record:
    """A JSON object in which no key stands twice: Python would silently take the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise FaultError(f"the key {shown(twice)} stands there twice; leave one out", "json")
    return record


def shown_path(path: Path) -> str:
    """A path on one line, escaped if it holds line ends or other bytes that no terminal shows."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def shown(value: Any) -> str:
    """A value in at most 40 printable characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
