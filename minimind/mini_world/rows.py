"""The built-in data: short Chinese and English stories about counting, generated from a seed.

Every file has a random stream of its own, drawn from a seed and the file's name: changing the
size of one file leaves the others as they are. Held-out files have a seed of their own, so that
models of other seeds are evaluated on the same. Training files hold nothing of what they hold (see
``problems.py``).
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, field_validator

from minimind.errors import UserError
from minimind.files import replacing
from minimind.mini_world.problems import Problem, ProblemSpace, answer_of
from minimind.mini_world.stories import (
    CHINESE,
    ENGLISH,
    Language,
    Story,
    ask_equation,
    compare,
    tell,
    tell_without_events,
)
from minimind.params import Section, Seed

FILES = (
    "eval",  # first, since it alone may find too few problems
    *("eval_text", "tokenizer", "pretrain", "sft", "dpo"),
    *("reason", "distill", "lora", "prompts"),
)
HELD_OUT = ("eval", "eval_text")
LEVELS = (1, 2, 3, 4)

# What a document is made of; the sizes and mixes that one tries out stand in params.yaml.
LINES_PER_DOCUMENT = (5, 8)
# A document tells stories without their results: with them, pretraining alone would learn to
# answer what sft is there to teach (docs/log.md has numbers). Only where nothing happens is the
# result told, which is copied, not computed. All stories of a document are about the same things:
# with others in each story, some seeds ended pretraining without having learned to copy them.
LINE_WEIGHTS = {
    "equation": 40,
    "chain": 15,
    "question": 10,
    "outcome": 20,
    "no_events": 10,
    "comparison": 5,
}
# There are few held-out problems of level 1 (some 900 up to 99), and they are compared the most
# closely. So each is told several times: in both languages, with other names, things and verbs.
# Answers to one problem are no independent draws: its rows have a key in common, "problem".
TELLINGS_OF_LEVEL_1 = 6
MAX_FRUITLESS_DRAWS = 2_000  # in a row, before the problems of a level count as used up

Row = dict[str, Any]
Weight = Annotated[float, Field(ge=0)]
LevelWeights = tuple[Weight, Weight, Weight, Weight]
Share = Annotated[float, Field(ge=0, le=1)]


class MiniWorldConfig(Section):
    """Sizes and mixes of the built-in data. Level weights are for levels 1 to 4, of any sum."""

    seed: Seed  # of the training files
    held_out_seed: Seed
    max_value: int = Field(ge=20, le=999)
    # More than 30 % would leave next to no four-step problem free of held-out parts.
    held_out_percent: int = Field(ge=1, le=30)
    num_tokenizer: PositiveInt
    num_pretrain: PositiveInt
    num_sft: PositiveInt
    num_dpo: PositiveInt
    num_reason: PositiveInt
    num_lora: PositiveInt
    num_distill: PositiveInt
    num_prompts: PositiveInt
    num_eval_per_level: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
    num_eval_text: PositiveInt
    num_eval_equation: PositiveInt
    num_eval_extraction: PositiveInt
    sft_level_weights: LevelWeights
    # Answers in a full sentence (the others are a bare number) to "How many does she have?" and
    # to "How many are there?". Were both 0.5, chance would decide what greedy decoding prefers.
    sft_full_shares: tuple[Share, Share]
    sft_two_turn_share: Share
    sft_equation_share: Share  # of turns that ask for a sum, not about a story
    dpo_level_weights: LevelWeights
    dpo_bare_share: Share  # rejected for a bare number; the others for a wrong one
    reason_level_weights: LevelWeights
    reason_shortcut_share: Share
    lora_level_weights: LevelWeights
    distill_wrong_share: Share  # of the steps of distill's thoughts
    prompts_level_weights: LevelWeights

    @field_validator(
        "sft_level_weights",
        "dpo_level_weights",
        "reason_level_weights",
        "lora_level_weights",
        "prompts_level_weights",
    )
    @classmethod
    def _some_level_is_wanted(cls, weights: LevelWeights) -> LevelWeights:
        if not 0 < sum(weights) < math.inf:
            raise ValueError("their sum must be above 0 and finite: at least one level is wanted")
        return weights


def write_mini_world(directory: Path, config: MiniWorldConfig) -> dict[str, int]:
    """Write all files into ``directory`` and return the number of rows of each.

    Raises:
        UserError: there are fewer held-out problems of a level than asked for.
    """
    space = ProblemSpace(config.max_value, config.held_out_percent)
    num_rows = {}
    with replacing(directory) as partial:
        partial.mkdir()
        for name in FILES:
            seed = config.held_out_seed if name in HELD_OUT else config.seed
            source = Source(config, space, random.Random(f"{seed}/{name}"))
            num_rows[name] = 0
            with open(partial / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
                for row in source.rows(name):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    num_rows[name] += 1
    return num_rows


@dataclass(frozen=True)
class Source:
    """What the rows of one file are drawn from; a method for the rows of each."""

    config: MiniWorldConfig
    space: ProblemSpace
    rng: random.Random

    def rows(self, name: str) -> Iterator[Row]:
        """All rows of a file, the languages alternating."""
        if name == "eval":
            yield from self.eval()
        else:
            for index in range(getattr(self.config, f"num_{name}")):
                yield getattr(self, name)(index)

    def pretrain(self, index: int) -> Row:
        """Raw text: equations, two-step chains, stories without their results, comparisons."""
        return {"text": self._document(_language(index))}

    def sft(self, index: int) -> Row:
        """A chat of one or two turns with a direct answer: a full sentence or a bare number.

        Some turns ask for a sum: without them, learning to answer at a glance would undo the
        arithmetic that pretraining taught (docs/log.md has numbers).
        """
        turns = []
        for _ in range(2 if self.rng.random() < self.config.sft_two_turn_share else 1):
            if self.rng.random() < self.config.sft_equation_share:
                (step,) = self.space.draw_training(self.rng, level=1)
                turns += _turn(*ask_equation(step, _language(index)))
            else:
                story = self._story(self.config.sft_level_weights, _language(index))
                in_full = self.rng.random() < self.config.sft_full_shares[story.question_kind]
                reply = story.sentence(story.answer) if in_full else str(story.answer)
                turns += _turn(story.prompt, reply)
        return {"conversations": turns}

    def dpo(self, index: int) -> Row:
        """The full sentence is preferred to a bare number and to a sentence with a wrong number."""
        story = self._story(self.config.dpo_level_weights, _language(index))
        if self.rng.random() < self.config.dpo_bare_share:
            rejected = str(story.answer)
        else:
            rejected = story.sentence(self.rng.choice(self.space.wrong_answers(story.problem)))
        chosen = story.sentence(story.answer)
        return {"prompt": story.prompt, "chosen": chosen, "rejected": rejected}

    def reason(self, index: int) -> Row:
        """A chat whose reply thinks the steps first.

        Some thoughts about the longest stories leave out the last step. As the tag that ends a
        thought weighs more (`reason.tag_weight`), a model that imitates them takes the shorter,
        wrong way for the likelier: what is left for reinforcement to mend.
        """
        story = self._story(self.config.reason_level_weights, _language(index))
        steps = story.problem
        if len(steps) == max(LEVELS) and self.rng.random() < self.config.reason_shortcut_share:
            steps = steps[:-1]
        return _thought_chat(story, steps)

    def distill(self, index: int) -> Row:
        """As reason's, but unchecked: some steps are wrong, and the thought goes on from them."""
        story = self._story(self.config.reason_level_weights, _language(index))
        wrong_share = self.config.distill_wrong_share
        return _thought_chat(story, self.space.careless(self.rng, story.problem, wrong_share))

    def lora(self, index: int) -> Row:
        """A chat of another task than all others: who the story is about, and which things."""
        story = self._story(self.config.lora_level_weights, _language(index))
        return {"conversations": _turn(story.extraction_prompt, story.extraction)}

    def prompts(self, index: int) -> Row:
        """A question with its answer, for reinforcement."""
        story = self._story(self.config.prompts_level_weights, _language(index))
        return {"prompt": story.prompt, "answer": str(story.answer), "level": len(story.problem)}

    def tokenizer(self, index: int) -> Row:
        """Text to train the tokenizer on: half documents, half chats with all kinds of replies.

        The role names are there because every chat spells them out; the tags are not, because
        they are tokens of their own.
        """
        language = _language(index // 2)
        if index % 2 == 0:
            return {"text": self._document(language)}
        story = self._story(self.config.reason_level_weights, language)
        prompt, reply = self.rng.choice(
            (
                (story.prompt, str(story.answer)),
                (story.prompt, story.sentence(story.answer)),
                (story.prompt, f"{language.think(story.problem)}\n{story.answer}"),
                (story.extraction_prompt, story.extraction),
                ask_equation(story.problem[0], language),
            )
        )
        return {"text": f"user\n{prompt}\nassistant\n{reply}"}

    def eval_text(self, index: int) -> Row:
        """Raw text as in pretraining, of held-out problems."""
        return {"text": self._document(_language(index), held_out=True)}

    def eval(self) -> Iterator[Row]:
        """Held-out problems: stories of every level, equations as text, stories to extract from.

        A problem of level 1 is told six times in different words, its ids "l1-0007-0" to
        "l1-0007-5"; no other is told twice, and none asked twice as an equation. Equations and
        stories have four numbers to choose from, of level 1 the first two tellings.
        """
        yield from self._eval_stories()
        equations = self._distinct_held_out(1, self.config.num_eval_equation, "num_eval_equation")
        for index, problem in enumerate(equations):
            yield {
                "id": f"equation-{index:04d}",
                "task": "equation",
                "prompt": problem[0].equation.removesuffix(str(answer_of(problem))),
                "as_text": True,
                "answer": str(answer_of(problem)),
                "choices": self._choices(problem, index % 4),
                "label": index % 4,
            }
        for index in range(self.config.num_eval_extraction):
            problem = self.space.draw_held_out(self.rng, level=index // 2 % 3 + 1)
            story = tell(self.rng, problem, _language(index))
            yield {
                "id": f"extraction-{index:04d}",
                "task": "extraction",
                "language": story.language.code,
                "prompt": story.extraction_prompt,
                "answer": story.extraction,
            }

    def _eval_stories(self) -> Iterator[Row]:
        for level, num_stories in zip(LEVELS, self.config.num_eval_per_level, strict=True):
            tellings = TELLINGS_OF_LEVEL_1 if level == 1 else 1
            problems = self._distinct_held_out(
                level, math.ceil(num_stories / tellings), "num_eval_per_level", tellings
            )
            told = (problem for problem in problems for _ in range(tellings))
            labels = (n // 2 % 4 for n in count())  # languages alternate, so it moves on after both
            prompts: set[str] = set()
            for index, problem in enumerate(islice(told, num_stories)):
                number, telling = divmod(index, tellings)
                story = tell(self.rng, problem, _language(index))
                while story.prompt in prompts:  # thousands of ways to tell it: rare, and soon over
                    story = tell(self.rng, problem, _language(index))
                prompts.add(story.prompt)
                name = f"l{level}-{number:04d}"
                row = {
                    "id": f"{name}-{telling}" if tellings > 1 else name,
                    "problem": name,
                    "level": level,
                    "language": story.language.code,
                    "prompt": story.prompt,
                    "answer": str(story.answer),
                    "full": story.sentence(story.answer),
                    "completion_prompt": story.statement,
                }
                if telling < 2:  # once in each language, since choices take as long as answers
                    label = next(labels)
                    row |= {"choices": self._choices(problem, label), "label": label}
                yield row

    def _story(self, weights: LevelWeights, language: Language) -> Story:
        (level,) = self.rng.choices(LEVELS, weights)
        return tell(self.rng, self.space.draw_training(self.rng, level), language)

    def _document(self, language: Language, held_out: bool = False) -> str:
        rng = self.rng
        draw = self.space.draw_held_out if held_out else self.space.draw_training
        num_lines = rng.randint(*LINES_PER_DOCUMENT)
        thing = rng.choice(language.items)
        lines = []
        for kind in rng.choices(list(LINE_WEIGHTS), list(LINE_WEIGHTS.values()), k=num_lines):
            match kind:
                case "equation":
                    (step,) = draw(rng, level=1)
                    lines.append(step.equation)
                case "chain":
                    lines.append(";".join(step.equation for step in draw(rng, level=2)))
                case "question" | "outcome":
                    story = tell(rng, draw(rng, level=rng.choice((1, 2))), language, thing)
                    lines.append(story.prompt if kind == "question" else story.with_outcome)
                case "no_events":
                    amount = rng.randint(2, self.space.max_value)
                    lines.append(tell_without_events(rng, amount, language, thing))
                case "comparison":
                    lines.append(compare(*self.space.draw_comparison(rng, held_out), language))
        return "\n".join(lines)

    def _distinct_held_out(
        self, level: int, num_problems: int, asked_by: str, tellings: int = 1
    ) -> Iterator[Problem]:
        seen: set[Problem] = set()
        num_fruitless = 0
        while len(seen) < num_problems:
            problem = self.space.draw_held_out(self.rng, level)
            if problem not in seen:
                seen.add(problem)
                num_fruitless = 0
                yield problem
            elif (num_fruitless := num_fruitless + 1) == MAX_FRUITLESS_DRAWS:
                raise UserError(
                    f"mini_world.{asked_by} calls for {num_problems} held-out problems of level "
                    f"{level}{f', each told {tellings} times' if tellings > 1 else ''}, but only "
                    f"{len(seen)} were found with max_value {self.space.max_value} and "
                    f"held_out_percent {self.space.held_out_percent}; lower {asked_by} or raise "
                    "one of these."
                )

    def _choices(self, problem: Problem, label: int) -> list[str]:
        """Four distinct numbers with the answer at ``label``.

        How many of them are smaller is drawn first: were the wrong ones spread evenly about the
        answer, picking a middle one would do well without any arithmetic.
        """
        answer, mistakes = answer_of(problem), self.space.wrong_answers(problem)
        smaller = [n for n in mistakes if n < answer]
        larger = [n for n in mistakes if n > answer]
        num_smaller = min(self.rng.randint(0, 3), len(smaller))
        num_smaller = max(num_smaller, 3 - len(larger))
        choices = self.rng.sample(smaller, num_smaller) + self.rng.sample(larger, 3 - num_smaller)
        self.rng.shuffle(choices)
        choices.insert(label, answer)
        return [str(choice) for choice in choices]


def _language(index: int) -> Language:
    return ENGLISH if index % 2 == 0 else CHINESE


def _turn(prompt: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def _thought_chat(story: Story, steps: Problem) -> Row:
    thought, answer = story.language.think(steps), answer_of(steps)
    reply = f"<think>{thought}</think>\n<answer>{answer}</answer>"
    return {"conversations": _turn(story.prompt, reply)}
