"""Numbers in what people and models write: 1,000, 3.5, -5, 1e3, 3/4, 1 1/2, 10%, \\frac{1}{2}, 5万.

They are exact (fractions.Fraction) and compared as such. math-verify was tried instead: it takes
12:30 for 12 and 1,5 for 1.5, knows neither +7 nor 1e3 nor full-width digits, and needs up to .2 s.
"""

import re
from fractions import Fraction
from typing import NamedTuple
from unicodedata import normalize

# Of a longer text only the end is read: each number of it costs 10 µs.
MOST_CHARACTERS = 10_000

# Digits of any script; how many is limited, so that nothing long is computed with.
# LaTeX writes 1{,}200, 1,\!200 and 1\,200, others 1'200, or a space that does not break, and India
# 1,23,456.
_WHOLE = (
    r"(?:\d{1,3}(?:(?:,|\{,\}|,\\!|\\,|['’\u00a0\u2009\u202f])\d{3}){1,12}(?!\d)"
    r"|\d{1,3}(?:，\d{3}){1,12}(?!\d)|\d{1,2}(?:,\d{2}){1,6},\d{3}(?!\d)|\d{1,40})"
)
_DECIMAL = (
    rf"(?:{_WHOLE}(?:[.．]\d{{1,40}})?|(?<![A-Za-z])[.．]\d{{1,40}})"  # No.5 is no half
    r"(?:[eE][-+]?\d{1,3}(?![A-Za-z]))?"
)
_PART = rf"\{{ ?[-−]?{_DECIMAL} ?\}}|\d"  # of \frac{3}{4} and \frac34
_LATEX = rf"(?:(?P<before>{_WHOLE}) ?)?\\[cdt]?frac *(?P<over>{_PART}) *(?P<under>{_PART})"
_TIMES_TEN = (
    r" ?(?:[×x*]|\\times|\\cdot) ?10\^(?:\{(?P<braced>[-−]?\d{1,2})\}|(?P<bare>[-−]?\d{1,2}))"
)
_PLAIN = (
    rf"(?:(?P<whole>{_WHOLE})(?: | ?又 ?)(?={_WHOLE}(?:[/／]| ?分之)))?"
    rf"(?:(?P<parts>{_WHOLE}) ?分之 ?)?(?P<value>{_DECIMAL})"
    rf"(?: ?[/／] ?(?P<divisor>{_DECIMAL})|{_TIMES_TEN})?"
)
_VULGAR = rf"(?:(?P<beside>{_WHOLE}) ?)?(?P<vulgar>[¼-¾⅐-⅞])"

_POWERS = {"亿": 8, "億": 8, "万": 4, "萬": 4, "千": 3, "百": 2, "十": 1}  # of ten, largest first
_SCALES = _POWERS | {"k": 3, "K": 3, "M": 6}
_SCALES |= {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "bn": 9, "trillion": 12}
_SCALES |= {"lakh": 5, "crore": 7}
# 5k, 5万 and 5百万, but neither 5 km nor 5千克, which are kilograms.
_SCALE = (
    r"(?P<scale>[kKM](?![A-Za-z])| ?(?:hundred|thousand|million|billion|trillion|bn|lakh|crore)\b"
    r"|[百千万萬亿億]+(?![百千万萬亿億克米瓦卡]))"
)

# A sign belongs to the number unless something to subtract from stands before it. A dash with space
# behind it is one only where nothing, = or 是 stands before it.
_OPERAND = r"[0-9A-Za-z)}\]]"
_MINUS = "[-−－–‑﹣]"
_SIGN = (
    rf"(?:(?<!{_OPERAND})(?P<sign>{_MINUS}|[+＋])|(?P<minus>负 ?|零下 ?|(?i:\b(?:minus|negative) )"
    rf"|(?:\A|(?<=[=:：是为])|(?<=[=:：是为] )){_MINUS} ))[$¥￥€£]?"
)

# No numbers are the parts of sums and powers (5 - 2, 5^2), ranges (3-5), dates (2024-05-12,
# 5月3日), times (12:30), other notations (1,5 and 1/2/3), roots, fractions of letters, multiples of
# letters and π, names (x_1), squared units (m2).
_OPERATOR = "[-−－–‑~～+＋*×·÷^_]"
_NOT_BEHIND_OPERATOR = (
    rf"(?<!{_OPERAND}{_OPERATOR})(?<!{_OPERAND} {_OPERATOR} )(?<![\^_]\{{)(?<!\d[xX])(?<!\d [xX] )"
    + "".join(rf"(?<!\\{name})(?<!\\{name} )" for name in ("times", "cdot", "div", "pm"))
)
_NOT_BEHIND = (
    r"(?<!\d)(?<!\d[.．,:：/／])(?!(?<=\d年)\d{1,2}月|(?<=\d月)\d{1,2}[日号])(?<![百千万萬亿億√])(?<!sqrt)(?<!sqrt\{)(?<!frac\{)(?<!\}\{)"
    r"(?<!\bm)(?<!\b[kcd]m)(?<!/s)(?<!overline\{)(?<!binom\{)"
    r"(?<![≤≥])(?<![≤≥] )"
    + "".join(rf"(?<!\b{name})(?<!\b{name} )" for name in ("log", "ln", "sin", "cos", "tan"))
)
_NOT_BEFORE = (
    r"(?!\d|[.．,:：/／]\d|年\d{1,2}月|月\d{1,2}[日号]|[⁰¹²³⁴-⁹¼-¾⅐-⅞₀-₉兆]"
    r"|i\b|\}?\{|[.．]\\| ?分之| ?又\d)"
    r"(?! ?(?:[-−] ?)?[xyz]\b| ?[π√]| ?\\(?:pi|sqrt|times|cdot|div|pm|over)(?![A-Za-z]))"
    rf"(?![)}}\]]? ?{_OPERATOR} ?[-\\({{]*\d)(?! ?[+＋×·÷^] ?[A-Za-z])"
)
# 5个半 and 5个半小时 are 5.5; 5个半圆 are 5.
_HALF = r" and a half(?![\w-])|(?:小时|[个天年月块斤里])半(?=小时|钟头|[^\w]|\Z)"
_PERCENT = r" ?(?:\\?[%％]|per ?cent\b|pct\b|\\text\{ ?(?:\\?%|per ?cent) ?\})"
_NUMBER = re.compile(
    rf"(?:{_SIGN}|{_NOT_BEHIND_OPERATOR}){_NOT_BEHIND}(?P<hundredth>百分之 ?)?"
    rf"(?:{_LATEX}|{_VULGAR}|{_PLAIN})(?:{_SCALE})?+(?P<half>{_HALF})?+{_NOT_BEFORE}"
    rf"(?:(?P<percent>{_PERCENT})|(?P<permille> ?‰)|(?P<tenth>成(?![^\W\d])))?"
)
_SEPARATORS = str.maketrans("．−", ".-", "{} \\!,，'’\u00a0\u2009\u202f")
_CURRENCY = r"\\?[$¥￥€£]?"
# A unit, and the smaller ones in which the rest may follow: 3小时20分钟, 5元3角, 5 feet 3 inches.
_HOURS, _MINUTES = "小?时|hours?|hrs?|h", "分钟?|minutes?|mins?"
_SMALLER = {"天|days?": _HOURS, _HOURS: f"{_MINUTES}|m", _MINUTES: "秒|seconds?|secs?|s"}
_SMALLER |= {"[元块]": "[角毛分]", "[角毛]": "分", "米": "[分厘]米", "feet|ft": "inch(?:es)?|in"}
_SMALLER |= {
    "斤": "两",
    "公里|千米": "米",
    "km": "m",
    "公斤|千克": "克",
    "kg": "g",
    "吨": "公斤|千克|kg",
}
_SMALLER |= {"years?|yrs?": "months?", "年": "个月", "weeks?": "days?", "周|星期": "天", "点": "分"}
_SMALLER |= {"pounds?|lbs?": "ounces?|oz", "dollars?": "cents?"}
_PARTS = "|".join(
    rf" ?(?:{unit})(?: ?零| ?又|,? (?:and )?)?(?=\d[\d.]{{0,9}} ?(?:{smaller})(?![A-Za-z]))"
    for unit, smaller in _SMALLER.items()
)
# Between the parts of 3 apples + 4 apples, 5个-2个 and $5 - $2, and of one quantity in two units,
# which are no numbers of their own.
_JOINED = re.compile(
    rf"(?: ?[^\W\d]{{1,15}}){{0,2}}"
    rf"(?: ?(?:[+＋×÷*]|\\(?:times|cdot|div|pm)\b)|{_MINUS}) ?{_CURRENCY}(?=[({{]*\d)"
    rf"| ?{_MINUS} ?[$¥￥€£](?=\d)|{_PARTS}"
)
_UNIT = re.compile(
    r"(?!.*(?:(?i:answer)|答案|####|boxed))"  # what comes behind these is the answer
    r"(?:\^\{?[23]\}?|(?<=m)[23]|(?<=/s)2|(?<=[^\W\d])/(?=[^\W\d])|[^\d=:：/／+*×÷<>]){0,40}"
)

# 一 stands in many words: Chinese numerals count where nothing but a measure word is with them.
_DIGITS = str.maketrans("零〇一二两三四五六七八九", "001223456789")
_NUMERAL = "[零〇一二两三四五六七八九十百千万萬亿億0-9]{1,30}"
_CHINESE = re.compile(
    rf"\s*(?P<all>(?P<sign>负?)(?:(?P<under>{_NUMERAL})分之)?(?P<over>(?![百千万萬亿億]){_NUMERAL}))"
    r"[个只元枚本张支颗粒人岁天年次件条辆棵米克页]?[.。]?\s*"
)


class Number(NamedTuple):
    """A number and where it stands in a text, text[start:end]."""

    value: Fraction
    start: int
    end: int


def find_numbers(text: str, start: int = 0) -> list[Number]:
    """All numbers of text[start:], or of its last characters; what divides by zero is none."""
    rest, found = text[start:], []
    for match in _NUMBER.finditer(rest, max(0, len(rest) - MOST_CHARACTERS)):
        value = _value(match)
        if value is not None:
            found.append(Number(value, start + match.start(), start + match.end()))
    joins = [join.span() for one in found if (join := _JOINED.match(text, one.end))]
    found = [
        number
        for number in found
        if not any(number.end == start or start <= number.start <= end for start, end in joins)
    ]
    chinese = None if found else _CHINESE.fullmatch(rest)
    if chinese and (under := _chinese(chinese["under"] or "1")):
        value = Fraction(_chinese(chinese["over"]), under) * (-1 if chinese["sign"] else 1)
        found.append(Number(value, start + chinese.start("all"), start + chinese.end("all")))
    return found


def number_of(text: str) -> Fraction | None:
    """The number that a text is, with at most a currency before and a unit behind: 5 apples."""
    text = text.strip()
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
    whole = match["before"] or match["beside"] or match["whole"] or "0"
    over, under = match["over"] or match["value"], match["under"] or match["divisor"] or "1"
    if match["vulgar"]:
        over, under = normalize("NFKC", match["vulgar"]).split("⁄")
    divisor = _decimal(under) * _decimal(match["parts"] or "1")
    if divisor == 0:
        return None
    value = _decimal(whole) + _decimal(over) / divisor
    value *= Fraction(10) ** int((match["braced"] or match["bare"] or "0").replace("−", "-"))
    for scale in re.findall(r"[A-Za-z]+|\S", match["scale"] or ""):
        value *= 10 ** _SCALES[scale]
    value += Fraction(1, 2) if match["half"] else 0
    for name, parts in {"percent": 100, "hundredth": 100, "permille": 1000, "tenth": 10}.items():
        value /= parts if match[name] else 1
    return -value if match["minus"] or (match["sign"] or "+") not in "+＋" else value


def _decimal(text: str) -> Fraction:
    return Fraction(text.translate(_SEPARATORS))


def _chinese(text: str) -> int:
    """三百零五 is 305, 3万5千 is 35000, 二〇二四 is 2024; 一万二 is 12000, as people say."""
    for unit, power in _POWERS.items():
        many, found, rest = text.rpartition(unit)
        if found:
            value = _chinese(rest or "0")
            is_short = power > 1 and len(rest) == 1 and rest != "十"
            return _chinese(many or "1") * 10**power + value * 10 ** (power - 1 if is_short else 0)
    return int(text.translate(_DIGITS))
