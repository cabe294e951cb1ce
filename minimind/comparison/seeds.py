"""Runs that differ in nothing but the seed: how far seeds move a checkpoint, and a difference."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot

import numpy as np

from minimind.comparison.paired import ALPHA, TINY, Interval, Key, Outcome, align

Seeds = tuple[str, ...]  # what tells the runs of a group apart
Group = Mapping[Seeds, Mapping[Key, Outcome]]  # outcomes of one measure
POWER = 0.8
MAX_SEEDS = 1000


@dataclass(frozen=True)
class Spread:
    """Mean share over seeds, standard deviation, and the mean's 95 % t interval over seeds.

    Without any spread there is no interval.
    """

    num_seeds: int
    mean: float
    sd: float
    interval: Interval | None


@dataclass(frozen=True)
class OverSeeds:
    """Difference of two means over seeds, and how sure it is.

    paired: both have runs of the same seeds, and those are compared; otherwise Welch's t.
    further: seeds, of each, that are still missing for a power of 80 % at this difference; None
    where that is more than `MAX_SEEDS`.
    Without any spread there are no intervals, no p and no number of seeds.
    """

    paired: bool
    num_seeds: tuple[int, int]
    difference: float  # b - a
    of_seeds: Interval | None  # 95 %, with these problems
    of_both: Interval | None  # 95 %, with other problems, too
    p: float | None  # over seeds
    further: int | None


def spread(shares: Mapping[Seeds, float]) -> Spread:
    """Of two seeds or more."""
    values = np.array(list(shares.values()))
    mean, sd = float(values.mean()), float(values.std(ddof=1))
    interval = None
    if sd > TINY:
        low, high = _interval(mean, sd / len(values) ** 0.5, len(values) - 1)
        interval = max(low, 0.0), min(high, 1.0)
    return Spread(len(values), mean, sd, interval)


def share(outcomes: Mapping[Key, Outcome]) -> float:
    return float(np.mean([outcome.right for outcome in outcomes.values()]))


def compare_over_seeds(a: Group, b: Group) -> OverSeeds:
    """Two groups of two seeds or more.

    The interval over both adds the variances over seeds and over problems. What a problem and a
    seed do together is in both, so it is rather too wide (Cameron, Gelbach and Miller 2011 subtract
    it, which may leave a variance below 0). Its degrees of freedom are those over seeds, the fewer.
    """
    from scipy import stats

    shared = [seeds for seeds in a if seeds in b]
    if paired := len(shared) > 1:
        a, b = {seeds: a[seeds] for seeds in shared}, {seeds: b[seeds] for seeds in shared}
    aligned = align(list(a.values()), list(b.values()))
    of_a, of_b = aligned.a.mean(1), aligned.b.mean(1)
    difference = float(of_b.mean() - of_a.mean())
    if paired:
        sd = float(np.std(of_b - of_a, ddof=1))
        error = sd / len(a) ** 0.5
    else:
        variances = [float(np.var(of, ddof=1)) for of in (of_a, of_b)]
        sd = float(np.mean(variances)) ** 0.5
        error = hypot(*((v / n) ** 0.5 for v, n in zip(variances, (len(a), len(b)), strict=True)))
    num_seeds = len(a), len(b)
    if error < TINY:
        return OverSeeds(paired, num_seeds, difference, None, None, None, None)
    test = stats.ttest_rel(of_b, of_a) if paired else stats.ttest_ind(of_b, of_a, equal_var=False)
    df = float(test.df)
    both = hypot(error, aligned.bootstrap()[1])
    needed = _seeds_needed(abs(difference) / sd, paired)
    return OverSeeds(
        paired,
        num_seeds,
        difference,
        of_seeds=_interval(difference, error, df),
        of_both=_interval(difference, both, df),
        p=float(test.pvalue),
        further=None if needed is None else max(0, needed - min(num_seeds)),
    )


def _interval(centre: float, error: float, df: float) -> Interval:
    from scipy.stats import t

    low, high = t.interval(1 - ALPHA, df, centre, error)
    return float(low), float(high)


def _seeds_needed(effect: float, paired: bool) -> int | None:
    """Of each, for a power of 80 % at a difference of so many standard deviations."""
    from statsmodels.stats.power import TTestIndPower, TTestPower

    test = TTestPower() if paired else TTestIndPower()
    # 5 standard deviations need 3 seeds; much beyond, scipy's distribution is nan.
    for num_seeds in range(2, MAX_SEEDS + 1):
        if test.power(min(effect, 5.0), num_seeds, ALPHA) >= POWER:
            return num_seeds
    return None
