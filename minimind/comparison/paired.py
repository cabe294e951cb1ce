"""Two checkpoints at the same problems: which is better, and how sure that is.

Rows that ask one problem in other words are no evidence of their own: problems are what is paired,
counted and drawn again (cluster bootstrap; Davison and Hinkley 1997, sec. 3.8).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimind.errors import UserError

Interval = tuple[float, float]
Key = tuple[str, int]  # a row's id, and how many rows before it have the same
Floats = NDArray[np.float64]
NUM_RESAMPLES = 9999
ALPHA = 0.05
TINY = 1e-12  # a spread that is but rounding


class Outcome(NamedTuple):
    """What became of one row."""

    problem: str
    answer: str  # the expected one
    right: bool


Outcomes = dict[str, dict[Key, Outcome]]  # by measure


@dataclass(frozen=True)
class Paired:
    """Shares of right answers, from 0 to 1, of rows; the rest counts problems.

    interval: 95 %, of the difference over problems; None where all have the same, so that there is
    nothing to estimate it from.
    """

    measure: str
    num_rows: int
    num_problems: int
    share_a: float
    share_b: float
    only_a: int  # problems at which a is better, ..
    only_b: int  # .. and b
    difference: float  # b - a
    interval: Interval | None
    p: float


def outcomes(predictions: Sequence[Mapping[str, Any]]) -> Outcomes:
    """What the report's rows are the shares of: levels and tasks, and choices of those without."""
    found: Outcomes = {}
    seen = Counter[str]()
    for row in predictions:
        key = (row["id"], seen[row["id"]])
        seen[row["id"]] += 1
        level = "exact" if row["level"] is None else f"level {row['level']}"
        chose, right = row["choice_correct"], row["correct"]
        rights = {row["task"]: right if chose is None else chose}
        if row["task"] is None:
            rights = {level: right} | ({} if chose is None else {"choice": chose})
        for measure, value in rights.items():
            found.setdefault(measure, {})[key] = Outcome(row["problem"], row["answer"], value)
    return dict(sorted(found.items(), key=lambda item: item[0] == "choice"))  # it comes last


@dataclass(frozen=True)
class Aligned:
    """What runs of two checkpoints did at the rows that all of them have; R rows, in order."""

    a: Floats  # runs x R, 0 or 1
    b: Floats
    problems: NDArray[np.intp]  # R, a number for each problem

    def by_problem(self, values: Floats) -> Floats:
        """Sums of each problem's rows."""
        return np.bincount(self.problems, weights=values).astype(np.float64)

    def bootstrap(self) -> tuple[Interval | None, float]:
        """Of mean(b) - mean(a), if problems are drawn again: 95 % interval, standard error.

        None and 0 where all problems have the same difference: there is nothing to see it from.
        """
        from scipy.stats import bootstrap

        differences = self.by_problem(self.b.mean(0) - self.a.mean(0))
        sizes = self.by_problem(np.ones(len(self.problems)))
        if np.ptp(differences / sizes) < TINY:
            return None, 0.0
        drawn = bootstrap(
            (differences, sizes),
            lambda d, n, axis: d.sum(axis) / n.sum(axis),
            paired=True,
            n_resamples=NUM_RESAMPLES,
            batch=500,  # bounds memory
            method="percentile",
            rng=np.random.default_rng(0),
        )
        low, high = drawn.confidence_interval
        return (float(low), float(high)), float(drawn.standard_error)


def align(a: Sequence[Mapping[Key, Outcome]], b: Sequence[Mapping[Key, Outcome]]) -> Aligned:
    """The rows that all runs have.

    Raises:
        UserError: there is none, or one has another answer in another run.
    """
    runs = [*a, *b]
    keys = [key for key in runs[0] if all(key in run for run in runs)]
    if not keys:
        raise UserError("they have no problem in common; evaluate them on the same data.problems.")
    for key in keys:
        if len({run[key][:2] for run in runs}) > 1:
            answers = " and ".join(sorted({run[key].answer for run in runs}))
            raise UserError(
                f"they were asked other problems: of {key[0]} the answer is {answers}; evaluate "
                "them on the same data.problems."
            )
    _, problems = np.unique([runs[0][key].problem for key in keys], return_inverse=True)
    rights = (np.array([[run[key].right for key in keys] for run in group]) for group in (a, b))
    right_a, right_b = (right.astype(np.float64) for right in rights)
    return Aligned(right_a, right_b, problems)


def compare(measure: str, a: Mapping[Key, Outcome], b: Mapping[Key, Outcome]) -> Paired:
    """One run of each, problem by problem.

    p: McNemar's exact test (Psychometrika 12, 1947): the sign test of the pairs that differ. A
    problem of several rows differs in favour of whom more of its rows are right; with one row
    each that is McNemar's. Where neither checkpoint is better, either sign is as likely, whatever
    rows of one problem have in common. Problems count alike there, rows in the shares.
    """
    from scipy.stats import binomtest

    aligned = align([a], [b])
    differences = aligned.by_problem(aligned.b[0] - aligned.a[0])
    only_a, only_b = int((differences < 0).sum()), int((differences > 0).sum())
    share_a, share_b = float(aligned.a.mean()), float(aligned.b.mean())
    return Paired(
        measure,
        num_rows=len(aligned.problems),
        num_problems=len(differences),
        share_a=share_a,
        share_b=share_b,
        only_a=only_a,
        only_b=only_b,
        difference=share_b - share_a,
        interval=aligned.bootstrap()[0],
        p=float(binomtest(only_a, only_a + only_b).pvalue) if only_a or only_b else 1.0,
    )


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p corrected for how many there are (Holm 1979); None is no comparison."""
    from statsmodels.stats.multitest import multipletests

    known = [p for p in ps if p is not None]
    corrected = iter(multipletests(known, method="holm")[1] if known else [])
    return [None if p is None else float(next(corrected)) for p in ps]
