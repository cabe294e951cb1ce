"""`minimind show`: rows as the tokens that a stage sees, and which of them it learns."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from minimind.chat.tokenizer import (
    CONTEXT,
    CONTROL_TOKENS,
    TAG,
    TAGS,
    TOOL_TAGS,
    TRAINED,
    ChatTokenizer,
    EncodedRow,
)
from minimind.datasets.encode import ENCODINGS, encode_rows
from minimind.datasets.formats import BadRowError, Row, read_rows_and_bad_rows
from minimind.errors import UserError
from minimind.lineage.dvc_files import stages_as_written, value_at
from minimind.lint import LintFormat, detect_format
from minimind.params import load_path, read_params
from minimind.tasks.problem import Problem, parse_problem

STYLES = {CONTEXT: "", TRAINED: "green", TAG: "bold magenta"}
OF_TEMPLATE = " italic cyan"
LEGEND = "+ is trained on, the rest is context; │ stands between tokens, ⏎ for a line's end"


def show(
    data: Annotated[
        str, typer.Argument(help="a key of params.yaml, as data.sft, or a file or folder")
    ],
    rows: Annotated[int, typer.Option(min=1, help="how many")] = 3,
    first: Annotated[int, typer.Option(min=1, help="number of the first")] = 1,
    tokenizer: Annotated[
        Path | None, typer.Option(help="a tokenizer's directory; by default encode.tokenizer")
    ] = None,
    params: Annotated[Path, typer.Option(help="parameters")] = Path("params.yaml"),
) -> None:
    """Print rows as tokens: what is trained on, what not, and what the chat template adds."""
    name = data.removeprefix("data.") if data.startswith("data.") else ""
    keys = value_at(read_params(params), "data") if name else None
    if isinstance(keys, dict) and name not in keys:
        raise UserError(f"{params} has no {data}; there are {', '.join(map(str, keys))}.")
    source = load_path(params, data) if name else Path(data)
    loaded = ChatTokenizer.load(tokenizer or load_path(params, "encode.tokenizer"))
    stages = stages_as_written(params.with_name("dvc.yaml"))
    kind = value_at(stages, f"encode.foreach.{name}.format") or detect_format(source)
    max_length = value_at(read_params(params), f"encode.{name}.max_length") if name else None
    parse = parse_problem if kind == "prompts" else ENCODINGS[kind].parse
    found = list(islice(read_rows_and_bad_rows(source, parse), first - 1, first - 1 + rows))
    if not found:
        raise UserError(f"{source} has fewer than {first} rows; lower --first.")
    print_rows(Console(), found, loaded, kind, max_length)


def print_rows(
    console: Console,
    found: Sequence[Row[Any] | BadRowError],
    tokenizer: ChatTokenizer,
    kind: LintFormat,
    max_length: int | None,
) -> None:
    """With colours on a terminal, unless NO_COLOR is set."""
    for line in (*_shown(found, tokenizer, kind, max_length), Text(LEGEND, "dim")):
        console.print(line, soft_wrap=not console.is_terminal)


def _shown(
    found: Sequence[Row[Any] | BadRowError],
    tokenizer: ChatTokenizer,
    kind: LintFormat,
    max_length: int | None,
) -> Iterator[Text]:
    """Lines for each row: where it stands, then its tokens."""
    for row in found:
        if isinstance(row, Row) and kind == "prompts":
            ids = tokenizer.encode_prompt(Problem.of_row(row).messages)
            encoded = [EncodedRow(ids, bytes([CONTEXT] * len(ids)))]
        elif isinstance(row, Row) and kind != "prompts":
            (sample,) = encode_rows([row], tokenizer, kind, max_length or 2**31)
            if isinstance(sample, BadRowError):
                yield Text(f"left out: {sample}", "red")
                continue
            encoded = sample.rows
        else:
            yield Text(f"left out: {row}", "red")
            continue
        assert isinstance(row, Row)
        for number, one in enumerate(encoded, 1):
            of = f", {number} of {len(encoded)}" if len(encoded) > 1 else ""
            counts = f"{len(one.ids)} tokens, {one.num_trained} trained on"
            yield Text(f"{row.place} ({row.format}{of}): {counts}", "bold")
            yield from _lines(one, tokenizer, is_chat=kind != "text")


def _lines(row: EncodedRow, tokenizer: ChatTokenizer, is_chat: bool) -> Iterator[Text]:
    """A row's tokens, those of a kind in a line of their own."""
    line, before = Text(), None
    for text, token_class, is_template in _tokens(row, tokenizer, is_chat):
        if before and (before[1:] != (token_class, is_template) or before[0].endswith("\n")):
            yield line
            line, before = Text(), None
        line.append("│" if before else "+ " if token_class else "  ", "dim")
        style = STYLES[token_class] + (OF_TEMPLATE if is_template and not token_class else "")
        line.append("".join(_printable(character) for character in text), style)
        before = (text, token_class, is_template)
    yield line


def _tokens(
    row: EncodedRow, tokenizer: ChatTokenizer, is_chat: bool
) -> Iterator[tuple[str, int, bool]]:
    """Text and class of each token, and whether it is the template's: control tokens and such.

    Tokens that are a part of a character are joined to the rest of it.
    """
    ids = (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id)
    control = dict(zip(ids, CONTROL_TOKENS, strict=True))
    part: list[int] = []
    is_header = True  # up to the end of the line that <|im_start|> begins
    for place, (id, token_class) in enumerate(zip(row.ids, row.loss_mask, strict=True), 1):
        part.append(id)
        text = control.get(id) or tokenizer.decode(part)
        if text.endswith("\ufffd") and place < len(row.ids):
            continue
        is_header = is_chat and (is_header or id == tokenizer.end_id)
        yield text, token_class, is_header or id in control or text in TAGS + TOOL_TAGS
        if is_header and "\n" in text and row.ids[place - len(part) - 1] != tokenizer.end_id:
            is_header = False
        part = []


def _printable(character: str) -> str:
    """What a terminal shows of a character: none moves its cursor."""
    return "⏎" if character == "\n" else character if character.isprintable() else repr(character)
