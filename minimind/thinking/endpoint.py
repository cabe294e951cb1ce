"""Completions from an OpenAI-compatible endpoint: POST <endpoint>/chat/completions.

What it says cannot be computed again; DVC keeps it with the stage's outputs.
"""

import json
import random
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

from minimind.errors import UserError
from minimind.tasks.problem import Problem
from minimind.thinking.completions import Completion
from minimind.thinking.rejection_sampling import RejectionSamplingConfig

TIMEOUT_SECONDS = 300.0  # of one request
ATTEMPTS = 6
FIRST_WAIT_SECONDS = 1.0  # between two attempts; doubled each time
LONGEST_WAIT_SECONDS = 60.0  # whatever the server asks for
PASSING_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
MAX_RESPONSE_BYTES = 16 * 2**20


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to whatever host it names."""

    def redirect_request(self, *_: Any) -> None: ...


@dataclass(frozen=True)
class Endpoint:
    """A server as a source: one request a completion, `batch_size` of them at a time."""

    url: str  # such as http://localhost:8000/v1
    config: RejectionSamplingConfig
    api_key: str = field(repr=False)  # "" for none

    def __post_init__(self) -> None:
        if not self.api_key.isascii() or not self.api_key.isprintable() or " " in self.api_key:
            raise UserError("MINIMIND_API_KEY has characters that no key has; set it anew.")

    def __call__(self, prompts: Sequence[Problem]) -> list[list[Completion]]:
        """Raises UserError where the server refuses, cannot be reached, or is not understood."""
        threads = ThreadPoolExecutor(self.config.batch_size)
        try:
            samples = range(self.config.num_samples)
            rows = [[threads.submit(self._complete, p, i) for i in samples] for p in prompts]
            return [[future.result() for future in row] for row in rows]
        finally:
            threads.shutdown(cancel_futures=True)

    def _complete(self, prompt: Problem, sample: int) -> Completion:
        config = self.config
        system = [{"role": "system", "content": config.instruction}] if config.instruction else []
        key = prompt.number * config.num_samples + sample
        body = {
            "model": config.model,
            "messages": [*system, *prompt.messages],
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_tokens": config.max_new_tokens,
            # Not all servers heed it; without, some would give the same text every time.
            "seed": random.Random(f"{config.seed} {key}").getrandbits(31),
        }
        target = f"{self.url.rstrip('/')}/chat/completions"
        return _parse(self._post(target, body), target)

    def _post(self, target: str, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = json.dumps(body).encode()
        opener = urllib.request.build_opener(_NoRedirects)
        for attempt in range(ATTEMPTS):
            request = urllib.request.Request(target, data, headers, method="POST")
            wait = FIRST_WAIT_SECONDS * 2**attempt
            try:
                with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                    return bytes(response.read(MAX_RESPONSE_BYTES))
            except HTTPError as error:
                problem = f"answered {error.code}: {self._shown(error)}"
                if error.code in (401, 403):
                    problem += " (the key is read from MINIMIND_API_KEY)"
                if error.code not in PASSING_STATUSES:
                    break
                retry_after = error.headers.get("Retry-After", "")
                if retry_after.isascii() and retry_after.isdigit():
                    wait = max(wait, float(retry_after))
            except (OSError, HTTPException) as error:
                problem = f"cannot be reached: {getattr(error, 'reason', error) or error!r}"
            if attempt + 1 < ATTEMPTS:
                time.sleep(min(wait, LONGEST_WAIT_SECONDS))
        raise UserError(f"{target} {problem}.")

    def _shown(self, error: HTTPError) -> str:
        """The beginning of what the server says, without our key if it repeats that."""
        try:
            text = error.read(2000).decode("utf-8", "replace")
        except (OSError, HTTPException):
            text = ""
        if self.api_key:
            text = text.replace(self.api_key, "***")
        return " ".join(text.split())[:200] or error.reason


def _parse(answer: bytes, target: str) -> Completion:
    try:
        choice = json.loads(answer)["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        # Some servers take the thought out of the text.
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        if not isinstance(text, str) or not isinstance(thought, str):
            raise TypeError("content")
        finished = choice.get("finish_reason") == "stop"
    except (ValueError, LookupError, TypeError, AttributeError):
        shown = " ".join(answer[:200].decode("utf-8", "replace").split())
        raise UserError(f"{target} answered what is no chat completion: {shown}") from None
    if thought and "<think>" not in text:
        text = f"<think>{thought}</think>\n{text}"
    return Completion(text, finished)
