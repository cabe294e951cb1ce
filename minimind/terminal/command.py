"""What every stage's command has in common: people's mistakes end in one line, not a traceback."""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from safetensors import SafetensorError
from typer.core import TyperCommand

from minimind.compute.launch import Kind, is_worker, say_last_words
from minimind.errors import Stopped, UserError

LONGEST_LINE = 2000  # characters
# Options that are written to.
OUTPUTS = ("output", "metrics", "history", "predictions", "choices", "rejected", "page")
MAY_BE_EMPTY = ("--system",)
_NO_VALUE = re.compile(r"--[\w-]+=")


class FilledCommand(TyperCommand):
    """Refuses empty arguments: "$F" of no value would be the current folder, or all there is."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, word in pairwise(["", *args]):
            name = word.removesuffix("=") or before  # `--output=`, or `--output ""`
            if (not word or _NO_VALUE.fullmatch(word)) and name not in MAY_BE_EMPTY:
                what = name if name.startswith("-") else "an argument"
                typer.echo(
                    f"{ctx.command_path}: {what} is empty; is a variable of the shell not set?",
                    err=True,
                )
                raise typer.Exit(2)
        return super().parse_args(ctx, args)


class StageApp(typer.Typer):
    """The commands of a stage: errors that a person can mend are one line and exit code 1."""

    def __init__(self, name: str) -> None:
        super().__init__(
            name=name, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
        )
        self.stage = name

    def command(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        register = super().command(*args, **{"cls": FilledCommand} | kwargs)

        def decorate(function: Callable[..., None]) -> Callable[..., None]:
            @functools.wraps(function)
            def guarded(**options: Any) -> None:
                try:
                    _require_room(options)
                    function(**options)
                except UserError as error:
                    self._complain(str(error))
                    raise typer.Exit(1) from None
                except BrokenPipeError:  # `| head` has seen enough; Python would write once more
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                    raise typer.Exit(1) from None
                except (OSError, SafetensorError) as error:  # a full disk may be either
                    self._complain(f"{error}; mend this and run the same command again to go on.")
                    raise typer.Exit(1) from None
                except Stopped as stopped:
                    self._announce(str(stopped))
                    raise typer.Exit(stopped.exit_code) from None
                except KeyboardInterrupt:
                    self._announce("stopped; run the same command to start again")
                    raise typer.Exit(130) from None
                except Exception as error:
                    if _is_of_memory(error):
                        self._complain(
                            f"out of memory: {error}; lower what is done at a time: batch_size "
                            "(with more accumulation_steps), max_length, num_generations."
                        )
                        raise typer.Exit(1) from None
                    if is_worker() and say_last_words(traceback.format_exc(), Kind.BUG):
                        raise typer.Exit(1) from None
                    raise

            register(guarded)
            return function

        return decorate

    def _complain(self, message: str) -> None:
        line = f"{self.stage}: {' '.join(message.split())}"
        if len(line) > LONGEST_LINE:  # what was found may be a book; what to do stands at the end
            line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 4 :]}"
        if not say_last_words(line):
            typer.echo(line, err=True)

    def _announce(self, message: str) -> None:
        """What concerns all processes alike is said by one."""
        if os.environ.get("RANK", "0") == "0" or not is_worker():
            self._complain(message)


stage_app = StageApp


def _is_of_memory(error: Exception) -> bool:
    """Of Python, NumPy, or PyTorch on a CPU or GPU, which says so in words alone."""
    said = str(error).lower()
    is_torchs = isinstance(error, RuntimeError) and "allocat" in said and "memory" in said
    return isinstance(error, MemoryError) or is_torchs


def require_file(path: Path) -> None:
    """Raises UserError where a folder stands in the place of a file that is read or written."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file.")


def _require_room(options: Mapping[str, Any]) -> None:
    """Raises UserError where an output could not be written: better now than after the work."""
    for path in [options[name] for name in OUTPUTS if isinstance(options.get(name), Path)]:
        there = next(parent for parent in path.absolute().parents if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UserError(
                f"{path} cannot be written: {there} is not a folder that may be written to; "
                "move it out of the way, or change its mode."
            )
