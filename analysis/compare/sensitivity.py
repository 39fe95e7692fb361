"""How little it takes to undo a change: one latent left out, or some wrong labels.

As in `analysis.compare.statistics`, `a` is the reference model; shares are fractions, changes are
`share_b / share_a - 1`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from analysis.compare import statistics
from analysis.compare.statistics import Interval

Cluster = tuple[int, int]


class Undone(NamedTuple):
    """Probabilities that after label errors the model with more latents, or with the larger share, is not ahead."""

    counts: float
    shares: float


def leave_one_out(
    count_a: int,
    total_a: int,
    count_b: int,
    total_b: int,
    clusters_a: set[Cluster] | None = None,
    clusters_b: set[Cluster] | None = None,
) -> Interval:
    """Range of the change when one latent of either model is left out, whichever it is.

    Near-duplicates are left out together: `clusters` are the (latents in the category, latents) of a model's clusters;
    without them every latent stands alone. Where no latent of either model is left in the category, nothing of the
    change is: 0. NaN if there was none before.
    """
    without_a = clusters_a if clusters_a is not None else _single(count_a, total_a)
    without_b = clusters_b if clusters_b is not None else _single(count_b, total_b)
    tables = [(count_a - inside, total_a - size, count_b, total_b) for inside, size in without_a]
    tables += [(count_a, total_a, count_b - inside, total_b - size) for inside, size in without_b]
    if not count_a + count_b or not total_a or not total_b:
        return Interval(float("nan"), float("nan"))
    changes = [statistics.ratio(*table) - 1 for table in tables if table[1] and table[3] and table[0] + table[2]]
    changes += [0.0] * any(not table[0] + table[2] for table in tables)
    changes.append(statistics.ratio(count_a, total_a, count_b, total_b) - 1)
    return Interval(min(changes), max(changes))


def _single(count: int, total: int) -> set[Cluster]:
    """The kinds of latents that can be left out where each stands alone: one in the category, one that is not."""
    return {cluster for cluster, has in (((1, 1), count > 0), ((0, 1), total > count)) if has}


def undone_by_label_errors(
    count_a: int, total_a: int, count_b: int, total_b: int, error: float, num_categories: int
) -> Undone:
    """Probability that random label errors undo a difference that is true: the one ahead is then ahead no more.

    Each latent is given another category with probability `error`, any of them alike. A latent of the category stays
    with probability 1 - error, one of another comes in with probability error / (num_categories - 1). NaN where the
    two are level, or there is no other category.
    """
    if not total_a or not total_b or num_categories < 2:
        return Undone(float("nan"), float("nan"))
    into = error / (num_categories - 1)
    seen_a, seen_b = _seen(count_a, total_a, error, into), _seen(count_b, total_b, error, into)
    return Undone(
        _not_ahead(count_b - count_a, seen_a, seen_b, 1, 1),
        _not_ahead(count_b * total_a - count_a * total_b, seen_a, seen_b, total_a, total_b),
    )


def _seen(count: int, total: int, error: float, into: float) -> np.ndarray:
    """Distribution of the count after errors: those who stay plus those who come in."""
    stay = binom.pmf(np.arange(count + 1), count, 1 - error)
    return np.convolve(stay, binom.pmf(np.arange(total - count + 1), total - count, into))


def _not_ahead(lead_b: int, seen_a: np.ndarray, seen_b: np.ndarray, size_a: int, size_b: int) -> float:
    """Probability of B / size_b <= A / size_a if b was ahead, of the reverse if a was; NaN if neither was."""
    if lead_b == 0:
        return float("nan")
    ahead, behind, size_ahead, size_behind = (
        (seen_b, seen_a, size_b, size_a) if lead_b > 0 else (seen_a, seen_b, size_a, size_b)
    )
    at_most = np.minimum(np.arange(len(behind)) * size_ahead // size_behind, len(ahead) - 1)
    return float(behind @ np.cumsum(ahead)[at_most])
