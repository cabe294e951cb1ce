"""How outputs are scored: a module of this package for each way, named by a problem's `scoring`.

The same object serves evaluation, the reward `answer` and rejection sampling.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

from minimind.errors import UserError, importing


class Score(NamedTuple):
    """What an output answers."""

    said: str | None  # None: it gives no answer
    correct: bool


class Task(Protocol):
    """One way to score outputs: the base of a class of which a module here has an object, TASK."""

    def score(self, expected: str, output: str) -> Score:
        """Compare an output with the expected answer, in the spelling of `normalise`."""

    def fault(self, expected: str) -> str | None:
        """Why no output could be right, and what the answer must be; None if all is well."""

    def parts(self, expected: str, output: str) -> Mapping[str, bool]:
        """What else is right of an output, by the names of metrics."""
        return {}

    def respond(self, output: str) -> Sequence[str]:
        """What tools say to an output, which evaluation then goes on from; nothing ends it."""
        return []


def task_of(name: str) -> Task:
    """The object TASK of ``minimind/tasks/<name>.py``.

    Raises:
        UserError: the module cannot be imported, or has no such object.
    """
    file = Path(__file__).with_name(f"{name}.py")
    with importing(file):
        task: Task | None = getattr(import_module(f"minimind.tasks.{name}"), "TASK", None)
    if task is None:
        raise UserError(f"{file} has no object TASK; end it with TASK = and one that scores.")
    return task


@cache
def task_names() -> list[str]:
    """What `scoring` may be."""
    modules = {path.stem for path in Path(__file__).parent.glob("[!_]*.py")}
    return sorted(modules - {"problem", "task"})
