"""Intervals and exact tests for shares of small counts: `count` of `total` latents fall into a category.

Throughout, `a` is the reference model and `b` the other one; shares are fractions, changes are `share_b / share_a - 1`.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import false_discovery_control, fisher_exact, norm


class Interval(NamedTuple):
    """The two ends of a confidence interval."""

    low: float
    high: float


def wilson(count: int, total: int, confidence: float = 0.95) -> Interval:
    """Score interval of a share, `(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)` (Wilson 1927).

    Without observations it is (0, 1).
    """
    if total == 0:
        return Interval(0.0, 1.0)
    z2 = norm.ppf((1 + confidence) / 2) ** 2
    share = count / total
    centre = share + z2 / (2 * total)
    half = np.sqrt(z2 * (share * (1 - share) + z2 / (4 * total)) / total)
    scale = 1 + z2 / total
    return Interval(max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale)))


def newcombe(count_a: int, total_a: int, count_b: int, total_b: int, confidence: float = 0.95) -> Interval:
    """Interval of the difference of shares b - a from the two Wilson intervals (Newcombe 1998, method 10)."""
    if total_a == 0 or total_b == 0:
        return Interval(-1.0, 1.0)
    share_a, share_b = count_a / total_a, count_b / total_b
    wilson_a, wilson_b = wilson(count_a, total_a, confidence), wilson(count_b, total_b, confidence)
    difference = share_b - share_a
    below = np.hypot(share_b - wilson_b.low, wilson_a.high - share_a)
    above = np.hypot(wilson_b.high - share_b, share_a - wilson_a.low)
    return Interval(float(difference - below), float(difference + above))


def ratio(count_a: int, total_a: int, count_b: int, total_b: int) -> float:
    """share_b / share_a; infinite when only a has no count, NaN when neither model has one or either has no latents."""
    if total_a == 0 or total_b == 0 or count_a == count_b == 0:
        return float("nan")
    return float("inf") if count_a == 0 else (count_b / total_b) / (count_a / total_a)


def katz(count_a: int, total_a: int, count_b: int, total_b: int, confidence: float = 0.95) -> Interval:
    """Interval of the ratio of shares b / a on the log scale (Katz et al. 1978).

        exp( log(ratio) +- z sqrt(1/count_a - 1/total_a + 1/count_b - 1/total_b) )

    Where that has no finite width (a zero count, or both shares 1) half a latent is added to each of the four cells;
    the end that no data can bound is then 0 (no count in b) or infinity (no count in a).
    """
    if total_a == 0 or total_b == 0:
        return Interval(0.0, float("inf"))
    x_a, n_a, x_b, n_b = float(count_a), float(total_a), float(count_b), float(total_b)
    if count_a == 0 or count_b == 0 or (count_a == total_a and count_b == total_b):
        x_a, n_a, x_b, n_b = x_a + 0.5, n_a + 1, x_b + 0.5, n_b + 1
    half = norm.ppf((1 + confidence) / 2) * np.sqrt(1 / x_a - 1 / n_a + 1 / x_b - 1 / n_b)
    centre = np.log((x_b / n_b) / (x_a / n_a))
    low = 0.0 if count_b == 0 else float(np.exp(centre - half))
    high = float("inf") if count_a == 0 else float(np.exp(centre + half))
    return Interval(low, high)


def fisher(count_a: int, total_a: int, count_b: int, total_b: int) -> float:
    """Two-sided p of Fisher's exact test that both models have the same share."""
    return float(fisher_exact([[count_a, total_a - count_a], [count_b, total_b - count_b]]).pvalue)


def benjamini_hochberg(pvalues: list[float]) -> list[float]:
    """q of each p: the false discovery rate at which it would still be called (Benjamini & Hochberg 1995)."""
    return [float(q) for q in false_discovery_control(pvalues, method="bh")] if pvalues else []


def holm(pvalues: list[float]) -> list[float]:
    """Each p corrected so that some true hypothesis is rejected with probability alpha at most (Holm 1979).

    Of the sorted p the i-th of m becomes `max over j <= i of (m - j + 1) p_j`, at most 1.
    """
    order = np.argsort(pvalues)
    scaled = np.asarray(pvalues)[order] * np.arange(len(pvalues), 0, -1)
    corrected = np.empty(len(pvalues))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in corrected]
