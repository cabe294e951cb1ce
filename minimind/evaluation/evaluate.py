"""What a checkpoint can do: answers to held-out problems, and the likelihood of held-out text.

A chat model is asked as a chat; a model that knows raw text only gets the beginning of a text
that goes on with the answer, and its first line counts. Some problems are asked as raw text of all.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from pydantic import Field, PositiveInt

from minimind.chat.answers import before_tags, find_answer, is_full_sentence, is_number, thought_of
from minimind.chat.tokenizer import CONTEXT, ChatTokenizer
from minimind.compute.precision import DType
from minimind.errors import UserError
from minimind.evaluation.likelihood import Fork, branch_logprobs
from minimind.metrics import Number
from minimind.model.generate import generate
from minimind.model.transformer import Transformer
from minimind.params import Section
from minimind.tasks.problem import Problem, encode_prompts

MAX_TURNS = 3  # of a model that calls tools


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
    full_sentence: bool  # never of one that was cut off
    in_form: bool  # whether the output is an answer and nothing else; as above
    complete_think: bool
    thinking_tokens: int | None  # None without a complete thought
    choice: str | None = None  # the likeliest of the problem's choices
    choice_correct: bool | None = None


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
        <part>_<task>: of scorings that tell more, as tool_choice and calls
        choice, choice_<task>: problems whose right choice is the likeliest (see `_choose`)
        text_bits_per_byte: of the texts, as raw text

    and of the outputs to problems without a task, if there are any:
        in_form: those that came to their end, and are an answer and nothing else: a number, or a
            whole sentence
        complete_think: those that are one <think>..</think> and one <answer>..</answer>
        full_sentence: those that answer in a whole sentence to its end, be it right or wrong
        unfinished: those cut off before they came to an end
        thinking_tokens: mean length of the complete thoughts, 0 if there are none

    Raises:
        UserError: a problem is too long for the model, or the model's weights are out of bounds.
    """
    if as_text:
        problems = [replace(problem, as_text=True) for problem in problems]
    predictions = _answer(model, tokenizer, problems, config)
    predictions = _choose(model, tokenizer, problems, predictions, config)
    metrics: dict[str, Number] = {}
    for name, group in _groups(predictions, by_level=True).items():
        metrics[f"exact{name}"] = fmean(p.correct for p in group)
    told: dict[str, list[bool]] = {}
    for problem, p in zip(problems, predictions, strict=True):
        for part, is_right in problem.parts(p.output).items():
            told.setdefault(f"{part}_{p.task}" if p.task else part, []).append(is_right)
    metrics |= {name: fmean(values) for name, values in told.items()}
    for name, group in _groups(predictions, by_level=False).items():
        if chosen := [p.choice_correct for p in group if p.choice_correct is not None]:
            metrics[f"choice{name}"] = fmean(chosen)
    if texts:
        metrics["text_bits_per_byte"] = text_bits_per_byte(model, tokenizer, texts, config.dtype)
    if without_task := [p for p in predictions if p.task is None]:
        metrics["in_form"] = fmean(p.in_form for p in without_task)
        metrics["complete_think"] = fmean(p.complete_think for p in without_task)
        metrics["full_sentence"] = fmean(p.full_sentence for p in without_task)
        metrics["unfinished"] = fmean(not p.finished for p in without_task)
        lengths = [p.thinking_tokens for p in without_task if p.thinking_tokens is not None]
        metrics["thinking_tokens"] = fmean(lengths or [0])
    return metrics, predictions


def _groups(predictions: Sequence[Prediction], by_level: bool) -> dict[str, list[Prediction]]:
    """Predictions by what the names of their metrics end with: _<task>, or _l<level> without one.

    Nothing, without a level or where these are not told apart. Those without a task come first.
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
) -> list[Prediction]:
    """The greedy answers; where one calls tools, with what they say and what follows."""
    outputs, finished = [""] * len(problems), [True] * len(problems)
    asked = dict(enumerate(problems))
    for _ in range(MAX_TURNS):
        completed = _complete(model, tokenizer, [*asked.values()], config)
        going_on: dict[int, Problem] = {}
        for (i, problem), (output, is_finished) in zip(asked.items(), completed, strict=True):
            outputs[i], finished[i] = outputs[i] + output, is_finished
            turns = [] if problem.as_text or not is_finished else problem.after(output)
            chat = [*problem.messages, *turns]
            if turns and len(tokenizer.encode_prompt(chat)) < model.config.max_positions:
                going_on[i] = replace(problem, messages=chat)
                outputs[i] += "".join(
                    f"\n<tool_response>\n{turn['content']}\n</tool_response>\n"
                    for turn in turns[1:]
                )
        asked = going_on
    answered = zip(problems, outputs, finished, strict=True)
    return [_prediction(tokenizer, *one) for one in answered]


def _complete(
    model: Transformer,
    tokenizer: ChatTokenizer,
    problems: Sequence[Problem],
    config: EvaluateConfig,
) -> list[tuple[str, bool]]:
    """What the model says next to each problem, and whether it came to its end."""
    prompts = encode_prompts(problems, tokenizer, model.config.max_positions)
    # Only a matter of speed, since what follows a line is cut off anyway. With a tokenizer that
    # spells a line break in several tokens, each of them may stand elsewhere too.
    line_break = tokenizer.encode_text("\n")
    line_break = line_break if len(line_break) == 1 else []
    completed: dict[int, tuple[str, bool]] = {}
    for as_text in (False, True):  # a batch is asked alike, its prompts of similar length
        asked = [i for i, problem in enumerate(problems) if problem.as_text == as_text]
        asked.sort(key=lambda index: len(prompts[index]))
        for start in range(0, len(asked), config.batch_size):
            batch = asked[start : start + config.batch_size]
            completions = generate(
                model,
                [prompts[index] for index in batch],
                max_new_tokens=config.max_new_tokens,
                end_id=tokenizer.end_id,
                other_end_ids=line_break if as_text else (),
                dtype=config.dtype,
            )
            for i, ids, finished in zip(batch, completions.ids, completions.finished, strict=True):
                completed[i] = tokenizer.decode(ids), finished
    return [completed[index] for index in range(len(problems))]


def _prediction(
    tokenizer: ChatTokenizer, problem: Problem, output: str, finished: bool
) -> Prediction:
    if problem.as_text and "\n" in output:
        output, finished = output.split("\n", 1)[0], True
    score = problem.score(before_tags(output) if problem.as_text else output)
    thought = thought_of(output)
    is_sentence = finished and is_full_sentence(output, problem.full)
    return Prediction(
        id=problem.id,
        problem=problem.problem,
        level=problem.level,
        task=problem.task,
        prompt=problem.text_prompt if problem.as_text else problem.prompt,
        output=output,
        parsed=score.said,
        answer=problem.answer or "",
        correct=score.correct,
        finished=finished,
        full_sentence=is_sentence,
        in_form=is_sentence or (finished and is_number(output.strip())),
        complete_think=thought is not None,
        thinking_tokens=None if thought is None else len(tokenizer.encode_text(thought)),
    )


def _choose(
    model: Transformer,
    tokenizer: ChatTokenizer,
    problems: Sequence[Problem],
    predictions: Sequence[Prediction],
    config: EvaluateConfig,
) -> list[Prediction]:
    """The predictions with the likeliest of each problem's choices.

    A choice is put in the place of the answer in the model's own output, and the whole row is
    scored: so every model chooses in the form that it speaks in, a number, a sentence or a
    thought and an answer. In an output without an answer, a choice takes the output's place.
    """
    chosen = list(predictions)
    asked = [index for index, problem in enumerate(problems) if problem.choices]
    answered = []
    for index in asked:
        output = predictions[index].output
        found = find_answer(output)
        before, after = (output[: found.start], output[found.end :]) if found else ("", "")
        for choice in problems[index].choices:
            answered.append((problems[index], before + choice + after))
    rows = _encode_rows(tokenizer, answered)
    forks = [Fork.of_rows([next(rows) for _ in problems[index].choices]) for index in asked]
    for index, logprobs in zip(asked, branch_logprobs(model, forks, config.dtype), strict=True):
        problem, best = problems[index], logprobs.index(max(logprobs))
        right = best == problem.label
        chosen[index] = replace(chosen[index], choice=problem.choices[best], choice_correct=right)
    return chosen


def _encode_rows(
    tokenizer: ChatTokenizer, answered: Sequence[tuple[Problem, str]]
) -> Iterator[list[int]]:
    """Prompt and output, with what ends an output."""
    chats = [
        [*problem.messages, {"role": "assistant", "content": output}]
        for problem, output in answered
        if not problem.as_text
    ]
    encoded = iter(tokenizer.encode_chats(chats))  # all at once is many times faster
    for problem, output in answered:
        if problem.as_text:
            text = f"{problem.text_prompt}{output}\n"
            yield [tokenizer.start_id, *tokenizer.encode_text(text)]
        else:
            row = next(encoded)
            # After the end token a chat goes on with a line break, no part of the answer.
            yield row.ids[: len(row.loss_mask.rstrip(bytes([CONTEXT])))]
