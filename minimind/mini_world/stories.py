"""Counting problems told as short stories, in Chinese and in English."""

import random
from dataclasses import dataclass

from minimind.mini_world.problems import Event, Problem, answer_of

Thing = tuple[str, str]  # a noun and the measure word that Chinese wants


@dataclass(frozen=True)
class Language:
    """The phrases of one language; ``{unit}`` is the measure word that Chinese wants."""

    code: str
    names: tuple[str, ...]
    items: tuple[Thing, ...]
    has: str
    has_boxes: str
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    questions: tuple[str, str]  # about the person, about the things
    result: str
    outcomes: tuple[str, str, str]  # fewer than at the start, as many, more
    equation_question: str
    extraction_request: str
    extraction: str
    more: str
    less: str
    thought_start: str
    thought_separator: str
    sentence_separator: str

    def think(self, problem: Problem) -> str:
        """The steps of a problem, one after the other."""
        return self.thought_start + self.thought_separator.join(s.equation for s in problem)


CHINESE = Language(
    code="zh",
    names=(
        *("小明", "小红", "小刚", "小丽", "小华", "小芳", "小军", "小玲"),
        *("大伟", "阿强", "晓东", "晓燕", "子涵", "雨桐", "思远", "佳怡"),
    ),
    items=(
        *(("苹果", "个"), ("铅笔", "支"), ("书", "本"), ("糖", "颗"), ("贝壳", "枚")),
        *(("气球", "个"), ("邮票", "张"), ("橘子", "个"), ("卡片", "张"), ("纽扣", "粒")),
    ),
    has="{name}有{n}{unit}{item}。",
    has_boxes="{name}有{boxes}盒{item}，每盒{each}{unit}。",
    gains=("又买了{n}{unit}。", "捡到{n}{unit}。", "朋友送来{n}{unit}。", "又得到{n}{unit}。"),
    losses=("送出{n}{unit}。", "用掉{n}{unit}。", "丢了{n}{unit}。", "分给同学{n}{unit}。"),
    questions=("{name}现在一共有几{unit}{item}？", "现在有多少{unit}{item}？"),
    result="{name}现在有{n}{unit}{item}。",
    outcomes=(
        "{name}现在有的{item}比原来少。",
        "{name}现在有的{item}和原来一样多。",
        "{name}现在有的{item}比原来多。",
    ),
    equation_question="{sum}等于几？",
    extraction_request="是谁的什么？",
    extraction="{name}的{item}。",
    more="{a}比{b}大。",
    less="{a}比{b}小。",
    thought_start="先算",
    thought_separator="，",
    sentence_separator="",
)

ENGLISH = Language(
    code="en",
    names=(
        *("Tom", "Amy", "Ben", "Lily", "Jack", "Mia", "Sam", "Zoe"),
        *("Leo", "Eva", "Max", "Ivy", "Dan", "Kim", "Rob", "Sue"),
    ),
    items=(
        *(("apples", ""), ("pencils", ""), ("books", ""), ("candies", ""), ("shells", "")),
        *(("balloons", ""), ("stamps", ""), ("oranges", ""), ("cards", ""), ("buttons", "")),
    ),
    has="{name} has {n} {item}.",
    has_boxes="{name} has {boxes} boxes with {each} {item} each.",
    gains=(
        "{name} buys {n} more {item}.",
        "{name} finds {n} more {item}.",
        "{name} gets {n} {item} from a friend.",
        "{name} wins {n} more {item}.",
    ),
    losses=(
        "{name} gives away {n} {item}.",
        "{name} uses {n} {item}.",
        "{name} loses {n} {item}.",
        "{name} hands {n} {item} to a classmate.",
    ),
    questions=("How many {item} does {name} have now?", "How many {item} are there now?"),
    result="{name} now has {n} {item}.",
    outcomes=(
        "{name} now has fewer {item} than before.",
        "{name} now has as many {item} as before.",
        "{name} now has more {item} than before.",
    ),
    equation_question="What is {sum}?",
    extraction_request="Who has what?",
    extraction="{name} has {item}.",
    more="{a} is more than {b}.",
    less="{a} is less than {b}.",
    thought_start="",
    thought_separator=", ",
    sentence_separator=" ",
)


@dataclass(frozen=True)
class Story:
    """A problem told in words."""

    problem: Problem
    language: Language
    words: dict[str, str]  # name, item and unit
    statement: str  # what happened, without the question
    question_kind: int  # index of Language.questions

    @property
    def prompt(self) -> str:
        return self._after_statement(self.language.questions[self.question_kind])

    @property
    def with_outcome(self) -> str:
        """The story and what came of it, in words instead of a number."""
        first = self.problem[0]
        start = first.after if first.operator == "*" else first.before
        outcome = self.language.outcomes[1 + (self.answer > start) - (self.answer < start)]
        return self._after_statement(outcome)

    @property
    def answer(self) -> int:
        return answer_of(self.problem)

    @property
    def extraction_prompt(self) -> str:
        return self._after_statement(self.language.extraction_request)

    @property
    def extraction(self) -> str:
        """Who the story is about, and which things: "Tom has apples."."""
        return self.language.extraction.format(**self.words)

    def sentence(self, number: int) -> str:
        """The answering sentence, with this number in it."""
        return self.language.result.format(n=number, **self.words)

    def _after_statement(self, phrase: str) -> str:
        return self.statement + self.language.sentence_separator + phrase.format(**self.words)


def tell(
    rng: random.Random, problem: Problem, language: Language, thing: Thing | None = None
) -> Story:
    """Put a problem into words, about `thing` or any of the language's."""
    words = {"name": rng.choice(language.names)}
    words["item"], words["unit"] = thing or rng.choice(language.items)
    first, events = problem[0], problem
    if first.operator == "*":
        opening = language.has_boxes.format(boxes=first.before, each=first.amount, **words)
        events = problem[1:]
    else:
        opening = language.has.format(n=first.before, **words)
    sentences = [opening]
    for event in events:
        phrases = language.gains if event.operator == "+" else language.losses
        sentences.append(rng.choice(phrases).format(n=event.amount, **words))
    question_kind = rng.randrange(len(language.questions))
    return Story(
        problem, language, words, language.sentence_separator.join(sentences), question_kind
    )


def tell_without_events(rng: random.Random, amount: int, language: Language, thing: Thing) -> str:
    """A story in which nothing happens, and its result: what there was is there still."""
    item, unit = thing
    words = {"name": rng.choice(language.names), "item": item, "unit": unit, "n": amount}
    return language.sentence_separator.join((language.has, language.result)).format(**words)


def ask_equation(step: Event, language: Language) -> tuple[str, str]:
    """A single sum, difference or product as a question, and its answer, the whole equation."""
    asked = step.equation.removesuffix(f"={step.after}")
    return language.equation_question.format(sum=asked), step.equation


def compare(a: int, b: int, language: Language) -> str:
    """Say which of two different numbers is the larger."""
    return (language.more if a > b else language.less).format(a=a, b=b)
