"""Confidence intervals of shares."""

import math
from collections import defaultdict
from collections.abc import Sequence

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson_interval(share: float, num_trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4).

    Unlike the share plus or minus some standard errors, it stays within 0 and 1 and holds for
    shares near them.
    """
    assert 0 <= share <= 1 and num_trials > 0
    z2 = Z_95**2
    centre = (share + z2 / (2 * num_trials)) / (1 + z2 / num_trials)
    spread = Z_95 * math.sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials**2))
    spread /= 1 + z2 / num_trials
    # At 0 and at 1 the bounds are exact but for rounding.
    low = 0.0 if share == 0 else centre - spread
    high = 1.0 if share == 1 else centre + spread
    return low, high


def effective_trials(right: Sequence[bool], problems: Sequence[str]) -> float:
    """How many independent answers would tell as much as these, some of them to one problem.

    Those whose share has the same error as this one has over problems (cluster-robust; Dean and
    Pagano 2015). They lie between the numbers of problems and of answers: beyond, and where all
    answers are alike, there is nothing to estimate them from.
    """
    share = sum(right) / len(right)
    deviations: dict[str, float] = defaultdict(float)
    for correct, problem in zip(right, problems, strict=True):
        deviations[problem] += correct - share
    num_problems = len(deviations)
    if num_problems in (1, len(right)) or share in (0, 1):
        return num_problems
    of_problems = sum(deviation**2 for deviation in deviations.values())
    variance = of_problems / len(right) ** 2 * num_problems / (num_problems - 1)
    if variance * len(right) <= share * (1 - share):
        return len(right)
    return max(share * (1 - share) / variance, num_problems)
