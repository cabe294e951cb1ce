"""A session in a terminal: questions and commands in, replies of all checkpoints side by side."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from minimind.errors import UserError
from minimind.talk.conversation import Conversation, Reply, Settings, advance, summary
from minimind.talk.parts import Kind, Part
from minimind.talk.speaker import Speaker

REFRESH_SECONDS = 0.05
KEPT = Path("runs/chats")  # conversations whose terminal was closed
STYLES: dict[Kind, tuple[str, str]] = {  # what stands before a part, and its style
    "thought": ("▾ ", "dim italic"),
    "answer": ("", ""),
    "call": ("⚙ ", "cyan"),
    "result": ("↳ ", "cyan"),
}
HELP = {
    "/system TEXT": "the system prompt from here on; without TEXT none",
    "/reset": "forget the conversation",
    "/regenerate": "another reply to the last question",
    "/compare CHECKPOINT": "one more beside the others, asked the last question: dpo, dpo@main",
    "/temperature NUMBER": "0: the likeliest token each time",
    "/seed NUMBER": "of what is drawn above temperature 0",
    "/tokens": "the last replies' tokens, with probabilities and alternatives",
    "/fold": "thoughts as one line, or whole again",
    "/save FILE": "add the conversation to a JSONL file, a row for each checkpoint",
    "/help": "this list",
    "/exit": "or Ctrl-D; Ctrl-C stops a reply",
}


class Session:
    """Conversations with several checkpoints, about the same questions."""

    def __init__(
        self,
        console: Console,
        speakers: list[Speaker],
        settings: Settings,
        open_speaker: Callable[[str], Speaker],
    ) -> None:
        self.console, self.settings, self.open_speaker = console, settings, open_speaker
        self.conversations = [Conversation(speaker, settings) for speaker in speakers]
        self.folded = False
        if not settings.think:
            for speaker in speakers:
                self._require_no_thought(speaker)

    def handle(self, line: str) -> None:
        """A question, or a command.

        Raises:
            UserError: it cannot be done; all is as before.
            EOFError: the session is to end.
        """
        line = line.encode("utf-8", "replace").decode().strip()  # a terminal may send anything
        name, _, argument = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self._listen({chat: chat.ask(line) for chat in self.conversations})
            return
        command = getattr(self, f"_{name[1:]}", None) if name in _names() else None
        if command is None:
            raise UserError(f"{name} is no command; there are {' '.join(_names())}.")
        command(argument.strip())

    def rows(self) -> list[dict[str, Any]]:
        """The conversations, as rows of training data."""
        return [
            {"checkpoint": chat.speaker.name, "conversations": chat.messages}
            for chat in self.conversations
            if chat.history
        ]

    def load(self, file: Path) -> None:
        """Go on where a file's rows end: each checkpoint with the last of its name, or of all.

        Raises:
            UserError: it is not as `/save` writes it.
        """
        try:
            rows = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line]
            for chat in self.conversations:
                own = [row for row in rows if row.get("checkpoint") == chat.speaker.name]
                messages = (own or rows)[-1]["conversations"]
                chat.speaker.prompt(messages, (), think=True)  # whether it can be asked at all
                if messages[0]["role"] == "system":
                    self.settings.system, messages = messages[0]["content"], messages[1:]
                chat.history = messages
        except FileNotFoundError:
            raise UserError(f"{file} is missing; /save writes such a file.") from None
        except IsADirectoryError:
            raise UserError(f"{file} is a folder; name a file that /save wrote.") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not as /save writes it: {error!r}.") from None

    def keep(self) -> Path | None:
        """Save what was said where the terminal is gone; None if nothing was."""
        if not self.rows():
            return None
        file = KEPT / f"{datetime.now():%Y-%m-%d-%H%M%S}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        self._write(file)
        return file

    def _listen(self, replies: Mapping[Conversation, Iterator[Reply]]) -> None:
        """Show replies as they grow, a token of each at a time; Ctrl-C ends them."""
        failures: dict[Conversation, UserError] = {}
        growing, shown = dict(replies), 0.0
        live = Live(console=self.console, auto_refresh=False, transient=True)
        if self.console.is_terminal:
            live.start()
        try:
            while growing:
                failures |= advance(growing)
                if live.is_started and time.monotonic() - shown > REFRESH_SECONDS:
                    live.update(self._columns(failures, self.console.height - 3), refresh=True)
                    shown = time.monotonic()
        except KeyboardInterrupt:
            for chat, reply in growing.items():
                reply.close()  # type: ignore[attr-defined]
                if chat.reply:
                    chat.reply.note = "stopped."
        finally:
            live.stop()
        if failures and len(failures) == len(replies):
            raise next(iter(failures.values()))
        self.console.print(self._columns(failures))

    def _columns(
        self, failures: Mapping[Conversation, UserError], height: int | None = None
    ) -> RenderableType:
        """The last replies beside each other; with a height, only the ends of long ones."""
        width = self.console.width // len(self.conversations) - 2
        texts = []
        for chat in self.conversations:
            text = self._text(chat.reply) if chat.reply else Text()
            if chat in failures:
                text = Text(f"{failures[chat]}", "yellow")
            if height:
                lines = text.wrap(self.console, width)
                text = Text("\n").join(lines[-height:])
            texts.append(text)
        if len(texts) == 1:
            return texts[0]
        table = Table(box=box.SIMPLE, expand=True, padding=(0, 1))
        for chat in self.conversations:
            table.add_column(Text(chat.speaker.name), ratio=1, overflow="fold")
        table.add_row(*texts)
        return table

    def _text(self, reply: Reply) -> Text:
        text = Text()
        for part in reply.parts:
            sign, style = STYLES[part.kind]
            if part.kind == "thought" and self.folded:
                part = Part("thought", f"{len(part.text):,} characters thought; /fold shows them")
                sign = "▸ "
            text.append(f"{sign}{_printable(part.text)}\n", style)
        if reply.note:
            text.append(f"{reply.note}\n", "yellow")
        text.append(summary(reply), "dim")
        return text

    def _system(self, text: str) -> None:
        self.settings.system = text

    def _reset(self, _: str) -> None:
        for chat in self.conversations:
            chat.reset()

    def _regenerate(self, _: str) -> None:
        self._listen({chat: chat.regenerate() for chat in self.conversations})
        if not self.settings.temperature:
            self.console.print("The same again: the temperature is 0.", style="dim")

    def _compare(self, said: str) -> None:
        if not said:
            raise UserError("name a checkpoint: /compare dpo, /compare dpo@main.")
        speaker = self.open_speaker(said)
        if not self.settings.think:
            self._require_no_thought(speaker)
        added = Conversation(speaker, self.settings)
        added.history = list(self.conversations[0].history)
        self.conversations.append(added)
        if added.history:
            self._listen({added: added.regenerate()})

    def _temperature(self, said: str) -> None:
        if not said:
            self.console.print(f"{self.settings.temperature:g}", style="dim")
            return
        temperature = _number(said, float, "/temperature 0.7")
        if not (temperature == 0 or 0.01 <= temperature <= 10):
            raise UserError(f"the temperature is {said}; it must be 0, or from 0.01 to 10.")
        self.settings.temperature = temperature

    def _seed(self, said: str) -> None:
        if not said:
            self.console.print(f"{self.settings.seed}", style="dim")
            return
        seed = _number(said, int, "/seed 7")
        if not 0 <= seed < 2**63:
            raise UserError(f"the seed is {said}; it must be a whole number from 0 to 2**63 - 1.")
        self.settings.seed = seed

    def _tokens(self, _: str) -> None:
        for chat in self.conversations:
            if chat.reply:
                self.console.print(_token_table(chat))

    def _fold(self, _: str) -> None:
        self.folded = not self.folded
        if any(chat.reply for chat in self.conversations):
            self.console.print(self._columns({}))

    def _save(self, said: str) -> None:
        if not said:
            raise UserError("name a file: /save chats.jsonl.")
        if not self.rows():
            raise UserError("nothing was said yet.")
        try:
            self._write(Path(said))
        except OSError as error:
            raise UserError(f"{said} cannot be written: {error.strerror}.") from None
        self.console.print(f"{said}: rows added: {len(self.rows())}.", style="dim")

    def _write(self, file: Path) -> None:
        with file.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for command, meaning in HELP.items():
            table.add_row(Text(command), Text(meaning, "dim"))
        self.console.print(table)

    def _exit(self, _: str) -> None:
        raise EOFError

    def _require_no_thought(self, speaker: Speaker) -> None:
        if not speaker.can_skip_thought:
            raise UserError(
                f"{speaker.name}: its chat template has no enable_thinking; leave --no-think out."
            )


def _names() -> list[str]:
    return [command.partition(" ")[0] for command in HELP]


def _number(said: str, kind: Callable[[str], Any], example: str) -> Any:
    try:
        return kind(said)
    except ValueError:
        raise UserError(f"{said!r} is no number that fits here; say one, as {example}.") from None


def _printable(text: str) -> str:
    """Without what would move a terminal's cursor, or change its colours."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _token_table(chat: Conversation) -> Table:
    assert chat.reply is not None

    def said(id_: int, logprob: float) -> tuple[str, str]:
        text = _printable(chat.speaker.token_text(id_)).replace("\n", "⏎").replace(" ", "␣")
        return text, f"{100 * math.exp(logprob):.1f}"

    table = Table("token", "%", "instead, %", title=chat.speaker.name, box=box.SIMPLE_HEAD)
    for token in chat.reply.tokens:
        text, percent = said(token.id, token.logprob)
        style = "green" if float(percent) >= 90 else "yellow" if float(percent) >= 50 else "red"
        others = [said(*other) for other in token.alternatives if other[0] != token.id]
        shown = "   ".join(f"{other} {share}" for other, share in others if share != "0.0")
        table.add_row(Text(text), Text(percent, style), Text(shown, "dim"))
    return table
