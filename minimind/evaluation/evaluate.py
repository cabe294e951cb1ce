"""What a checkpoint can do: answers to held-out problems, and the likelihood of held-out text.

A chat model is asked as a chat; a model that knows raw text only gets the beginning of a text
that goes on with the answer, and its first line counts. Some problems are asked as raw text of all.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pydantic import Field, PositiveInt

from minimind.chat.answers import (
    before_tags,
    find_answer,
    is_full_sentence,
    is_number,
    thought_of,
)
from minimind.chat.tokenizer import CONTEXT, ChatTokenizer
from minimind.compute.precision import DType
from minimind.errors import UserError
from minimind.evaluation.likelihood import Fork, branch_logprobs
from minimind.metrics import Number
from minimind.model.generate import generate
from minimind.model.transformer import Transformer
from minimind.params import Section
from minimind.tasks.problem import Problem, encode_prompts


class EvaluateConfig(Section):
    """The `evaluate` section, for all checkpoints."""

    batch_size: PositiveInt = 64  # problems at a time
    max_new_tokens: PositiveInt = 256
    dtype: DType = "bfloat16"
    text_checkpoints: list[str] = Field(default=[])  # names of those that know raw text only


@dataclass(frozen=True)
class Prediction:
    """What became of one problem."""

    id: str
    problem: str
    level: int | None
    task: str | None
    prompt: str
    output: str
    parsed: str | None  # the output's answer
    answer: str  # the expected one
    correct: bool
    finished: bool  # whether the output came to its end
    full_sentence: bool
    in_form: bool  # whether the output is an answer and nothing else
    complete_think: bool
    thinking_tokens: int | None  # None without a complete thought
    choice: str | None  # the likeliest of the problem's choices
    choice_correct: bool | None


def evaluate(
    model: Transformer,
    tokenizer: ChatTokenizer,
    problems: Sequence[Problem],
    texts: Sequence[str] = (),
    config: EvaluateConfig = EvaluateConfig(),  # noqa: B008  # it is frozen
    as_text: bool = False,
) -> tuple[dict[str, Number], list[Prediction]]:
    """Metrics, and a prediction for each problem.

    Metrics, shares from 0 to 1 where nothing else is said:
        exact_l1, ..: right answers among the problems of a level; exact: of those without one
        exact_<task>: right answers among the problems of a task
        choice, choice_<task>: problems whose right choice is the likeliest (see `_choose`)
        text_bits_per_byte: of the texts, if the model knows raw text only

    and of the outputs to problems without a task, if there are any:
        in_form: those that are an answer and nothing else: a number, or a whole sentence
        complete_think: those that are one <think>..</think> and one <answer>..</answer>
        full_sentence: those that answer in a whole sentence, be it right or wrong
        unfinished: those cut off before they came to an end
        thinking_tokens: mean length of the complete thoughts, 0 if there are none

    Raises:
        UserError: a problem is too long for the model, or the model's weights are out of bounds.
    """
    predictions = _answer(model, tokenizer, problems, config, as_text)
    predictions = _choose(model, tokenizer, problems, predictions, config, as_text)
    metrics: dict[str, Number] = {}
    for name, group in _groups(predictions, by_level=True).items():
        metrics[f"exact{name}"] = _share([p.correct for p in group])
    for name, group in _groups(predictions, by_level=False).items():
        if chosen := [p.choice_correct for p in group if p.choice_correct is not None]:
            metrics[f"choice{name}"] = _share(chosen)
    if texts and as_text:
        metrics["text_bits_per_byte"] = text_bits_per_byte(model, tokenizer, texts, config.dtype)
    if without_task := [p for p in predictions if p.task is None]:
        metrics["in_form"] = _share([p.in_form for p in without_task])
        metrics["complete_think"] = _share([p.complete_think for p in without_task])
        metrics["full_sentence"] = _share([p.full_sentence for p in without_task])
        metrics["unfinished"] = _share([not p.finished for p in without_task])
        lengths = [p.thinking_tokens for p in without_task if p.thinking_tokens is not None]
        metrics["thinking_tokens"] = sum(lengths) / len(lengths) if lengths else 0.0
    return metrics, predictions


def _groups(predictions: Sequence[Prediction], by_level: bool) -> dict[str, list[Prediction]]:
    """Predictions by what the names of their metrics end with.

    This is _<task> for those of a task, whatever their level. For the others it is _l<level>
    if they are told apart by their levels and have one, and nothing otherwise. They come first.
    """
    groups: dict[tuple[str, int], list[Prediction]] = {}
    for p in predictions:
        level = p.level if by_level and p.task is None and p.level is not None else -1
        groups.setdefault((p.task or "", level), []).append(p)
    return {
        f"_{task}" if task else "" if level < 0 else f"_l{level}": groups[task, level]
        for task, level in sorted(groups)
    }


def text_bits_per_byte(
    model: Transformer, tokenizer: ChatTokenizer, texts: Sequence[str], dtype: DType
) -> float:
    """-log2 probability of documents, end tokens included, per byte (arXiv:2101.00027, sec. 3.1).

    What goes beyond the model's positions is cut off.
    """
    rows = [row.ids[: model.config.max_positions] for row in tokenizer.encode_documents(texts)]
    logprobs = branch_logprobs(model, [Fork(row[:1], [row[1:]]) for row in rows], dtype)
    num_bytes = sum(len(tokenizer.decode(row).encode()) for row in rows)
    bits = -sum(text for (text,) in logprobs) / math.log(2) / num_bytes
    if not math.isfinite(bits):
        raise UserError(
            f"the held-out text has {bits:g} bits per byte; the checkpoint's weights are out of "
            "bounds: take one from before they became so."
        )
    return bits


def _answer(
    model: Transformer,
    tokenizer: ChatTokenizer,
    problems: Sequence[Problem],
    config: EvaluateConfig,
    as_text: bool,
) -> list[Prediction]:
    """The greedy answers."""
    prompts = encode_prompts(problems, tokenizer, model.config.max_positions, as_text)
    # Only a matter of speed, since what follows a line is cut off anyway. With a tokenizer that
    # spells a line break in several tokens, each of them may stand elsewhere too.
    line_break = tokenizer.encode_text("\n")
    line_break = line_break if len(line_break) == 1 else []
    outputs: list[tuple[str, bool]] = [("", False)] * len(problems)
    for batch in _batches(problems, prompts, config.batch_size, as_text):
        asked_as_text = as_text or problems[batch[0]].as_text
        completions = generate(
            model,
            [prompts[index] for index in batch],
            max_new_tokens=config.max_new_tokens,
            end_id=tokenizer.end_id,
            other_end_ids=line_break if asked_as_text else (),
            dtype=config.dtype,
        )
        for index, ids, finished in zip(batch, completions.ids, completions.finished, strict=True):
            outputs[index] = (tokenizer.decode(ids), finished)
    return [
        _prediction(tokenizer, problem, *output, as_text or problem.as_text)
        for problem, output in zip(problems, outputs, strict=True)
    ]


def _batches(
    problems: Sequence[Problem], prompts: Sequence[Sequence[int]], size: int, as_text: bool
) -> Iterator[list[int]]:
    """Numbers of problems that are asked alike, those with prompts of similar length together."""
    for kind in (False, True):
        asked = [i for i, problem in enumerate(problems) if (as_text or problem.as_text) == kind]
        asked.sort(key=lambda index: len(prompts[index]))
        yield from (asked[start : start + size] for start in range(0, len(asked), size))


def _prediction(
    tokenizer: ChatTokenizer, problem: Problem, output: str, finished: bool, as_text: bool
) -> Prediction:
    if as_text and "\n" in output:
        output, finished = output.split("\n", 1)[0], True
    score = problem.score(before_tags(output) if as_text else output)
    thought = thought_of(output)
    return Prediction(
        id=problem.id,
        problem=problem.problem,
        level=problem.level,
        task=problem.task,
        prompt=problem.text_prompt if as_text else problem.prompt,
        output=output,
        parsed=score.said,
        answer=problem.answer or "",
        correct=score.correct,
        finished=finished,
        full_sentence=is_full_sentence(output, problem.full),
        in_form=is_number(output.strip()) or is_full_sentence(output, problem.full),
        complete_think=thought is not None,
        thinking_tokens=None if thought is None else len(tokenizer.encode_text(thought)),
        choice=None,
        choice_correct=None,
    )


def _choose(
    model: Transformer,
    tokenizer: ChatTokenizer,
    problems: Sequence[Problem],
    predictions: Sequence[Prediction],
    config: EvaluateConfig,
    as_text: bool,
) -> list[Prediction]:
    """The predictions with the likeliest of each problem's choices.

    A choice is put in the place of the answer in the model's own output, and the whole row is
    scored: so every model chooses in the form that it speaks in, a number, a sentence or a
    thought and an answer. In an output without an answer, a choice takes the output's place.
    """
    chosen = list(predictions)
    asked = [index for index, problem in enumerate(problems) if problem.choices]
    rows = _encode_rows(
        tokenizer,
        [
            (problems[index], _put(choice, predictions[index].output))
            for index in asked
            for choice in problems[index].choices
        ],
        as_text,
    )
    forks = [Fork.of_rows([next(rows) for _ in problems[index].choices]) for index in asked]
    for index, logprobs in zip(asked, branch_logprobs(model, forks, config.dtype), strict=True):
        best = max(range(len(logprobs)), key=lambda choice: logprobs[choice])
        chosen[index] = replace(
            chosen[index],
            choice=problems[index].choices[best],
            choice_correct=best == problems[index].label,
        )
    return chosen


def _put(choice: str, output: str) -> str:
    found = find_answer(output)
    return output[: found.start] + choice + output[found.end :] if found else choice


def _encode_rows(
    tokenizer: ChatTokenizer, answered: Sequence[tuple[Problem, str]], as_text: bool
) -> Iterator[list[int]]:
    """Prompt and output, with what ends an output."""
    chats = [
        [*problem.messages, {"role": "assistant", "content": output}]
        for problem, output in answered
        if not (as_text or problem.as_text)
    ]
    encoded = iter(tokenizer.encode_chats(chats))  # all at once is many times faster
    for problem, output in answered:
        if as_text or problem.as_text:
            text = f"{problem.text_prompt}{output}\n"
            yield [tokenizer.start_id, *tokenizer.encode_text(text)]
        else:
            row = next(encoded)
            # After the end token a chat goes on with a line break, no part of the answer.
            yield row.ids[: len(row.loss_mask.rstrip(bytes([CONTEXT])))]


def _share(flags: Sequence[bool | None]) -> float:
    return sum(map(bool, flags)) / len(flags)
