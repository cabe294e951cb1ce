"""The letter of one of several options, as C-Eval, CMMLU and MMLU ask for: A, (B), 答案是C."""

import re

from minimind.chat.answers import stated_answer
from minimind.tasks.task import Score

# A capital letter that stands alone; Chinese around it is no part of a word.
_LETTER = re.compile(r"(?<![A-Za-z0-9])[A-Z](?![A-Za-z0-9'])")
_AFTER_ANSWER = re.compile(r"(?:[Aa]nswer|答案)\W*(?:is|是|为|选)?\W*([A-Z])(?![A-Za-z0-9'])")


class Letter:
    """Right is the expected letter: the one after "answer" or 答案, else the only one that stands
    alone. Of several there is none: a model must not win by listing guesses."""

    def score(self, expected: str, output: str) -> Score:
        text = stated_answer(output) or ""
        after = _AFTER_ANSWER.search(text)
        letters = [after[1]] if after else _LETTER.findall(text)
        said = letters[0] if len(set(letters)) == 1 else None
        return Score(said, said == expected)

    def gold(self, expected: str) -> str:
        return expected


TASK = Letter()
