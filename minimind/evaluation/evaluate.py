"""What a checkpoint can do: answers to held-out problems, and the likelihood of held-out text.

A chat model is asked as a chat; a model that knows raw text only gets the beginning of a text
that ends with the answer, and its first line counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import PositiveInt

from minimind.errors import UserError
from minimind.evaluation.answers import (
    find_answer,
    is_full_sentence,
    normalise,
    thought_of,
)
from minimind.evaluation.likelihood import Fork, branch_logprobs
from minimind.evaluation.problems import Problem
from minimind.generate import generate
from minimind.metrics import Number
from minimind.model.transformer import Transformer
from minimind.params import Section
from minimind.tokenizer import CONTEXT, ChatTokenizer
from minimind.training.precision import DType

LARGEST_LOSS = 700.0  # whose exponential is a number; guessing gives the logarithm of V


class EvaluateConfig(Section):
    """The `evaluate` section, for all checkpoints."""

    batch_size: PositiveInt  # problems at a time
    max_new_tokens: PositiveInt
    dtype: DType
    text_checkpoints: list[str]  # names of those that know raw text only


@dataclass(frozen=True)
class Prediction:
    """What became of one problem."""

    id: str
    level: int | None
    prompt: str
    output: str
    parsed: str | None  # the output's answer
    answer: str  # the expected one
    correct: bool
    finished: bool  # whether the output came to its end
    full_sentence: bool
    complete_think: bool
    thinking_tokens: int | None  # None without a complete thought
    choice: str | None  # the likeliest of the problem's choices
    choice_correct: bool | None


def evaluate(
    model: Transformer,
    tokenizer: ChatTokenizer,
    problems: Sequence[Problem],
    texts: Sequence[str],
    config: EvaluateConfig,
    as_text: bool,
) -> tuple[dict[str, Number], list[Prediction]]:
    """Metrics, and a prediction for each problem.

    Metrics, shares from 0 to 1 where nothing else is said:
        exact_l1, ..: right answers among the problems of a level; exact: of those without one
        choice: problems whose right choice is the likeliest (see `_choose`)
        perplexity: of the texts, per token, end token included
        complete_think: outputs that are one <think>..</think> and one <answer>..</answer>
        full_sentence: outputs that answer in a whole sentence, be it right or wrong
        unfinished: outputs cut off before they came to an end
        thinking_tokens: mean length of the complete thoughts, 0 if there are none

    Raises:
        UserError: a problem is too long for the model, or the model's loss is out of bounds.
    """
    predictions = _answer(model, tokenizer, problems, config, as_text)
    predictions = _choose(model, tokenizer, problems, predictions, config, as_text)
    metrics: dict[str, Number] = {}
    for level in sorted({p.level for p in predictions}, key=lambda level: level or 0):
        name = "exact" if level is None else f"exact_l{level}"
        metrics[name] = _share([p.correct for p in predictions if p.level == level])
    chosen = [p.choice_correct for p in predictions if p.choice_correct is not None]
    if chosen:
        metrics["choice"] = _share(chosen)
    if texts:
        metrics["perplexity"] = perplexity(model, tokenizer, texts, config.dtype)
    metrics["complete_think"] = _share([p.complete_think for p in predictions])
    metrics["full_sentence"] = _share([p.full_sentence for p in predictions])
    metrics["unfinished"] = _share([not p.finished for p in predictions])
    lengths = [p.thinking_tokens for p in predictions if p.thinking_tokens is not None]
    metrics["thinking_tokens"] = sum(lengths) / len(lengths) if lengths else 0.0
    return metrics, predictions


def perplexity(
    model: Transformer, tokenizer: ChatTokenizer, texts: Sequence[str], dtype: DType
) -> float:
    """exp of the mean negative log-probability of a token, as documents are trained on.

    What goes beyond the model's positions is cut off.
    """
    rows = [row.ids[: model.config.max_positions] for row in tokenizer.encode_documents(texts)]
    logprobs = branch_logprobs(model, [Fork(row[:1], [row[1:]]) for row in rows], dtype)
    num_scored = sum(len(row) - 1 for row in rows)
    mean = -sum(text for (text,) in logprobs) / num_scored
    if not mean < LARGEST_LOSS:  # also if it is NaN
        raise UserError(
            f"the loss of the held-out text is {mean:g}; the checkpoint's weights are out of "
            "bounds: take one from before they became so."
        )
    return math.exp(mean)


def _answer(
    model: Transformer,
    tokenizer: ChatTokenizer,
    problems: Sequence[Problem],
    config: EvaluateConfig,
    as_text: bool,
) -> list[Prediction]:
    """The greedy answers."""
    prompts = [_encode_prompt(tokenizer, problem, as_text) for problem in problems]
    max_positions = model.config.max_positions
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) >= max_positions:
            raise UserError(
                f"{problem.place}: the prompt has {len(prompt)} tokens; the model has only "
                f"{max_positions} positions for prompt and answer: shorten it or leave it out."
            )
    outputs: list[tuple[str, bool]] = [("", False)] * len(problems)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(by_length), config.batch_size):
        batch = by_length[start : start + config.batch_size]
        completions = generate(
            model,
            [prompts[index] for index in batch],
            max_new_tokens=config.max_new_tokens,
            end_id=tokenizer.end_id,
            dtype=config.dtype,
        )
        for index, ids, finished in zip(batch, completions.ids, completions.finished, strict=True):
            outputs[index] = (tokenizer.decode(ids), finished)
    return [
        _prediction(tokenizer, problem, *output, as_text)
        for problem, output in zip(problems, outputs, strict=True)
    ]


def _encode_prompt(tokenizer: ChatTokenizer, problem: Problem, as_text: bool) -> list[int]:
    if as_text:
        return [tokenizer.start_id, *tokenizer.encode_text(problem.text_prompt)]
    return tokenizer.encode_prompt(problem.messages)


def _prediction(
    tokenizer: ChatTokenizer, problem: Problem, output: str, finished: bool, as_text: bool
) -> Prediction:
    if as_text and "\n" in output:
        output, finished = output.split("\n", 1)[0], True
    found = find_answer(output)
    thought = thought_of(output)
    return Prediction(
        id=problem.id,
        level=problem.level,
        prompt=problem.text_prompt if as_text else problem.prompt,
        output=output,
        parsed=found.value if found else None,
        answer=problem.answer,
        correct=found is not None and found.value == normalise(problem.answer),
        finished=finished,
        full_sentence=is_full_sentence(output, problem.full),
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
    forks = []
    for index in asked:
        problem, output = problems[index], predictions[index].output
        outputs = [_put(choice, output) for choice in problem.choices]
        forks.append(Fork.of_rows(_encode_rows(tokenizer, problem, outputs, as_text)))
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
    tokenizer: ChatTokenizer, problem: Problem, outputs: Sequence[str], as_text: bool
) -> list[list[int]]:
    """Prompt and output, with what ends an output."""
    if as_text:
        texts = [f"{problem.text_prompt}{output}\n" for output in outputs]
        return [[tokenizer.start_id, *tokenizer.encode_text(text)] for text in texts]
    replies = [{"role": "assistant", "content": output} for output in outputs]
    rows = tokenizer.encode_chats([[*problem.messages, reply] for reply in replies])
    # After the end token a chat goes on with a line break, which is no part of the answer.
    return [row.ids[: len(row.classes.rstrip(bytes([CONTEXT])))] for row in rows]


def _share(flags: Sequence[bool | None]) -> float:
    return sum(map(bool, flags)) / len(flags)
