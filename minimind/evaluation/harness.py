"""A checkpoint behind EleutherAI's lm-evaluation-harness (extra lm-eval), by our own likelihoods.

The numbers are those of `--model hf`: text becomes tokens as there, and what is too long loses its
beginning. Choices of one question share it, and questions of one task their examples.
"""

import csv
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from pydantic import Field, PositiveInt
from transformers import AutoTokenizer

from minimind.compute.precision import DType
from minimind.datasets.formats import BadRowError, read_rows, shown_keys
from minimind.datasets.sources import Place
from minimind.errors import UserError
from minimind.evaluation.likelihood import Fork, Likelihood, branch_likelihoods
from minimind.metrics import Number
from minimind.model.checkpoint import load_model
from minimind.model.generate import generate
from minimind.params import Section


class LmEvalConfig(Section):
    """The `lm_eval` section of lm-eval/params.yaml."""

    tasks: list[str] = Field(min_length=1)  # of our folder, or of the harness: those need a network
    num_fewshot: int | None = Field(None, ge=0)  # examples before each question; None: the task's
    limit: PositiveInt | None = None  # questions of each task; None: all
    apply_chat_template: bool = False  # to checkpoints that know more than raw text
    text_checkpoints: list[str] = Field(default=[])  # the others
    batch_size: PositiveInt = 64  # answers written at a time; likelihoods are batched by tokens
    dtype: DType = "float32"


class MiniMindLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint as the harness's model, for `lm_eval.simple_evaluate(model=...)`, too."""

    max_gen_toks = 256  # where a task does not say
    tokenizer_name = ""  # the base has a property here

    def __init__(
        self,
        checkpoint: Path | str,
        device: torch.device | str = "cpu",
        dtype: DType = "float32",
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.model = load_model(checkpoint).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
        if self.tokenizer.eos_token is None:
            raise UserError(f"{checkpoint}/tokenizer_config.json has no eos_token; add it.")
        self.prefix = self.tokenizer.bos_token or self.tokenizer.eos_token
        self.tokenizer_name = str(checkpoint)
        self.max_length, self.dtype = self.model.config.max_positions, dtype
        self.batch_size = batch_size
        self._encoded: dict[str, list[int]] = {}  # texts that are about to be asked for

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that has nothing before it."""
        return self.tokenizer.convert_tokens_to_ids(self.prefix)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_others: Any
    ) -> list[int]:
        """Ids of a text, control tokens in it included: the harness renders chats to text."""
        if add_special_tokens is None:
            if string in self._encoded:
                return self._encoded[string]
            add_special_tokens = not string.startswith(self.prefix)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """As the harness's own, which encodes texts one by one, and most of them several times."""
        texts = {
            text
            for context, continuation in (request.args for request in requests)
            for text in (context.rstrip(), context + continuation)
        }
        for special in (True, False):  # whether the tokenizer adds its own before and behind
            group = [text for text in texts if text.startswith(self.prefix) is not special]
            encode = self.tokenizer.backend_tokenizer.encode_batch_fast
            encoded = (each.ids for each in encode(group, add_special_tokens=special))
            self._encoded |= zip(group, encoded, strict=True)
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._encoded = {}

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_others: Any,
    ) -> list[Likelihood]:
        asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        branches: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}  # by what is before them
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a text to be scored has {len(continuation)} tokens; the model has "
                    f"{self.max_length} positions: leave its task out."
                )
            prefix = tuple(context[-(self.max_length + 1 - len(continuation)) :])
            asked.append((prefix, tuple(continuation)))
            branches.setdefault(prefix, {})[tuple(continuation)] = None
        prefixes = sorted(branches)  # so that those that begin alike stand together
        forks = [Fork(prefix, [*branches[prefix]]) for prefix in prefixes]
        found = branch_likelihoods(self.model, forks, self.dtype)
        by_branch = {
            (prefix, branch): likelihood
            for prefix, likelihoods in zip(prefixes, found, strict=True)
            for branch, likelihood in zip(branches[prefix], likelihoods, strict=True)
        }
        answers = [by_branch[row] for row in asked]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text, in windows of all positions."""
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scored = iter(self._loglikelihood_tokens([*chain.from_iterable(windows)]))
        return [sum(next(scored)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes greedily after each context, up to a stop sequence."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        written = [""] * len(requests)
        for options, numbers in groups.items():
            contexts = [requests[number].args[0] for number in numbers]
            texts = self._write(contexts, json.loads(options))
            for number, text in zip(numbers, texts, strict=True):
                written[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return written

    def _write(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        options = normalize_gen_kwargs(asked, self.max_gen_toks)
        if options["do_sample"]:
            raise UserError("a task asks for sampling; only greedy answers are supported.")
        if (room := self.max_length - options["max_gen_toks"]) <= 0:
            raise UserError(
                f"a task asks for {options['max_gen_toks']} new tokens; the model has "
                f"{self.max_length} positions for prompt and answer: set fewer, or leave it out."
            )
        eos = self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(options.get("until"), eos)
        stops = [self.tok_encode(text, add_special_tokens=False) for text in until if text]
        prompts = [self.tok_encode(text)[-room:] or [self.prefix_token_id] for text in contexts]
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            completions = generate(
                self.model,
                [prompts[number] for number in batch],
                max_new_tokens=options["max_gen_toks"],
                end_id=self.eot_token_id,
                other_end_ids=[ids[0] for ids in stops if len(ids) == 1],
                dtype=self.dtype,
                share_prefix=True,
            )
            for number, ids in zip(batch, completions.ids, strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                texts[number] = postprocess_generated_text(text, until, None)
        return texts


def judge(
    model: LM, name: str, config: LmEvalConfig, folder: Path
) -> tuple[dict[str, Number], str]:
    """What the harness finds: <task>_<metric>[_<filter>] and its _stderr, and its own table.

    folder: of task files, besides those of the harness.

    Raises:
        UserError: there is no such task, or it asks for what the model does not have.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = TaskManager(include_path=folder, include_defaults=False)
    ours = tasks.all_tasks
    if not all(tasks.match_tasks([task]) for task in config.tasks):
        tasks = TaskManager(include_path=folder)  # takes seconds: there are thousands
    if unknown := [task for task in config.tasks if not tasks.match_tasks([task])]:
        raise UserError(
            f"there is no task {unknown[0]}; {folder} has {', '.join(ours)}; `lm_eval ls tasks` "
            "lists those of the harness."
        )
    asked = tasks.match_tasks(config.tasks)
    results = simple_evaluate(
        model,
        tasks=asked,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        apply_chat_template=config.apply_chat_template and name not in config.text_checkpoints,
        task_manager=tasks,
        log_samples=False,
    )
    found = results["results"]
    # Of a group its own numbers alone, not those of its dozens of tasks.
    return dict(_numbers({k: found[k] for k in found if k in asked} or found)), make_table(results)


def _numbers(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Number]]:
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if filter_name and isinstance(value, int | float) and math.isfinite(value):
                stem, is_error = metric.removesuffix("_stderr"), metric.endswith("_stderr")
                name = f"{task}_{stem}" + f"_{filter_name}" * (filter_name != "none")
                yield name.replace("-", "_") + "_stderr" * is_error, value


def read_splits(
    files: Mapping[str, str], columns: Sequence[str], **_metadata: Any
) -> dict[str, Dataset]:
    """The rows of a task's files, for its key `custom_dataset`: .csv as C-Eval and CMMLU have them,
    .jsonl as GSM8K. All values are texts, and what is not listed in `columns` is left out.

    Raises:
        UserError: a file is missing or empty, or a row has no such column.
    """
    return {split: Dataset.from_list(_rows(Path(name), columns)) for split, name in files.items()}


def _rows(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    def parse(record: dict[Any, Any]) -> dict[str, str]:
        if None in record:
            raise UserError("it has more values than columns; quote those that have commas in them")
        if missing := [column for column in columns if record.get(column) in (None, "")]:
            raise UserError(f"there is no {missing[0]}; the row has {shown_keys(record)}: add it")
        return {column: str(record[column]) for column in columns}

    if file.suffix == ".jsonl":
        return [row.value for row in read_rows(file, parse)]
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    reader = csv.DictReader(StringIO(text), strict=True)
    rows: list[dict[str, str]] = []
    try:
        rows.extend(map(parse, reader))
    except (UserError, csv.Error) as error:
        raise BadRowError(Place(file, reader.reader.line_num), str(error)) from None
    if not rows:
        raise UserError(f"{file} has no rows; put some there.")
    return rows
