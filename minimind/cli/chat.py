"""`minimind chat`: talk to checkpoints in the terminal."""

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from minimind.errors import UserError

if TYPE_CHECKING:
    from minimind.talk.session import Session


def chat(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CHECKPOINT...]",
            help="dpo, models/dpo, any folder; dpo@main, exp-abc:models/dpo; by default the newest",
        ),
    ] = None,
    ask: Annotated[
        list[str] | None, typer.Option(help="a question for scripts: print the answer and end")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="with --ask: all of the replies")] = False,
    system: Annotated[str, typer.Option(help="system prompt")] = "",
    think: Annotated[
        bool, typer.Option("--think/--no-think", help="--no-think: begin with an empty thought")
    ] = True,
    tools: Annotated[
        bool, typer.Option("--tools", help="tell the model of calculator, clock, convert, weather")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="draw from the likeliest")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of a reply")] = 512,
    load: Annotated[Path | None, typer.Option(help="go on with what /save has written")] = None,
) -> None:
    """Talk to one checkpoint, or to several side by side; /help lists commands.

    Without a terminal each line of the input is a question or command.
    """
    # Imported here: PyTorch takes seconds to load.
    from minimind.compute.device import prepare_device
    from minimind.compute.settings import load_settings
    from minimind.talk.conversation import Settings
    from minimind.talk.session import Session
    from minimind.talk.speaker import known_checkpoints, open_speaker

    if not all(question.strip() for question in ask or ()):
        raise UserError("--ask of blanks alone asks nothing; write a question.")
    if as_json and not ask:
        raise UserError("--json is for the answers to --ask; ask something, or leave it out.")
    if not checkpoints and not (checkpoints := known_checkpoints()[:1]):
        raise UserError("models/ has no checkpoint; name one, or `minimind repro` makes some.")
    device = prepare_device(load_settings())
    console = Console(highlight=False, markup=False)
    settings = Settings(system, 0.0, top_p, seed, max_new_tokens, think, tools)
    speakers = [open_speaker(said, device) for said in checkpoints]
    session = Session(console, speakers, settings, lambda said: open_speaker(said, device))
    session.handle(f"/temperature {temperature}")
    if load:
        session.load(load)
    if ask:
        answer(session, ask, as_json)
    else:
        is_typed = sys.stdin.isatty() and console.is_terminal
        converse(session, typed_lines() if is_typed else piped_lines(), is_typed)


def answer(session: "Session", questions: list[str], as_json: bool) -> None:
    """Ask one question after the other; print the answers alone, or all as JSON lines."""
    from minimind.talk.parts import text_of

    for question in questions:
        for chat in session.conversations:
            *_, reply = chat.ask(question)
            said = text_of(reply.parts, "answer")
            name = chat.speaker.name
            if as_json:
                said = json.dumps(
                    {
                        "checkpoint": name,
                        "question": question,
                        "thought": text_of(reply.parts, "thought"),
                        "answer": said,
                        "calls": [p.text for p in reply.parts if p.kind in ("call", "result")],
                        "note": reply.note,
                        "tokens": len(reply.tokens),
                        "seconds": round(reply.seconds, 3),
                    },
                    ensure_ascii=False,
                )
            elif reply.note:
                typer.echo(f"{name}: {reply.note}", err=True)
            is_one = as_json or len(session.conversations) == 1
            typer.echo(said if is_one else f"{name}: {said}")


def converse(session: "Session", lines: Iterable[str], is_typed: bool = True) -> None:
    """Questions and commands until the input ends; what was said outlives a closed terminal.

    Raises:
        typer.Exit: the terminal was closed, or a line of a script could not be answered.
    """
    console, num_refused = session.console, 0
    for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        signal.signal(number, _leave)
    try:
        if console.is_terminal:
            names = ", ".join(chat.speaker.name for chat in session.conversations)
            console.print(f"{names}. /help lists commands.", style="dim")
        for line in lines:
            try:
                session.handle(line)
            except UserError as error:
                console.print(f"{error}", style="yellow")
                num_refused += 1
            except EOFError:
                break
        if console.is_terminal:
            console.print("")  # fails where Ctrl-D was a terminal's end
    except (OSError, SystemExit) as error:
        warnings.simplefilter("ignore")  # of a prompt that had begun and never ran
        with suppress(OSError):
            if kept := session.keep():
                typer.echo(f"chat: closed; `--load {kept}` goes on with it.", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would write to it
        raise typer.Exit(getattr(error, "code", 1)) from None
    if num_refused and not is_typed:
        raise typer.Exit(1)


def _leave(number: int, _frame: FrameType | None) -> None:
    # An event loop whose making this cuts off would complain of what it lacks when it is freed.
    sys.unraisablehook = lambda _: None
    raise SystemExit(128 + number)


def typed_lines() -> Iterator[str]:
    """Lines edited in a terminal, until Ctrl-D; Ctrl-C clears one."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.shortcuts import CompleteStyle

    from minimind.talk.session import HELP

    commands = [command.partition(" ")[0] for command in HELP]
    completer = WordCompleter(commands, sentence=True)
    prompt = PromptSession[str](completer=completer, complete_style=CompleteStyle.READLINE_LIKE)
    while True:
        try:
            yield prompt.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def piped_lines() -> Iterator[str]:
    """Lines of a file or another program."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    yield from sys.stdin
