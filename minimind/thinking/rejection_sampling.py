"""Rejection sampling: several thoughts a prompt, those with a verified answer kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pydantic import PositiveInt, ValidationInfo, field_validator

from minimind.chat.answers import thought_of
from minimind.metrics import Number
from minimind.params import UserPath
from minimind.tasks.problem import Problem
from minimind.thinking.completions import Completion, CompletionConfig

INSTRUCTION = (
    "Think step by step inside <think></think>, "
    "then give nothing but the answer inside <answer></answer>."
)


class RejectionSamplingConfig(CompletionConfig):
    """The `rejection_sampling` section."""

    init: UserPath  # the path of the checkpoint that thinks
    num_samples: PositiveInt  # of each prompt
    max_kept_per_prompt: PositiveInt
    endpoint: str | None = None  # an OpenAI-compatible server instead of the checkpoint
    model: str | None = None  # its name there
    instruction: str = INSTRUCTION  # a system turn for the endpoint; not in the data set

    @field_validator("endpoint")
    @classmethod
    def _endpoint_is_an_address(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            try:
                _ = parts.port
            except ValueError:
                raise ValueError("its port must be a whole number from 0 to 65535") from None
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("it must be like http://localhost:8000/v1, or null")
            if parts.username or parts.password or parts.query:
                raise ValueError("a key does not belong into it; set MINIMIND_API_KEY")
        return value

    @field_validator("model")
    @classmethod
    def _an_endpoint_has_a_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("endpoint") is not None and not value:
            raise ValueError("it must name a model of the endpoint")
        return value


@dataclass
class RejectionSampling:
    """Rows of the reason data set, and rows of what did not become part of it."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    num_prompts: int = 0
    num_prompts_with_a_trace: int = 0
    num_distinct: int = 0  # verified thoughts that differ from the others of their prompt

    def add(self, prompt: Problem, completions: Sequence[Completion], max_kept: int) -> None:
        """Sort a prompt's completions.

        Kept are the first `max_kept` different thoughts, each a complete ``<think>`` and
        ``<answer>`` whose answer is the prompt's. Reasons for the others: unfinished (cut off),
        incomplete (not that form), wrong_answer, duplicate, surplus (beyond `max_kept`).
        """
        assert prompt.answer is not None, "read_problems checks that there is one"
        thoughts: set[str] = set()
        for text, finished in completions:
            thought = thought_of(text)
            key = " ".join((thought or "").split())
            if not finished:
                reason = "unfinished"
            elif thought is None:
                reason = "incomplete"
            elif not prompt.score(text).correct:
                reason = "wrong_answer"
            elif key in thoughts:
                reason = "duplicate"
            else:
                reason = "surplus" if len(thoughts) >= max_kept else ""
                thoughts.add(key)
            if reason or thought is None:
                row = {"prompt": prompt.prompt, "answer": prompt.answer, "output": text}
                self.rejected.append(row | {"reason": reason})
            else:  # a row of the reason format; the answer in the prompt's spelling
                said = f"<think>{thought.strip()}</think>\n<answer>{prompt.answer.strip()}</answer>"
                turn = {"role": "assistant", "content": said}
                self.kept.append({"conversations": [*prompt.messages, turn]})
        self.num_prompts += 1
        self.num_prompts_with_a_trace += bool(thoughts)
        self.num_distinct += len(thoughts)

    def metrics(self) -> dict[str, Number]:
        """Counts; kept_share of what was sampled, distinct_traces a prompt."""
        num_sampled = len(self.kept) + len(self.rejected)
        return {
            "prompts": self.num_prompts,
            "sampled": num_sampled,
            "kept": len(self.kept),
            "kept_share": len(self.kept) / num_sampled,
            "prompts_with_a_trace": self.num_prompts_with_a_trace,
            "distinct_traces": self.num_distinct / self.num_prompts,
        }
