"""A function of the user's own, in a Python file of the project."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from minimind.errors import UserError, importing
from minimind.rewards.reward import CustomReward, Given, Reward, Sample


class Custom(Reward):
    """What ``score(prompt, completion, answer)`` says, from -1 to 1."""

    def bounds(self) -> tuple[float, float]:
        return -1.0, 1.0

    def score(self, samples: Sequence[Sample], given: Given) -> list[float]:
        """Raises UserError where it is no number from -1 to 1."""
        assert given.custom is not None
        values = []
        for sample in samples:
            problem = sample.problem
            value = given.custom(problem.prompt, sample.completion, problem.answer)
            if not isinstance(value, int | float) or not -1 <= value <= 1:  # NaN is not, either
                raise UserError(
                    f"the custom reward is {value!r} for the prompt {problem.prompt[:60]!r}; "
                    "it must be a number from -1 to 1."
                )
            values.append(float(value))
        return values


REWARD = Custom


def load_custom_reward(file: Path) -> CustomReward:
    """The function ``score(prompt, completion, answer)`` of a Python file of this project.

    Raises:
        UserError: the file is missing or outside of the project's folder, fails when it is
            imported, or has no such function.
    """
    root = Path.cwd().resolve()
    if file.suffix != ".py" or not file.resolve().is_relative_to(root):
        raise UserError(
            f"{file} must be a .py file inside of {root}, so that its content is tracked."
        )
    if not file.is_file():
        raise UserError(f"{file} is missing; write it, with a function score, or correct the path.")
    spec = importlib.util.spec_from_file_location("minimind_custom_reward", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with importing(file):
        spec.loader.exec_module(module)
    score = getattr(module, "score", None)
    if not callable(score):
        raise UserError(f"{file} has no function score(prompt, completion, answer); define it.")
    return _checked(score, file)


def _checked(score: CustomReward, file: Path) -> CustomReward:
    def checked(prompt: str, completion: str, answer: str | None) -> float:
        try:
            return score(prompt, completion, answer)
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            raise UserError(
                f"{file}: score failed on the prompt {prompt[:60]!r}: "
                f"{type(error).__name__}: {error}."
            ) from error

    return checked
