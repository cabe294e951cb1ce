"""Numbers in texts are exact, and one comparison of answers serves evaluation and rewards."""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minimind.chat.answers import (
    first_thought,
    is_full_sentence,
    is_number,
    normalise,
    thought_of,
)
from minimind.chat.numbers import find_numbers, number_of, written
from minimind.rewards.format import Format
from minimind.rewards.reward import Given, Sample
from minimind.tasks.problem import Problem
from minimind.thinking.completions import Completion
from minimind.thinking.quality import assess

SAME = [  # said, expected
    ("1000", "1,000"),
    ("1,000", "1000"),
    ("7.0", "7"),
    ("3.5", "3.50"),
    ("3/4", "3/4"),
    ("0.75", "3/4"),
    ("10%", "10%"),
    ("10％", "0.1"),
    ("12个", "12"),
    ("12", "12个"),
    ("$5", "5"),
    ("\\$5", "$5"),
    ("+7", "7"),
    ("-5", "-5"),
    ("−5", "-5"),
    ("\\frac{1}{2}", "1/2"),
    ("1\\frac{1}{2}", "1 1/2"),
    ("-\\dfrac{1}{2}", "-0.5"),
    ("１２", "12"),
    ("１，０００", "1000"),
    ("Paris", "Paris"),
    ("paris", "Paris"),
    ("  Paris.", "Paris"),
    ("5 apples", "5"),
    ("1e3", "1000"),
    ("12:30", "12:30"),
    ("七枚贝壳", "七枚贝壳"),
    ("2 + x", "2 + x"),
]
OTHER = [
    ("12", "21"),
    ("5", "-5"),
    ("0.33", "1/3"),
    ("1,5", "1.5"),
    ("Paris, or London", "Paris"),
    ("7 or 8", "7"),
    ("12:45", "12:30"),
    ("12:30", "30"),
    ("10", "10%"),
    ("1/2/3", "3"),
    ("5/0", "5"),
    ("", "7"),
    ("9" * 50, "9" * 40),
]


@pytest.mark.parametrize(("said", "expected"), SAME)
@pytest.mark.parametrize(
    "form", ["{}", "<answer>{}</answer>", "<think>3</think><answer>{}</answer>"]
)
def test_equal_answers_are_right_in_tags_and_without(form: str, said: str, expected: str) -> None:
    assert Problem.of("?", expected).score(form.format(said)).correct
    assert Problem.of("?", said).score(form.format(expected)).correct


@pytest.mark.parametrize(("said", "expected"), OTHER)
@pytest.mark.parametrize("form", ["{}", "<answer>{}</answer>"])
def test_other_answers_are_wrong(form: str, said: str, expected: str) -> None:
    assert not Problem.of("?", expected).score(form.format(said)).correct


@given(st.text(min_size=1).filter(str.strip))
@example("¹")
@example("½.")
def test_any_gold_answer_given_back_is_right(gold: str) -> None:
    problem = Problem.of("?", gold)
    if "<" not in gold and normalise(gold):
        assert problem.score(gold).correct
        assert problem.score(f"<think>{gold}</think>\n<answer>{gold}</answer>").correct


@given(st.fractions(max_denominator=10**6))
def test_a_number_is_read_as_it_is_written(value: Fraction) -> None:
    text = written(value)
    assert is_number(text)
    assert number_of(text) == value
    assert normalise(text) == text


@given(st.text(alphabet="0123456789,.:/-+%eE \\frac{}（１２，．"))
def test_numbers_lie_in_the_text_in_order(text: str) -> None:
    ends = 0
    for number in find_numbers(text):
        assert ends <= number.start < number.end <= len(text)
        ends = number.end


@pytest.mark.parametrize(
    "piece",
    ["<think>", "</think><answer>", "1,", "1/", "\\frac{1}{", " ", "9", "1+", "1=", "<answer>"],
)
def test_long_outputs_take_no_longer_than_their_length(piece: str) -> None:
    """Ten times longer than any output; quadratic time would be minutes."""
    output = piece * 100_000
    thought_of(output)
    first_thought(output)
    is_full_sentence(output, None)
    find_numbers(output)
    problem = Problem.of("?", "7")
    problem.score(output)
    assess(problem, Completion(output, True), len)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", " ", "3", "\n"])))
def test_the_format_reward_is_whole_for_complete_thoughts_alone(pieces: list[str]) -> None:
    output = "".join(pieces)
    sample = Sample(Problem.of("?", "3"), output, [], True)
    (value,) = Format().score([sample], Given(max_new_tokens=9))
    assert (value == Format().bounds()[1]) == (thought_of(output) is not None)
