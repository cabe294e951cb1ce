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
    ("3小时20分钟", "3小时20分钟"),
    ("1e3", "1000"),
    ("12:30", "12:30"),
    ("七枚贝壳", "七枚贝壳"),
    ("2 + x", "2 + x"),
    ("1, 2, 3", "1,2,3"),
    ("7 or 8", "7 or 8"),
    ("3-5", "3-5"),
    ("一样多", "一样多"),
    # signs
    ("- 5", "-5"),
    ("–5", "-5"),
    ("负5", "-5"),
    ("负五", "-5"),
    ("minus 5", "-5"),
    # fractions and percent
    ("\\frac34", "3/4"),
    ("\\frac{-3}{4}", "-3/4"),
    ("½", "1/2"),
    ("1½", "1 1/2"),
    ("三分之一", "1/3"),
    ("25 percent", "25%"),
    ("百分之25", "25%"),
    ("百分之五十", "1/2"),
    # units
    ("12 m^2", "12"),
    ("12 m²", "12"),
    ("12 m2", "12"),
    ("60 km/h", "60"),
    ("5 km", "5"),
    ("5千克", "5"),  # kilograms, not thousands
    # multiples
    ("5万", "50,000"),
    ("3.5亿", "350000000"),
    ("5百万", "5e6"),
    ("5k", "5000"),
    ("$5 million", "5000000"),
    # Chinese numerals
    ("三十二", "32"),
    ("十二个", "12"),
    ("三百零五", "305"),
    ("一万二", "12000"),
    ("3万5千", "35000"),
    ("二〇二四", "2024"),
    # LaTeX, and dots that are no decimal point
    ("\\$1{,}200.50", "1200.5"),
    ("1\\,200", "1200"),
    ("1,\\!200", "1200"),
    ("零下5度", "-5"),
    ("5 m/s2", "5"),
    # multiples, parts and powers in words and LaTeX
    ("5 trillion", "5e12"),
    ("$5bn", "5000000000"),
    ("5 lakh", "500000"),
    ("5 crore", "50000000"),
    ("5‰", "0.005"),
    ("5成", "50%"),
    ("百分之 5", "5%"),
    ("5 pct", "0.05"),
    ("5\\text{ percent}", "0.05"),
    ("5\\text{%}", "0.05"),
    ("3分之5", "5/3"),
    ("1又1/2", "1.5"),
    ("1又2分之1", "1.5"),
    ("5个半", "5.5"),
    ("5 and a half", "5.5"),
    ("1.2\\times10^{3}", "1200"),
    ("1.2 × 10^3", "1200"),
    ("5\\cdot 10^{-2}", "0.05"),
    ("1'000", "1000"),
    ("1\u202f000\u202f000", "1000000"),
    ("12,34,567", "1234567"),
    ("9####十", "9####十"),
    ("5个 答案是三个", "5个 答案是三个"),
    ("5斤3两", "5斤3两"),
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
    ("- 5", "5"),
    ("负5", "5"),
    ("minus 5", "5"),
    ("25 percent", "25"),
    ("½", "2"),
    ("\\frac34", "34"),
    ("\\frac{x}{4}", "4"),
    ("5万", "5"),
    ("5k", "5"),
    ("3万5千", "5"),
    ("5²", "5"),
    ("5^{2}", "2"),
    ("x=5²", "x=52"),
    ("\\sqrt{5}", "5"),
    ("5π", "5"),
    ("x+5", "5"),
    ("5-2", "2"),
    ("3-5", "5"),
    ("3 - 5", "5"),
    ("3 to 5", "5"),
    ("3, 4, 5", "5"),
    ("3 or 5", "5"),
    ("3 apples or 5 apples", "5"),
    ("3或5", "5"),
    ("3、4、5", "5"),
    ("1200 or 3", "1, 200 or 3"),
    ("3小时20分钟", "20"),
    ("3小时零5分", "5"),
    ("答案是3小时20分钟", "3"),
    ("5元3角", "3"),
    ("3 hours and 20 minutes", "20"),
    ("5 ft 3 in", "3"),
    ("2024-05-12", "12"),
    ("2024年5月12日", "12"),
    ("May 12, 2024", "2024"),
    ("一样多", "1"),
    ("The answer is 3. The answer is 5.", "5"),
    ("\\boxed{3} \\boxed{5}", "5"),
    ("1{,}200", "200"),
    ("零下5度", "5"),
    ("3 \\times 5", "5"),
    ("3 x 5", "5"),
    ("3 boxes × $5", "5"),
    ("3个+5个", "5"),
    ("$7 - $5", "5"),
    ("5 trillion", "5"),
    ("5兆", "5"),
    ("5 lakh", "5"),
    ("5‰", "5"),
    ("5成", "5"),
    ("5 pct", "5"),
    ("5\\text{ percent}", "5"),
    ("百分之 5", "5"),
    ("5个半", "5"),
    ("5 and a half", "5"),
    ("1又1/2", "1/2"),
    ("3分之5", "5"),
    ("3分之1", "3"),
    ("0.\\overline{5}", "5"),
    ("5 - x", "5"),
    ("5i", "5"),
    ("log 5", "5"),
    ("sin5", "5"),
    ("≥ 5", "5"),
    ("not 5", "5"),
    ("不是5", "5"),
    ("不等于5", "5"),
    ("Not 5.", "5"),
    ("不是 5", "5"),
    ("It isn't 5", "5"),
    ("$x \\neq 5$", "5"),
    ("The answer isn't 5 but 7.", "5"),
    ("Amy has 4 -> 7 in all", "4"),
    ("2024年5月12日", "5"),
    ("5₈", "5"),
    ("\\binom{5}{2}", "5"),
    ("5\\pm1", "5"),
    ("5\\over 2", "5"),
    ("2^10", "10"),
    ("5斤3两", "5"),
    ("5kg 300g", "5"),
    ("5公里300米", "5"),
    ("5 lb 3 oz", "5"),
    ("5 dollars and 30 cents", "5"),
    ("5 years 3 months", "5"),
    ("5点30分", "5"),
]
SENTENCES = [  # said, the answer, whether it is also found inside of answer tags
    ("The answer is 12, which is 3 more than 9.", "12", True),
    ("The final answer is: **12**", "12", True),
    ("答案是12，比9多3。", "12", True),
    ("答案：三十二。", "32", True),
    ("The answer is - 5.", "-5", True),
    ("#### 1,200", "1200", True),
    ("The answer is $\\boxed{12}$, not 9.", "12", True),
    ("So $\\boxed{12}$ of 15.", "12", True),
    ("3+4=7, 7-2=5", "5", False),
    ("3+4=7", "7", True),
    ("No.5", "5", True),
    ("The answer is 3 apples + 4 apples = 7 apples.", "7", True),
    ("答案：3小时×20=60分钟。", "60", True),
    ("The answer is $9 - $2 = $7.", "7", True),
    ("$3 \\times 4 = 12$", "12", True),
    ("Tom has 3 apples and Amy has 4, so 7 in all.", "7", False),
    ("In 2020, 5 people came.", "5", False),
    ("In 3 minutes 5 students came.", "5", False),
    ("3 + 4 -> 7", "7", True),
    ("So <b>7</b> apples.", "7", True),
    ("> 7", "7", True),
    ("每月100元，3年3600元。", "3600", False),
    ("6月30天", "30", False),
    ("2024年12人参加", "12", False),
    ("一共6个半圆。", "6", True),
    ("共7个半小时。", "15/2", True),
    ("I ate tacos 5 times.", "5", True),
    ("Whether or not 5 counts", "5", True),
    ("是不是5", "5", True),
    ("3天9个，5天15个", "15", False),
    ("60 / 5 = 12 groups of 5 people and 12 pears", "12", False),
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


@pytest.mark.parametrize(("said", "answer", "in_tags"), SENTENCES)
def test_the_answer_of_a_sentence(said: str, answer: str, in_tags: bool) -> None:
    assert Problem.of("?", answer).score(said).correct
    assert Problem.of("?", answer).score(f"<answer>{said}</answer>").correct == in_tags
    for other in {str(number.value) for number in find_numbers(said)} - {answer}:
        assert not Problem.of("?", other).score(said).correct


PLAIN = ["{}", " {} ", "{}个", "$\\boxed{{{}}}$", "The answer is {}.", "so {} kg"]
SPELLINGS: dict[str, Fraction] = {  # and what they multiply by
    **dict.fromkeys(PLAIN, Fraction(1)),
    **dict.fromkeys(["-{}", "- {}", "负{}", "–{}", "minus {}"], Fraction(-1)),
    **dict.fromkeys(["{}%", "{} percent", "百分之{}"], Fraction(1, 100)),
    **dict.fromkeys(["{}万", "{}万个"], Fraction(10**4)),
    "{}k": Fraction(10**3),
    "{} million": Fraction(10**6),
}


@given(
    st.fractions(0, 10**9, max_denominator=1000),
    st.sampled_from(list(SPELLINGS)),
    st.fractions(max_denominator=1000),
)
def test_a_wrong_number_is_never_right(number: Fraction, form: str, other: Fraction) -> None:
    said, value = form.format(written(number)), number * SPELLINGS[form]
    for output in (said, f"<answer>{said}</answer>"):
        assert Problem.of("?", written(value)).score(output).correct
        for expected in {number, -number, other} - {value}:
            assert not Problem.of("?", written(expected)).score(output).correct


@given(
    st.integers(1, 10**9), st.sampled_from([", ", "、", " or ", "或", "-", "~", " to ", " and "])
)
def test_of_several_guesses_none_is_right(number: int, between: str) -> None:
    for said in (f"{number + 1}{between}{number}", f"{number}{between}{number + 1}"):
        for form in ("{}", "<answer>{}</answer>", "The answer is {}."):
            assert not Problem.of("?", str(number)).score(form.format(said)).correct


@given(st.text(min_size=1) | st.text(min_size=1, alphabet="0123½²., -/+%xkm万千百十一二负年\\{}①"))
@example("5 answer is")
@example("① apples")
def test_a_spelling_is_that_of_all_that_are_equal(answer: str) -> None:
    assert normalise(normalise(answer)) == normalise(answer)


@given(
    st.text(min_size=1).filter(str.strip)
    | st.text(min_size=1, alphabet="0123½²., -/+%xkm万千百十一二负年\\{}①").filter(str.strip)
)
@example("¹")
@example("½.")
@example("5 answer is")
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
    [
        "<think>",
        "</think><answer>",
        "1,",
        "1/",
        "\\frac{1}{",
        " ",
        "9",
        "1+",
        "1=",
        "1%",
        "一",
        "-",
        "<answer>",
    ],
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
