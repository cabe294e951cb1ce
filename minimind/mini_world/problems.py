"""Counting problems as numbers, and which of them are held out.

A problem is a start value and one to four events; its level is the number of events. Whether it
is held out is a hash of its numbers alone, so it is the same in every file, for every seed and in
both languages:

- training problems contain nothing held out: neither the whole problem, nor any run of
  successive steps in it, nor a single sum or difference;
- held-out problems of level 1 are held-out sums and differences; those of higher levels consist
  of single steps that were all free to be trained on, so they test composition.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

SMALLEST_VALUE = 2  # so that "1 apples" never has to be said
SMALLEST_AMOUNT = 2
BOX_SHARE = 0.25  # of problems that start with boxes of equal content
LARGEST_FACTOR = 9  # of the times table
MAX_CARELESS_TRIES = 20
SLIPS = (-11, -10, -3, -2, -1, 1, 2, 3, 10, 11)  # how far a plausible wrong answer is off


class Event(NamedTuple):
    """One event: ``before operator amount = after``."""

    before: int
    operator: str  # "+", "-" or, as the first step only, "*"
    amount: int
    after: int

    @property
    def equation(self) -> str:
        # Without spaces: fewer tokens, and a small model learns it better.
        return f"{self.before}{self.operator}{self.amount}={self.after}"


Problem = tuple[Event, ...]


def answer_of(problem: Problem) -> int:
    return problem[-1].after


@dataclass(frozen=True)
class ProblemSpace:
    """All problems with values up to ``max_value``, a share of them held out."""

    max_value: int
    held_out_percent: int

    def draw_training(self, rng: random.Random, level: int) -> Problem:
        """A problem of which no part is held out: no single step, no run of steps, no whole."""
        while True:
            problem = self._draw(rng, level)
            if not self._has_held_out_part(problem):
                return problem

    def draw_held_out(self, rng: random.Random, level: int) -> Problem:
        """A held-out problem; from level 2 on, none of its single steps is held out."""
        while True:
            problem = self._draw(rng, level)
            if self.is_held_out(problem) and (
                level == 1 or not any(self.is_held_out((step,)) for step in problem)
            ):
                return problem

    def draw_comparison(self, rng: random.Random, held_out: bool) -> tuple[int, int]:
        """Two different numbers from 1 on; pairs are held out like problems."""
        while True:
            a, b = rng.randint(1, self.max_value), rng.randint(1, self.max_value)
            bucket = hash_bucket(f"{min(a, b)}<{max(a, b)}")
            if a != b and (bucket < self.held_out_percent) == held_out:
                return a, b

    def is_held_out(self, problem: Problem) -> bool:
        """Whether this very problem is; single products never are, being the times table."""
        if len(problem) == 1 and problem[0].operator == "*":
            return False
        return _bucket_of(problem) < self.held_out_percent

    def wrong_answers(self, problem: Problem) -> list[int]:
        """Plausible mistakes, ascending: slips of the pen, the last event forgotten or reversed.

        None is the right answer, since no event leaves its value as it was.
        """
        last = problem[-1]
        candidates = {last.after + slip for slip in SLIPS} | {last.before}
        if last.operator != "*":
            candidates.add(2 * last.before - last.after)
        return sorted(n for n in candidates if SMALLEST_VALUE <= n <= self.max_value)

    def careless(self, rng: random.Random, problem: Problem, wrong_share: float) -> Problem:
        """The same events with about that share of results wrong; later steps go on from these.

        Still a training problem with values in bounds; unchanged where no such slips are found.
        """
        for _ in range(MAX_CARELESS_TRIES):
            slipped = self._with_slips(rng, problem, wrong_share)
            if not self._has_held_out_part(slipped):
                return slipped
        return problem

    def _with_slips(self, rng: random.Random, problem: Problem, wrong_share: float) -> Problem:
        steps: list[Event] = []
        off = 0  # how far the value is from what it should be
        for number, right in enumerate(problem):
            step = right._replace(before=right.before + off, after=right.after + off)
            if rng.random() < wrong_share:
                values = [later.after + off for later in problem[number:]]
                slips = [
                    slip
                    for slip in (wrong - step.after for wrong in self.wrong_answers((step,)))
                    if min(values) + slip >= SMALLEST_VALUE and max(values) + slip <= self.max_value
                ]
                if slips:
                    slip = rng.choice(slips)
                    step, off = step._replace(after=step.after + slip), off + slip
            steps.append(step)
        return tuple(steps)

    def _draw(self, rng: random.Random, level: int) -> Problem:
        """Any problem of ``level`` steps with all values in SMALLEST_VALUE..max_value."""
        steps: list[Event] = []
        if rng.random() < BOX_SHARE:
            boxes = rng.randint(2, LARGEST_FACTOR)
            each = rng.randint(2, min(LARGEST_FACTOR, self.max_value // boxes))
            value = boxes * each
            steps.append(Event(boxes, "*", each, value))
        else:
            value = rng.randint(SMALLEST_VALUE, self.max_value)
        while len(steps) < level:
            most_gained = self.max_value - value
            most_lost = value - SMALLEST_VALUE
            gains = rng.random() < 0.5
            if (most_gained if gains else most_lost) < SMALLEST_AMOUNT:
                gains = not gains
            amount = rng.randint(SMALLEST_AMOUNT, most_gained if gains else most_lost)
            after = value + amount if gains else value - amount
            steps.append(Event(value, "+" if gains else "-", amount, after))
            value = after
        return tuple(steps)

    def _has_held_out_part(self, problem: Problem) -> bool:
        parts = combinations(range(len(problem) + 1), 2)
        return any(self.is_held_out(problem[start:end]) for start, end in parts)


# Single steps come again and again; longer problems do not, and need not be remembered.
@lru_cache(maxsize=20_000)
def _bucket_of(problem: Problem) -> int:
    """A problem's number from 0 to 99.

    The order of the first step's numbers does not count where the result does not depend on it:
    3+5 and 5+3 are held out together.
    """
    first = problem[0]
    left, right = first.before, first.amount
    if first.operator != "-" and left > right:
        left, right = right, left
    rest = "".join(f"{step.operator}{step.amount}" for step in problem[1:])
    return hash_bucket(f"{left}{first.operator}{right}{rest}")


def hash_bucket(key: str) -> int:
    """A number from 0 to 99 that depends on the key alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
