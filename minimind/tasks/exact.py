"""The answer itself, a number or a text: inside the answer tags, or in an output without tags."""

from minimind.chat.answers import answer_like
from minimind.tasks.task import Score, Task


class Exact(Task):
    """Right is what is equal to the expected answer: 1,000 and 1000.0 are 1000, Paris is paris."""

    def score(self, expected: str, output: str) -> Score:
        """See :func:`minimind.chat.answers.answer_like`."""
        said = answer_like(expected, output)
        return Score(said, said is not None and said.casefold() == expected.casefold())

    def fault(self, expected: str) -> str | None:
        return None


TASK = Exact()
