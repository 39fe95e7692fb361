"""What Fisher's exact test can find at given sizes: its power, and the smallest true change that it would find.

Exact sums over the counts that two models can have; nothing is approximated but tails below 1e-9. As in
`analysis.compare.statistics`, `a` is the reference model, and a change is `share_b / share_a - 1`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import inf, nan, sqrt
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln
from scipy.stats import binom

TAIL = 1e-9
# Equal probabilities that differ in their last digits are equal, as in scipy's test.
TIE = 1 + 1e-7


class Detectable(NamedTuple):
    """True changes that a test finds: the smallest rise and fall at a given power, and the power for a doubling."""

    rise: float
    fall: float
    doubling: float


def detectable(share: float, total_a: int, total_b: int, target: float = 0.8, alpha: float = 0.05) -> Detectable:
    """What the test of one category with `share` in a can find; of no share, or no latents, nothing is a multiple."""
    if not share or not total_b:
        return Detectable(inf, nan, nan)
    return Detectable(
        detectable_rise(share, total_a, total_b, target, alpha),
        detectable_fall(share, total_a, total_b, target, alpha),
        power(share, 2 * share, total_a, total_b, alpha) if share <= 0.5 else nan,
    )


@lru_cache(maxsize=200_000)
def accepted(total_a: int, total_b: int, together: int, alpha: float) -> tuple[int, int]:
    """The lowest and highest count of a for which the test does not reject, with `together` latents in both models.

    Given that sum the count of a is hypergeometric, which has one peak: what is at least as probable as a count lies
    around the peak, so that the counts that are not rejected are an interval.
    """
    share = total_a / (total_a + total_b)
    # Bernstein's inequality leaves less than 1e-13 beyond these counts.
    middle, reach = together * share, 8 * sqrt(together * share * (1 - share)) + 40
    lowest, highest = max(0, together - total_b, int(middle - reach)), min(total_a, together, int(middle + reach))
    count_a = np.arange(lowest, highest + 1)
    log_p = _log_choose(total_a, count_a) + _log_choose(total_b, together - count_a)
    p = np.exp(log_p - _log_choose(total_a + total_b, np.array(together)))
    ordered = np.sort(p)
    up_to = np.concatenate([[0.0], np.cumsum(ordered)])[np.searchsorted(ordered, p * TIE, side="right")]
    kept = count_a[up_to >= alpha]
    return int(kept[0]), int(kept[-1])


def _log_choose(total: int, count: np.ndarray) -> np.ndarray:
    return gammaln(total + 1) - gammaln(count + 1) - gammaln(total - count + 1)


def power(share_a: float, share_b: float, total_a: int, total_b: int, alpha: float = 0.05) -> float:
    """Probability that the two-sided test of one category finds p < alpha if these are the true shares.

    sum of Bin(count_a; total_a, share_a) Bin(count_b; total_b, share_b) over the pairs of counts that it rejects.
    """
    counts_a, counts_b = _likely(total_a, share_a), _likely(total_b, share_b)
    sums = np.arange(counts_a[0] + counts_b[0], counts_a[-1] + counts_b[-1] + 1)
    bounds = np.array([accepted(total_a, total_b, int(together), alpha) for together in sums])
    low, high = np.moveaxis(bounds[(counts_a[:, None] + counts_b) - sums[0]], -1, 0)
    rejected = (counts_a[:, None] < low) | (counts_a[:, None] > high)
    return float(binom.pmf(counts_a, total_a, share_a) @ rejected @ binom.pmf(counts_b, total_b, share_b))


def _likely(total: int, share: float) -> np.ndarray:
    """The counts that occur at all, but for the tails."""
    return np.arange(int(binom.ppf(TAIL, total, share)), int(binom.isf(TAIL, total, share)) + 1).clip(0, total)


@lru_cache(maxsize=10_000)
def detectable_rise(share: float, total_a: int, total_b: int, target: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true rise that the test of one category finds with probability `target`; 1.0 is a doubling.

    Infinite when no share up to 1 would do, or when the share of a is 0, of which nothing is a multiple.
    """
    if share <= 0 or power(share, 1.0, total_a, total_b, alpha) < target:
        return float("inf")
    return _crossing(lambda share_b: power(share, share_b, total_a, total_b, alpha) - target, share, 1.0) / share - 1


@lru_cache(maxsize=10_000)
def detectable_fall(share: float, total_a: int, total_b: int, target: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true fall that the test finds, as a negative change; NaN where not even absence (-1) would be."""
    if share <= 0 or power(share, 0.0, total_a, total_b, alpha) < target:
        return float("nan")
    return _crossing(lambda share_b: power(share, share_b, total_a, total_b, alpha) - target, share, 0.0) / share - 1


def _crossing(surplus: Callable[[float], float], start: float, end: float) -> float:
    """Where `surplus` rises through 0 on the way from start to end; near the start first, where a power is cheap."""
    reached, width = start, (end - start) / 2**12
    while surplus(reached) < 0 and reached != end:
        width *= 2
        reached = start + width if abs(width) < abs(end - start) else end
    return float(brentq(surplus, start, reached, xtol=1e-6))
