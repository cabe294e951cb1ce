"""Numbers in what people and models write: 1,000, 3.5, -5, 1e3, 3/4, 1 1/2, 10%, \\frac{1}{2}.

They are exact (fractions.Fraction) and compared as such. math-verify was tried instead: it takes
12:30 for 12 and 1,5 for 1.5, knows neither +7 nor 1e3 nor full-width digits, and needs up to .2 s.
"""

import re
from fractions import Fraction
from typing import NamedTuple

# Digits of any script; how many is limited, so that nothing long is computed with.
_WHOLE = r"(?:\d{1,3}(?:,\d{3}){1,12}(?!\d)|\d{1,3}(?:，\d{3}){1,12}(?!\d)|\d{1,40})"
_DECIMAL = rf"(?:{_WHOLE}(?:[.．]\d{{1,40}})?|[.．]\d{{1,40}})(?:[eE][-+]?\d{{1,3}}(?![A-Za-z]))?"
_LATEX = (
    rf"(?:(?P<before>{_WHOLE}) ?)?\\[dt]?frac *"
    rf"\{{ ?(?P<over>{_DECIMAL}) ?\}} *\{{ ?(?P<under>{_DECIMAL}) ?\}}"
)
_PLAIN = (
    rf"(?:(?P<whole>{_WHOLE}) (?={_WHOLE}[/／]))?(?P<value>{_DECIMAL})"
    rf"(?: ?[/／] ?(?P<divisor>{_DECIMAL}))?"
)
_NUMBER = re.compile(
    # A sign belongs to the number unless something to subtract from stands before it.
    r"(?:(?<![0-9A-Za-z)}\]])(?P<sign>[-−－+＋])[$¥￥€£]?)?"
    # 12:30, 1/2/3 and 1,5 are none: what has a digit and one of these signs beside it.
    rf"(?<!\d)(?<!\d[.．,:：/／])(?:{_LATEX}|{_PLAIN})(?!\d|[.．,:：/／]\d)"
    r"(?P<percent> ?\\?[%％])?"
)
_CURRENCY = r"\\?[$¥￥€£]?"
_UNIT = re.compile(r"[^\d=:：/／+*×÷<>]{0,40}")


class Number(NamedTuple):
    """A number and where it stands in a text, text[start:end]."""

    value: Fraction
    start: int
    end: int


def find_numbers(text: str) -> list[Number]:
    """All numbers of a text, in their order; what divides by zero is none."""
    found = []
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is not None:
            found.append(Number(value, *match.span()))
    return found


def number_of(text: str) -> Fraction | None:
    """The number that a text is, with at most a currency before and a unit behind: 5 apples."""
    numbers = find_numbers(text)
    if len(numbers) != 1:
        return None
    value, start, end = numbers[0]
    before, behind = text[:start].strip(), text[end:]
    is_alone = re.fullmatch(_CURRENCY, before) and _UNIT.fullmatch(behind)
    return value if is_alone else None


def written(value: Fraction) -> str:
    """One spelling of a number: 7, 3.5, or 1/3 where its decimals do not end."""
    if value.denominator == 1:
        return str(value.numerator)
    places = 0
    rest = value.denominator
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        places = max(places, count)
    if rest != 1 or places > 40:
        return str(value)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}"


def _value(match: re.Match[str]) -> Fraction | None:
    if match["over"] is not None:
        whole, over, under = match["before"], match["over"], match["under"]
    else:
        whole, over, under = match["whole"], match["value"], match["divisor"]
    divisor = _decimal(under) if under else Fraction(1)
    if divisor == 0:
        return None
    value = _decimal(over) / divisor + (_decimal(whole) if whole else 0)
    value = value / 100 if match["percent"] else value
    return -value if match["sign"] and match["sign"] in "-−－" else value


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace("，", "").replace("．", "."))
