"""The letter of one of several options, as C-Eval, CMMLU and MMLU ask for: A, (B), 答案是C."""

import re
from unicodedata import normalize

from minimind.chat.answers import stated_answer
from minimind.tasks.task import Score, Task

_ANSWER = re.compile(r"[Aa]nswer|答案")
# A capital letter that stands alone; Chinese around it is no part of a word. Not the pronoun I, nor
# the article A, which words follow; "A or B" are two.
_LETTER = re.compile(r"(?<![A-Za-z0-9])(?![AI] +(?!(?:or|and)\b)[a-z])[A-Z](?![A-Za-z0-9'])")
_DENIED = re.compile(r"(?:\bnot|不是)\W*[A-Z](?![A-Za-z0-9])")


class Letter(Task):
    """Right is the expected letter: the only one that stands alone, after "answer" or 答案 if said.

    Of several there is none: a model must not win by listing guesses.
    """

    def score(self, expected: str, output: str) -> Score:
        text = normalize("NFKC", stated_answer(output) or "")
        letters = set(_LETTER.findall(_DENIED.sub("", _ANSWER.split(text, maxsplit=1)[-1])))
        said = letters.pop() if len(letters) == 1 else None
        return Score(said, said == expected)

    def fault(self, expected: str) -> str | None:
        return None if re.fullmatch("[A-Z]", expected) else "it must be one capital letter"


TASK = Letter()
