"""Scores of conversations by a reward model: any AutoModelForSequenceClassification."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from minimind.chat.template import Message
from minimind.errors import UserError
from minimind.model.stock import load_stock
from minimind.rewards.reward import Given, Reward, Sample, Values

ROWS_AT_A_TIME = 64
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})")


class RewardModelScore(Reward):
    """What a reward model says, clipped."""

    reward_model_clip: float = Field(3.0, gt=0)  # to +- this

    def bounds(self) -> tuple[float, float]:
        return -self.reward_model_clip, self.reward_model_clip

    def score(self, samples: Sequence[Sample], given: Given) -> Values:
        assert given.reward_model is not None
        return np.clip(given.reward_model(samples), *self.bounds())


REWARD = RewardModelScore


class RewardScorer:
    """A reward model with its own tokenizer and chat template.

    It reads prompt and completion as a chat of a user's and an assistant's turn. A model that
    brings code of its own may instead have ``get_scores(tokenizer, chats)``, as InternLM2's
    reward models do.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer, self.device = tokenizer, device
        self.tokenizer.padding_side = "right"
        self.control_tokens: list[str] = list(tokenizer.all_special_tokens)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """The score of each sample; higher is better, without bounds."""
        scores: list[float] = []
        for start in range(0, len(samples), ROWS_AT_A_TIME):
            chats = [
                [
                    *sample.problem.messages,
                    {"role": "assistant", "content": sample.completion},
                ]
                for sample in samples[start : start + ROWS_AT_A_TIME]
            ]
            scores += self._scores(chats)
        return scores

    def _scores(self, chats: list[list[Message]]) -> list[float]:
        with torch.no_grad():
            if hasattr(self.model, "get_scores"):
                broken = [self._broken(chat) for chat in chats]
                return [float(score) for score in self.model.get_scores(self.tokenizer, broken)]
            inputs = self.tokenizer.pad(
                {"input_ids": [self._encoded(chat) for chat in chats]}, return_tensors="pt"
            )
            logits = self.model(
                input_ids=inputs["input_ids"].to(self.device),
                attention_mask=inputs["attention_mask"].to(self.device),
            ).logits
        return logits[:, 0].float().tolist()

    def _encoded(self, chat: list[Message]) -> list[int]:
        """Ids of a chat. What a policy writes is text, even if it is spelled as a control token:
        it must not end its turn and write a better one of the user's.
        """
        if not any(token in turn["content"] for turn in chat for token in self.control_tokens):
            return list(self._rendered(chat, return_dict=True)["input_ids"])
        places = [f"\ue000{number}\ue001" for number in range(len(chat))]
        marked = [{**turn, "content": place} for turn, place in zip(chat, places, strict=True)]
        rendered = self._rendered(marked, tokenize=False)
        ids: list[int] = []
        for piece in re.split("(\ue000[0-9]+\ue001)", rendered):
            is_text = piece in places
            text = chat[places.index(piece)]["content"] if is_text else piece
            options = {"add_special_tokens": False, "split_special_tokens": is_text}
            ids += self.tokenizer(text, **options)["input_ids"]
        return ids

    def _rendered(self, chat: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(chat, **options)
        except Exception as error:  # templates raise what they like
            roles = ", ".join(turn["role"] for turn in chat)
            raise UserError(
                f"the chat template of the reward model {self.tokenizer.name_or_path} fails on "
                f"turns of {roles}: {error}; correct it."
            ) from None

    def _broken(self, chat: list[Message]) -> list[Message]:
        """Control tokens in texts broken by a space of no width: for other people's code."""
        broken: list[Message] = []
        for turn in chat:
            text = turn["content"]
            for token in self.control_tokens:
                text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
            broken.append({**turn, "content": text})
        return broken


def load_reward_model(
    directory: Path, hub_id: str | None, trust_remote_code: bool, device: torch.device
) -> RewardScorer:
    """Load a reward model from a directory or, if given, from the Hugging Face hub.

    hub_id: as in ``owner/name@<commit>``, so that it names one content for ever.
    trust_remote_code: whether Python code that comes with the model may run.

    Raises:
        UserError: there is no such model, it is no reward model with one score, its tokenizer
            has no chat template, or it brings code and that is not allowed.
    """
    # Imported here: it takes a second, and most runs have no reward model.
    import transformers

    source, options = _source(directory, hub_id)
    options |= {"trust_remote_code": trust_remote_code}
    name = f"the reward model {hub_id or directory}"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        config = transformers.AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # transformers raises whatever its parts raise
        raise UserError(f"{name} cannot be loaded: {error!r}") from None
    model = load_stock(_auto_class(transformers, config), source, name, **options)
    if not hasattr(model, "get_scores"):
        if model.config.num_labels != 1:
            raise UserError(
                f"the reward model {hub_id or directory} has {model.config.num_labels} labels; "
                "a reward model has 1."
            )
        if tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer of {hub_id or directory} has no chat template; add one."
            )
        if model.config.pad_token_id is None or tokenizer.pad_token_id != model.config.pad_token_id:
            raise UserError(
                f"{hub_id or directory}: pad_token_id of the model and of its tokenizer must be "
                "the same; scores are read before the padding."
            )
    return RewardScorer(model, tokenizer, device)


def _source(directory: Path, hub_id: str | None) -> tuple[str, dict[str, Any]]:
    if hub_id is None:
        if not (directory / "config.json").is_file():
            raise UserError(
                f"{directory / 'config.json'} is missing; run the stage `reward` first."
            )
        return str(directory), {"local_files_only": True}
    match = _HUB_ID.fullmatch(hub_id)
    if match is None:
        raise UserError(
            f"hub_reward_model is {hub_id!r}; it must be owner/name@ and the 40 digits of a commit."
        )
    return match["name"], {"revision": match["commit"]}


def _auto_class(transformers: Any, config: Any) -> Any:
    """Models with code of their own say by which class they are loaded."""
    own = getattr(config, "auto_map", None) or {}
    if "AutoModel" in own and "AutoModelForSequenceClassification" not in own:
        return transformers.AutoModel
    return transformers.AutoModelForSequenceClassification
