"""OpenAI's API over a checkpoint: `/v1/models` and `/v1/chat/completions`.

Why not by `transformers serve`, docs/decisions/0017 says. Requests take turns, a token each, on one
thread: none waits for another to end, and what is answered does not depend on who else asks.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from pydantic import ValidationError

from minimind.chat.tokenizer import ChatTokenizer
from minimind.errors import UserError, complaint
from minimind.model.checkpoint import load_model
from minimind.serve.request import ChatRequest
from minimind.serve.said import Said, parts_of
from minimind.talk.stream import Stream

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError:
    raise UserError("Serving needs an extra: pip install 'minimind-dvc[serve]'.") from None

CHECK_EVERY = 16  # tokens, between which it is looked whether anybody still listens


@dataclass
class Progress:
    """An answer as far as it is."""

    said: Said
    num_prompt_tokens: int
    num_tokens: int = 0
    finish_reason: str | None = None

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
        }


class Server:
    """A model that answers requests. Defaults are of requests that say nothing else."""

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        max_tokens: int = 1024,
        temperature: float = 0.0,
    ) -> None:
        """Raises UserError where there is no checkpoint that can be read."""
        self.name, self.max_tokens, self.temperature = folder.as_posix(), max_tokens, temperature
        self.model = load_model(folder).to(device).eval()
        self.tokenizer = ChatTokenizer.load(folder)
        self.created = int((folder / "config.json").stat().st_mtime)
        self._thread = ThreadPoolExecutor(1)

    def app(self, hosts: list[str]) -> Starlette:
        """hosts: by which it may be called; others are of pages that would misuse a browser."""
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        handlers: Mapping[Any, Any] = {
            HTTPException: lambda _, error: _error(error.status_code, error.detail),
            UserError: lambda _, error: _error(400, str(error)),
            Exception: lambda _, error: _error(500, f"{type(error).__name__}: {error}"),
        }
        guards = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
        return Starlette(routes=routes, exception_handlers=handlers, middleware=guards)

    async def _models(self, _: Request) -> Response:
        about = {"id": self.name, "object": "model", "created": self.created}
        return JSONResponse({"object": "list", "data": [about | {"owned_by": "minimind"}]})

    async def _chat(self, request: Request) -> Response:
        try:
            asked = ChatRequest.model_validate_json(await request.body())
        except ValidationError as error:
            detail = error.errors()[0]
            where = ".".join(map(str, detail["loc"]))
            unknown = "it is not supported; leave it out"
            wrong = unknown if detail["type"] == "extra_forbidden" else complaint(detail)
            return _error(400, f"{where}: {wrong}".removeprefix(": "), where or None)
        if asked.model not in (None, self.name):
            return _error(
                404, f"there is no model {asked.model!r}; there is {self.name!r}.", "model"
            )
        answer = self._steps(self.answer(asked))
        progress = await anext(answer)  # what is wrong with the prompt is found here
        if asked.stream:
            events = self._events(asked, progress, answer)
            return StreamingResponse(events, media_type="text/event-stream")
        async for progress in answer:
            if progress.num_tokens % CHECK_EVERY == 0 and await request.is_disconnected():
                return Response(status_code=499)
        said = progress.said
        message: dict[str, Any] = {"role": "assistant", "content": said.content or None}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = [_call(said, number) for number in range(len(said.calls))]
        choice = {"index": 0, "message": message, "finish_reason": progress.finish_reason}
        body = self._head("chat.completion") | {"choices": [choice], "usage": progress.usage}
        return JSONResponse(body)

    def answer(self, asked: ChatRequest) -> Iterator[Progress]:
        """The growing answer, after each token; the last has a finish_reason.

        Raises:
            UserError: the messages leave no room for an answer.
        """
        prompt, begun = asked.prompt(self.tokenizer), asked.begun()
        ends = {self.tokenizer.end_id, self.tokenizer.pad_id}
        progress = Progress(Said("", "", []), len(prompt))
        limit = asked.max_completion_tokens or asked.max_tokens or self.max_tokens
        tokens = Stream(self.model).tokens(
            prompt,
            max_new_tokens=limit,
            end_ids=ends,
            temperature=self.temperature if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=uuid4().int % 2**63 if asked.seed is None else asked.seed % 2**63,
            num_alternatives=1,
        )
        ids: list[int] = []
        text = ""
        for token in tokens:
            ids.append(token.id)
            # The last characters may have bytes yet to come.
            text = self.tokenizer.decode(ids).rstrip("\ufffd")
            progress.num_tokens = len(ids)
            found = [place for stop in asked.stop if (place := text.find(stop)) >= 0]
            if found:
                text, progress.finish_reason = text[: min(found)], "stop"
                break
            progress.said = parts_of(begun + text, is_whole=False, stops=asked.stop)
            yield progress
        else:
            progress.finish_reason = "stop" if ids[-1] in ends else "length"
        progress.said = parts_of(begun + text)
        if progress.said.calls:
            progress.finish_reason = "tool_calls"
        yield progress

    async def _steps(self, answer: Iterator[Progress]) -> AsyncIterator[Progress]:
        loop = asyncio.get_running_loop()
        while progress := await loop.run_in_executor(self._thread, next, answer, None):
            yield progress

    async def _events(
        self, asked: ChatRequest, first: Progress, answer: AsyncIterator[Progress]
    ) -> AsyncIterator[str]:
        """Server-sent events: what is new of the answer, and at last how it ended."""
        head = self._head("chat.completion.chunk")

        def event(delta: Mapping[str, Any], finish_reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            return _event(head | {"choices": [choice]})

        yield event({"role": "assistant", "content": ""})
        sent, progress = Said("", "", []), first
        while True:
            said = progress.said
            if new := said.reasoning[len(sent.reasoning) :]:
                yield event({"reasoning_content": new})
            if new := said.content[len(sent.content) :]:
                yield event({"content": new})
            for number in range(len(sent.calls), len(said.calls)):
                yield event({"tool_calls": [{"index": number} | _call(said, number)]})
            sent = said
            if progress.finish_reason:
                break
            try:
                progress = await anext(answer)
            except UserError as error:
                yield _event({"error": {"message": str(error), "type": "server_error"}})
                return
        yield event({}, progress.finish_reason)
        if asked.stream_options and asked.stream_options.include_usage:
            yield _event(head | {"choices": [], "usage": progress.usage})
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        id_ = f"chatcmpl-{uuid4().hex}"
        return {"id": id_, "object": kind, "created": int(time.time()), "model": self.name}


def run(server: Server, socket: Any, hosts: list[str]) -> None:
    """Serve on a socket until somebody stops it."""
    config = uvicorn.Config(server.app(hosts), log_level="warning", lifespan="off")
    uvicorn.Server(config).run(sockets=[socket])


def _call(said: Said, number: int) -> dict[str, Any]:
    id_, function = f"call_{uuid4().hex[:24]}", said.calls[number]._asdict()
    return {"id": id_, "type": "function", "function": function}


def _event(contents: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(contents, ensure_ascii=False)}\n\n"


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    about = {"message": message, "type": kind, "param": param, "code": None}
    return JSONResponse({"error": about}, status)
