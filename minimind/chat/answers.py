"""What a model's output says: its answer, its thought, whether it is put in a sentence."""

import re
from typing import NamedTuple
from unicodedata import normalize

from minimind.chat.numbers import Number, find_numbers, number_of, written

_TAGS = re.compile(r"</?(?:think|answer)>")
_TAGGED_ANSWER = re.compile(r"<answer>(.*)</answer>", re.DOTALL)
_TAGGED_PARTS = re.compile(r"<(think|answer)>.*?(</\1>|$)", re.DOTALL)
_CUE = re.compile(
    r"(?:\banswer(?: is\b|(?= ?[:：*]))|答案(?:是|为|(?=[:：]))|####|\\boxed\{)[ :：*]*",
    re.IGNORECASE,
)
_LISTED = re.compile(
    r" ?(?:[、;；]|,? ?\b(?:and|to)\b|和|与|到|至| ?[^\W\d]{0,12} ?,? ?(?:\bor\b|或者?)) ?",
    re.IGNORECASE,
)
# NFKC alone would make 52 of 5², and 11/2 of 1½.
_RAISED = {ord(c): f"^{normalize('NFKC', c)}" for c in "⁰¹²³⁴⁵⁶⁷⁸⁹"}
_RAISED |= {ord(c): f" {normalize('NFKC', c)}" for c in "¼½¾⅓⅔⅛⅜⅝⅞"}
_COMMA = re.compile(r" ?,(?!\d{3}(?!\d)) ?")  # of a list; that of 1,000 stays
_SENTENCE_END = re.compile(r"[.!?。！？…][\"'”’」』)）]*\Z")


# "Not 5" and 不是5 say no number; "whether or not 5" and 是不是5 say nothing of it.
_DENIAL = re.compile(
    r"(?:(?<!or )\b(?:not|never|isn't|isn’t|cannot be)|(?<!是)不是|不等于|不为|并非|≠|!=|\\neq?)"
    r"(?: equal to)?[ ：:*$]*\Z",
    re.IGNORECASE,
)


class Answer(NamedTuple):
    """A normalised answer and where it stands in the output, output[start:end]."""

    value: str
    start: int
    end: int


def find_answer(output: str) -> Answer | None:
    """The number that is the answer, inside the answer tags if there is one pair of them.

    What stands between the tags is the answer as it is when no number in it is.
    """
    tagged = _tagged_answer(output)
    start, end = tagged.span(1) if tagged else (0, len(output))
    if number := number_said(output[start:end], tagged is not None):
        return Answer(written(number.value), start + number.start, start + number.end)
    if tagged and tagged.group(1).strip():
        return Answer(normalise(tagged.group(1)), start, end)
    return None


def answer_like(expected: str, output: str) -> str | None:
    """What an output answers, normalised: all that is stated, or its number if one is expected."""
    said = stated_answer(output)
    if said is None or not is_number(expected):
        return None if said is None else normalise(said)
    number = number_said(said, tagged_answer(output) is not None)
    return written(number.value) if number else None


def number_said(text: str, in_tags: bool) -> Number | None:
    """The number that a text answers, and where it stands; None if it says none or several.

    A text that is a number, be it with a unit, is that. Of others it is the first number after
    "answer is", "answer:", 答案是, 答案：, #### or \\boxed{; without these it is the last one, but
    inside of answer tags the only one. Numbers in a list (3, 4; 3 or 4) are guesses, and so are
    two that both follow such words.
    """
    cues = [cue.end() for cue in _CUE.finditer(text)][-2:]
    after = [found for cue in cues if (found := find_numbers(text, cue))]
    numbers = after[-1] if after else find_numbers(text, len(text) - len(text.lstrip()))
    few = numbers[:2] if after else numbers[-2:]
    rivals = [found[0] for found in after] if after else numbers if in_tags else []
    is_one = len({number.value for number in rivals}) < 2
    if not few or not is_one or _are_listed(text, few[0], few[-1]):
        return None
    number = few[0 if after else -1]
    return None if _DENIAL.search(text, max(0, number.start - 40), number.start) else number


def _are_listed(text: str, one: Number, other: Number) -> bool:
    between, behind = text[one.end : other.start], text[other.end : other.end + 2].strip()
    ends = not behind[:1].isalpha()  # "In 2020, 5 people" lists nothing
    is_list = _LISTED.fullmatch(between) or (between.strip() in (",", "，") and ends)
    return one.value != other.value and bool(is_list)


def first_thought(output: str) -> str | None:
    """What stands between the first pair of think tags, complete or not as a whole."""
    _, opened, rest = output.partition("<think>")  # an expression would take quadratic time
    thought, closed, _ = rest.partition("</think>")
    return thought if opened and closed else None


def before_tags(output: str) -> str:
    """What comes before any tag: the answer to raw text of a model that closes a thought there."""
    return _TAGS.split(output, maxsplit=1)[0]


def stated_answer(output: str) -> str | None:
    """What stands between the answer tags; all of an output without any tag.

    Of several pairs, or tags that are not closed, there is none: a model must not win by listing
    guesses, nor by what it only thought.
    """
    if (tagged := tagged_answer(output)) is not None:
        return tagged
    return None if _TAGS.search(output) else output


def tagged_answer(output: str) -> str | None:
    """What stands between the answer tags, if there is one pair of them."""
    tagged = _tagged_answer(output)
    return tagged.group(1) if tagged else None


def _tagged_answer(output: str) -> re.Match[str] | None:
    """The only pair of answer tags, with what stands between them as group 1."""
    if output.count("<answer>") == output.count("</answer>") == 1:
        return _TAGGED_ANSWER.search(output)
    return None


def normalise(answer: str) -> str:
    """One spelling for equal answers: 1,000, 1e3 and 1000 apples are 1000, 3/4 and 75% are 0.75.

    Text is without outer space, full-width letters, spaces around commas and the full stop at its
    end.
    """
    value = number_of(answer)
    if value is not None:
        return written(value)
    text = " ".join(normalize("NFKC", answer.translate(_RAISED)).split())
    text = _COMMA.sub(", ", text).rstrip(".。 ")
    # ① is no number, and must not become one.
    return text if number_of(text) is None else answer.strip()


def is_number(text: str) -> bool:
    """Whether a text is a number and nothing else."""
    numbers = find_numbers(text)
    return len(numbers) == 1 and (numbers[0].start, numbers[0].end) == (0, len(text))


def thought_of(output: str) -> str | None:
    """The thought of an output that is one complete <think> and, after it, one <answer>."""
    thought, closed, rest = output.strip().removeprefix("<think>").partition("</think>")
    answer = rest.strip().removeprefix("<answer>").removesuffix("</answer>")
    in_order = output.strip() == f"<think>{thought}</think>{rest.rstrip()}"
    in_order = in_order and rest.strip() == f"<answer>{answer}</answer>"
    said = thought.strip() and answer.strip()
    return thought if closed and in_order and said and len(_TAGS.findall(output)) == 4 else None


def is_full_sentence(output: str, full: str | None) -> bool:
    """Whether an output answers in a whole sentence, be it right or wrong.

    That is the expected sentence `full` with whatever number in the answer's place; without one,
    words outside of tags that end as a sentence does.
    """
    if full is not None:
        return _around_answer(output.strip()) == _around_answer(full.strip())
    said = _TAGGED_PARTS.sub("", output).strip()
    return any(letter.isalpha() for letter in said) and bool(_SENTENCE_END.search(said))


def _around_answer(text: str) -> tuple[str, str]:
    answer = find_answer(text)
    return (text[: answer.start], text[answer.end :]) if answer else (text, "")
