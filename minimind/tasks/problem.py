"""Problems, read from JSONL: what evaluation, reinforcement and rejection sampling ask.

{"prompt", "answer"}      where somebody scores the answer; and optionally
 "id"                     a name for it; without one, the number of its row, over all shards
 "problem"                a name that rows share which ask the same in other words: intervals count
                          problems, not rows; without one, the id
 "level"                  how hard it is: each level has a metric of its own
 "task"                   a name of lower-case letters and _, for problems of another kind: they
                          have metrics of their own and count in no others
 "scoring"                which module of minimind/tasks/ scores outputs; "exact" without one
 "as_text"                true: asked as raw text of every checkpoint; its first line is the answer
 "full"                   the answer as a whole sentence
 "choices", "label"       answers to choose from, and the index of the right one
 "completion_prompt"      how raw text would begin that goes on with the answer
 "language"               for whoever looks at the rows; nobody reads it
{"conversations"}         or "messages", in place of "prompt": a chat; "system", "tools" beside it.
                          Without an "answer", or MiniMind's "gt", its last turn has it, unless that
                          is empty or a placeholder. "prompt" may be a list of messages, too
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from minimind.chat.answers import find_answer, normalise
from minimind.chat.template import Message
from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.formats import (
    BadRowError,
    Format,
    Formats,
    Row,
    has_turns_as_prompt,
    parse_asked,
    read_rows,
    shown_keys,
)
from minimind.datasets.sources import Place, shown
from minimind.datasets.unread_keys import UnreadKeys
from minimind.errors import UserError, complaint
from minimind.tasks.task import Score, task_names, task_of


@dataclass(frozen=True)
class Problem:
    """A question and what is known of its answer; see the module's docstring."""

    number: int  # in the file, from 0
    place: Place
    id: str
    problem: str  # rows that ask the same in other words have the same
    messages: Sequence[Message]
    answer: str | None = None
    scoring: str = "exact"
    level: int | None = None
    task: str | None = None
    as_text: bool = False
    full: str | None = None
    choices: Sequence[str] = ()
    label: int | None = None
    completion_prompt: str | None = None

    @classmethod
    def of(cls, prompt: str, answer: str | None = None, number: int = 0) -> "Problem":
        """A question that stands in no file."""
        name, messages = str(number + 1), [{"role": "user", "content": prompt}]
        return cls(number, Place(Path("-"), number + 1), name, name, messages, answer)

    @classmethod
    def of_row(cls, row: Row[dict[str, Any]], number: int = 0) -> "Problem":
        """What :func:`parse_problem` made of a row."""
        name = row.value.get("id", str(number + 1))
        fields = {"id": name, "problem": name} | row.value
        return cls(number=number, place=row.place, **fields)

    @property
    def chat(self) -> list[Message]:
        """All that is said, with the answer as the last turn if there is one."""
        answer: Message = {"role": "assistant", "content": self.answer or ""}
        return [*self.messages, answer] if self.answer else [*self.messages]

    @property
    def prompt(self) -> str:
        """The last thing said to the model."""
        return self.messages[-1]["content"]

    @property
    def expected(self) -> str:
        """The answer in the one spelling of all that are equal."""
        assert self.answer is not None, "read_problems checks that there is one"
        return normalise(self.answer)

    def score(self, output: str) -> Score:
        """What an output answers, and whether that is right."""
        return task_of(self.scoring).score(self.expected, output)

    def parts(self, output: str) -> Mapping[str, bool]:
        """What else is right of an output."""
        return task_of(self.scoring).parts(self.expected, output)

    def after(self, output: str) -> list[Message]:
        """An output and what tools say to it, as messages; none if it calls none."""
        said = task_of(self.scoring).respond(output)
        turn: Message = {"role": "assistant", "content": output}
        return [turn, *({"role": "tool", "content": text} for text in said)] if said else []

    @property
    def text_prompt(self) -> str:
        """How raw text begins that a model is to go on with."""
        return self.prompt if self.completion_prompt is None else self.completion_prompt


class _Row(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)

    prompt: str = Field(min_length=1)
    answer: str | None = Field(default=None, min_length=1)
    id: str | None = None
    problem: str | None = None
    level: int | None = Field(default=None, ge=0)
    task: str | None = Field(default=None, pattern="^[a-z_]+$")
    scoring: str = "exact"
    as_text: bool = False
    full: str | None = None
    choices: list[str] = Field(default=[])
    label: int | None = None
    completion_prompt: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _label_points_at_a_choice(self) -> "_Row":
        if len(set(self.choices)) != len(self.choices) or len(self.choices) == 1:
            found = shown(self.choices)
            raise ValueError(f"choices is {found}; it must be two or more different answers")
        if self.choices and (self.label is None or not 0 <= self.label < len(self.choices)):
            raise ValueError(
                f"label is {self.label}; it must be the index of the right choice, "
                f"0 to {len(self.choices) - 1}"
            )
        return self


KNOWN_KEYS = sorted(
    {*_Row.model_fields, "conversations", "messages", "system", "tools", "gt", "language"}
)


def read_problems(
    source: Path | str,
    limit: int | None = None,
    needs_answers: bool = True,
    say: Callable[[str], object] = warnings.warn,
) -> list[Problem]:
    """The problems of a JSONL file or folder of shards, or its first ones.

    needs_answers: whether somebody is going to score outputs.
    say: is told of keys that are not known, which may be misspelt ones.

    Raises:
        UserError: the source is missing or empty.
        BadRowError: a row cannot be used; it says where and why.
    """
    problems, unread = [], UnreadKeys(KNOWN_KEYS)
    for number, row in enumerate(islice(read_rows(Path(source), parse_problem), limit)):
        unread.add(row)
        if needs_answers and "answer" not in row.value:
            reason = "answer is missing; add it, outputs are compared with it"
            raise BadRowError(row.place, reason)
        problems.append(Problem.of_row(row, number))
    if keys := unread.shown(warned=True):
        say(f"{source}: keys that are not read: {keys}")
    return problems


def encode_prompts(
    problems: Sequence[Problem], tokenizer: ChatTokenizer, max_positions: int
) -> list[list[int]]:
    """Ids of each prompt with the header of the assistant's turn, or of raw text.

    Raises:
        UserError: a prompt leaves no position for an answer.
    """
    prompts = []
    for problem in problems:
        if problem.as_text:
            ids = [tokenizer.start_id, *tokenizer.encode_text(problem.text_prompt)]
        else:
            ids = tokenizer.encode_prompt(problem.messages)
        if len(ids) >= max_positions:
            raise UserError(
                f"{problem.place}: the prompt has {len(ids)} tokens; the model has only "
                f"{max_positions} positions for prompt and answer: shorten it or leave it out."
            )
        prompts.append(ids)
    return prompts


def _parse_problem(record: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("it has half a character (as \\ud800); write both halves") from None
    messages: list[Message] = []
    has_turns = has_turns_as_prompt(record)
    if has_turns or "conversations" in record or "messages" in record:
        messages, answered = parse_asked(record)
        question = {"prompt": messages[-1]["content"]}
        record = record | question if has_turns else question | record
        if expected := find_answer(answered):
            record = {"answer": expected.value} | record
    if "gt" in record:  # MiniMind's: what an agent's last words must have
        right = record["gt"] if isinstance(record["gt"], list) else [record["gt"]]
        if len(right) != 1:
            raise UserError(f"gt has {len(right)} values; outputs are compared with one, answer")
        record = {"answer": right[0]} | record
    try:
        row = _Row.model_validate(record)
    except ValidationError as error:
        raise UserError(_wrong(error.errors()[0], record)) from None
    if row.scoring not in task_names():
        raise UserError(f"scoring is {row.scoring!r}; allowed are {', '.join(task_names())}")
    if row.answer is not None and (fault := task_of(row.scoring).fault(normalise(row.answer))):
        raise UserError(f"answer is {row.answer!r}; scored as {row.scoring}, {fault}")
    said = row.model_dump(exclude={"prompt"}, exclude_none=True)
    return said | {"messages": messages or [{"role": "user", "content": row.prompt}]}


# What a row says of its problem, by the names of fields.
parse_problem = Formats([Format("problem", frozenset(), _parse_problem, KNOWN_KEYS)])


def _wrong(detail: ErrorDetails, record: dict[str, Any]) -> str:
    key = ".".join(map(str, detail["loc"]))
    match detail["type"]:
        case "missing":
            found = f"the keys found are {shown_keys(record)}"
            return f"{key} is missing; {found}: add it or rename one"
        case "value_error":
            return complaint(detail)
        case "string_pattern_mismatch":
            allowed = "it must be lower-case letters and _"
        case _:
            allowed = complaint(detail).replace("String", "it")
    return f"{key} is {shown(detail['input'])}; {allowed}"
