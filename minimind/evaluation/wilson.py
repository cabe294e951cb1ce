"""Confidence intervals of shares."""

import math

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson_interval(successes: int, num_trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4).

    Unlike the share plus or minus some standard errors, it stays within 0 and 1 and holds for
    shares near them.
    """
    assert 0 <= successes <= num_trials and num_trials > 0
    share, z2 = successes / num_trials, Z_95**2
    centre = (share + z2 / (2 * num_trials)) / (1 + z2 / num_trials)
    spread = Z_95 * math.sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials**2))
    spread /= 1 + z2 / num_trials
    # At 0 and at 1 the bounds are exact but for rounding.
    low = 0.0 if successes == 0 else centre - spread
    high = 1.0 if successes == num_trials else centre + spread
    return low, high
