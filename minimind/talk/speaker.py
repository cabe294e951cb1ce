"""A checkpoint to talk to: of a folder, or of a revision or experiment, through DVC."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from minimind.chat.agreement import is_asked_by_our_template
from minimind.chat.template import THOUGHT_BEGUN, Message
from minimind.chat.tokenizer import END, ChatTokenizer
from minimind.errors import UserError
from minimind.lineage.verify import CHECKPOINT_FOLDERS
from minimind.model.checkpoint import load_model
from minimind.model.transformer import Transformer

_SAMPLE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
]


@dataclass(frozen=True)
class Speaker:
    """A model, and how it is asked."""

    name: str
    model: Transformer
    tokenizer: ChatTokenizer
    template: Any = None  # transformers' tokenizer, where the checkpoint's chat template isn't ours

    @cached_property
    def end_ids(self) -> list[int]:
        return [self.tokenizer.end_id, self.tokenizer.pad_id]

    def token_text(self, id_: int) -> str:
        """What a token stands for; \ufffd for a part of a character."""
        return self.tokenizer.decode([id_]) or END

    @property
    def can_skip_thought(self) -> bool:
        return self.template is None or "enable_thinking" in self.template.chat_template

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], think: bool
    ) -> tuple[list[int], str]:
        """Ids of a chat so far, and the beginning of the answer that is among them.

        tools: descriptions of what may be called.

        Raises:
            UserError: the checkpoint's own template cannot have such messages.
        """
        if self.template is None:
            if tools:
                first = messages[0] if messages[0]["role"] == "system" else {"role": "system"}
                messages = [{**first, "tools": list(tools)}, *messages[first is messages[0] :]]
            begun = None if think else False
            return self.tokenizer.encode_prompt(messages, begun), THOUGHT_BEGUN[begun]
        try:
            asked = self.template.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=True,
                enable_thinking=think,
                return_dict=True,
            )
            return list(asked["input_ids"]), ""
        except Exception as error:  # a template may raise whatever it likes
            raise UserError(
                f"{self.name}: its own chat template cannot take this conversation: {error}; "
                "change the system prompt or tools, or /reset."
            ) from None


def open_speaker(said: str, device: torch.device | str = "cpu") -> Speaker:
    """`models/dpo`, any folder; `dpo`: in models/ or exports/; `dpo@main`, `exp-abc:models/dpo`.

    Raises:
        UserError: there is no such checkpoint, or it cannot be talked to.
    """
    places = [Path(said), *(Path(folder, said) for folder in CHECKPOINT_FOLDERS)]
    if place := next((place for place in places if place.exists()), None):
        return _load(said, place, device)
    if split_name(said)[0]:
        with _checked_out(said) as place:
            return _load(said, place, device)
    there, name = ", ".join(known_checkpoints()) or "none", split_name(said)[1] or "dpo"
    raise UserError(
        f"there is no checkpoint {said}; here are: {there}. `{name}@HEAD` is the last commit's, "
        "also while a stage makes another; `minimind pull` brings what is missing."
    )


def split_name(said: str) -> tuple[str, str]:
    """Revision, "" for the workspace, and name: of `dpo@main`, `main:models/dpo`, `dpo`."""
    revision, colon, name = said.partition(":")
    if not colon:
        name, _, revision = said.partition("@")
    return revision, name


def known_checkpoints() -> list[str]:
    """Folders of models in models/ and exports/, the newest first."""
    files = [file for name in CHECKPOINT_FOLDERS for file in Path(name).glob("*/config.json")]
    chats = [file for file in files if "SequenceClassification" not in file.read_text("utf-8")]
    return [str(file.parent) for file in sorted(chats, key=lambda file: -file.stat().st_mtime)]


def _load(name: str, place: Path, device: torch.device | str) -> Speaker:
    if not place.is_dir():
        raise UserError(f"{place} is a file; a checkpoint is a folder, as models/dpo.")
    config = place / "config.json"
    if config.is_file() and "SequenceClassification" in config.read_text("utf-8", "replace"):
        raise UserError(f"{place} is a reward model: it scores answers and gives none.")
    if (place / "adapter_config.json").is_file() and not config.is_file():
        raise UserError(f"{place} is an adapter; talk to what it is merged in, as exports/lora.")
    model = load_model(place).to(device)
    tokenizer = ChatTokenizer.load(place)
    return Speaker(name, model, tokenizer, _foreign_template(place, tokenizer))


def _foreign_template(place: Path, tokenizer: ChatTokenizer) -> Any:
    """None where the checkpoint has no template, or one that gives the same ids as ours."""
    if is_asked_by_our_template(place):
        return None
    from transformers import AutoTokenizer  # takes seconds, and few need it
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        theirs = AutoTokenizer.from_pretrained(
            place, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # it has a tokenizer.json and little else
        return None
    if not theirs.chat_template:
        return None
    speaker = Speaker(place.name, None, tokenizer, theirs)  # type: ignore[arg-type]
    try:
        is_ours = speaker.prompt(_SAMPLE, (), True)[0] == tokenizer.encode_prompt(_SAMPLE)
    except UserError:
        is_ours = False
    return None if is_ours else theirs


@contextmanager
def _checked_out(said: str) -> Iterator[Path]:
    """A folder with the files of a checkpoint of a revision, while this is open."""
    # Imported here: DVC takes as long to load as all else together.
    from dvc.exceptions import DvcException

    from minimind.comparison.runs import Project

    revision, name = split_name(said)
    with Project() as project, TemporaryDirectory() as folder:
        run = project.run(revision)
        places = [name, *(f"{folder}/{name}" for folder in CHECKPOINT_FOLDERS)]
        place = next((place for place in places if name and run.files.exists(place)), None)
        if place is None:
            outs = [out["path"] for stage in run.stages.values() for out in stage.get("outs", [])]
            known = [out for out in outs if out.startswith(CHECKPOINT_FOLDERS)]
            raise UserError(f"{revision} has no {name!r}; it has: {', '.join(known) or 'none'}.")
        try:
            run.files.get(place, f"{folder}/it", recursive=True)
        except (OSError, DvcException):
            raise UserError(
                f"{place} of {revision} is in neither cache nor remote; `minimind pull`, or "
                f"`dvc exp pull` of an experiment, brings it."
            ) from None
        yield Path(folder, "it")
