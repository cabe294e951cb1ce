"""A conversation with a checkpoint: what was said, and how it is asked."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from minimind.chat.calls import calls_in
from minimind.errors import UserError
from minimind.mini_world.tools import SPECS, run_tool
from minimind.talk.parts import Part, parts_of
from minimind.talk.speaker import Speaker
from minimind.talk.stream import Stream, Token

MOST_ROUNDS = 8  # of calls and results in a reply


@dataclass
class Settings:
    """How all checkpoints of a session are asked; may change between questions."""

    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1
    max_new_tokens: int = 512  # of each of a reply's turns
    think: bool = True  # False: an answer begins with an empty thought
    tools: bool = False  # whether it is told of the built-in tools; calls are answered anyway


@dataclass
class Reply:
    """What a checkpoint says to a question; grows while it speaks."""

    messages: list[dict[str, Any]] = field(default_factory=list)  # of roles assistant and tool
    tokens: list[Token] = field(default_factory=list)
    first_seconds: float = 0.0  # until the first token
    seconds: float = 0.0
    note: str = ""  # why it ended, if not by itself

    @property
    def parts(self) -> list[Part]:
        parts: list[Part] = []
        for message in self.messages:
            is_result = message["role"] == "tool"
            text = message["content"]
            parts += [Part("result", text)] if is_result else parts_of(text)
        return parts

    @property
    def speed(self) -> float:
        """Tokens per second, after the first."""
        return (len(self.tokens) - 1) / max(self.seconds - self.first_seconds, 1e-9)


class Conversation:
    """A chat with one checkpoint. What fails leaves it as it was."""

    def __init__(self, speaker: Speaker, settings: Settings) -> None:
        self.speaker, self.settings = speaker, settings
        self.history: list[dict[str, Any]] = []  # without the system prompt
        self.reply: Reply | None = None  # the last one
        self._stream = Stream(speaker.model)
        self._num_replies = 0  # each is drawn with noise of its own

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All that was said, and the system prompt that is in force."""
        system = self.settings.system
        return ([{"role": "system", "content": system}] if system else []) + self.history

    def ask(self, question: str) -> Iterator[Reply]:
        """The growing reply, after each token.

        Raises:
            UserError: there is no room for an answer, or the template cannot ask so.
        """
        yield from self._answer([*self.history, {"role": "user", "content": question}])

    def regenerate(self) -> Iterator[Reply]:
        """Another reply to the last question.

        Raises:
            UserError: nothing was asked yet, or as for :meth:`ask`.
        """
        asked = [n for n, message in enumerate(self.history) if message["role"] == "user"]
        if not asked:
            raise UserError("nothing was asked yet.")
        yield from self._answer(self.history[: asked[-1] + 1])

    def reset(self) -> None:
        self.history, self.reply, self._num_replies = [], None, 0

    def _answer(self, history: list[dict[str, Any]]) -> Iterator[Reply]:
        settings, tokenizer = self.settings, self.speaker.tokenizer
        before, started = self.history, time.perf_counter()
        reply, self.history = Reply(), history
        try:
            for _ in range(MOST_ROUNDS):
                ids: list[int] = []
                tools = [*SPECS.values()] if settings.tools else []
                prompt, opening = self.speaker.prompt(self.messages, tools, settings.think)
                stream = self._stream.tokens(
                    prompt,
                    max_new_tokens=settings.max_new_tokens,
                    end_ids=self.speaker.end_ids,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    seed=(settings.seed * 1_000_003 + self._num_replies) % 2**63,
                )
                said = {"role": "assistant", "content": opening}
                for token in stream:
                    if not reply.tokens:
                        self.reply, self._num_replies = reply, self._num_replies + 1
                        reply.first_seconds = time.perf_counter() - started
                    if not ids:
                        history.append(said)
                        reply.messages.append(said)
                    ids.append(token.id)
                    reply.tokens.append(token)
                    # The last characters may have bytes yet to come.
                    said["content"] = opening + tokenizer.decode(ids).rstrip("\ufffd")
                    reply.seconds = time.perf_counter() - started
                    yield reply
                if ids[-1] not in self.speaker.end_ids:
                    full = len(prompt) + len(ids) >= self.speaker.model.config.max_positions
                    reply.note = (
                        "cut off: the model's positions are full; /reset begins anew."
                        if full
                        else f"cut off after {len(ids)} tokens; --max-new-tokens allows more."
                    )
                    return
                if not (calls := calls_in(said["content"])):
                    if not reply.parts:
                        reply.note = "an empty answer."
                    return
                for call in calls:
                    result = {"role": "tool", "content": run_tool(*call)}
                    history.append(result)
                    reply.messages.append(result)
                    yield reply
            reply.note = f"stopped after {MOST_ROUNDS} rounds of calls."
        except UserError as error:
            if not reply.tokens:
                raise
            reply.note = str(error)
        finally:  # an error, or stopped before the first token
            if not reply.tokens:
                self.history = before


def advance(growing: dict[Conversation, Iterator[Reply]]) -> dict[Conversation, UserError]:
    """A token more of each reply. Those that have ended leave `growing`; what stopped some of them
    is returned.
    """
    stopped: dict[Conversation, UserError] = {}
    for chat, reply in list(growing.items()):
        try:
            next(reply)
        except StopIteration:
            del growing[chat]
        except UserError as error:
            stopped[chat] = error
            del growing[chat]
    return stopped


def summary(reply: Reply) -> str:
    """How long a reply is, and how long it took."""
    if not reply.tokens:
        return ""
    speed = f", {reply.speed:.0f} tokens/s" if len(reply.tokens) > 1 else ""
    return f"{len(reply.tokens)} tokens{speed}, first after {reply.first_seconds:.2f} s"
