"""How far raters agree beyond chance: Krippendorff's alpha and Cohen's kappa, with bootstrap intervals over clusters of
units: those of one cluster, such as near-duplicates or the documents of one latent, are drawn together.

Shapes: U units (latents), C clusters of them, K values that a rater may give, R resamples. A value is None where a
rater gave none.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from analysis.compare.statistics import Interval, wilson

# Resamples drawn at a time: bounds the (R, U) weights.
CHUNK = 500
# Coefficients of resamples that differ by less are equal but for rounding.
SPREAD = 1e-9


@dataclass(frozen=True)
class Agreement:
    """A coefficient (1 = complete, 0 = as by chance; NaN where one value is all there is), interval (NaN where nothing
    is known of it) and units.
    """

    value: float
    interval: Interval
    num_units: int


class Disagreement(NamedTuple):
    """Observed and expected disagreement (R,) under R weightings of the units; the coefficient is 1 - o / e."""

    observed_R: np.ndarray
    expected_R: np.ndarray

    def coefficients(self) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.expected_R > 0, 1 - self.observed_R / self.expected_R, np.nan)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: their coverage, the number of resamples, and the seed of the resampling."""

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0


def krippendorff(
    units: Sequence[Sequence[str | None]], bootstrap: Bootstrap, clusters: Sequence[Hashable] | None = None
) -> Agreement:
    """Alpha for nominal values of any number of raters, with missing values (Krippendorff 2011).

    The interval is over `clusters`, the cluster of each unit; by default each is its own.

        alpha = 1 - D_o / D_e,  D_o = 1/n sum_u sum_{k != l} n_uk n_ul / (m_u - 1),
                                D_e = 1/(n (n - 1)) sum_{k != l} n_k n_l

    n_uk of the m_u values of unit u are k; units with fewer than two values cannot be compared and do not count.
    """
    clusters = range(len(units)) if clusters is None else clusters
    given = [([value for value in unit if value is not None], own) for unit, own in zip(units, clusters, strict=True)]
    pairable = [(values, own) for values, own in given if len(values) > 1]
    count_UK = _counts([values for values, _ in pairable])
    size_U = count_UK.sum(1)
    unlike_U = (size_U**2 - (count_UK**2).sum(1)) / np.maximum(size_U - 1, 1)

    def disagreement(weight_RU: np.ndarray) -> Disagreement:
        n_R, count_RK = weight_RU @ size_U, weight_RU @ count_UK
        return Disagreement(weight_RU @ unlike_U / n_R, (n_R**2 - (count_RK**2).sum(1)) / (n_R * (n_R - 1)))

    return _agreement(disagreement, [own for _, own in pairable], bootstrap)


def cohen(
    pairs: Sequence[tuple[str | None, str | None]], bootstrap: Bootstrap, clusters: Sequence[Hashable] | None = None
) -> Agreement:
    """Kappa of two raters with nominal values (Cohen 1960); units that one of them left out do not count.

    The interval is over `clusters`, the cluster of each unit; by default each is its own.

    kappa = 1 - (1 - p_o) / (1 - p_e),  p_o = share of units with equal values,  p_e = sum_k p_k^first p_k^second
    """
    clusters = range(len(pairs)) if clusters is None else clusters
    given = zip(pairs, clusters, strict=True)
    found = [((a, b), own) for (a, b), own in given if a is not None and b is not None]
    both = [pair for pair, _ in found]
    values = sorted({value for pair in both for value in pair})
    first_UK, second_UK = (_counts([[pair[rater]] for pair in both], values) for rater in (0, 1))
    unequal_U = np.array([float(first != second) for first, second in both])

    def disagreement(weight_RU: np.ndarray) -> Disagreement:
        n_R = weight_RU.sum(1)
        chance_R = ((weight_RU @ first_UK) * (weight_RU @ second_UK)).sum(1) / n_R**2
        return Disagreement(weight_RU @ unequal_U / n_R, 1 - chance_R)

    return _agreement(disagreement, [own for _, own in found], bootstrap)


def _counts(units: Sequence[Sequence[str]], values: list[str] | None = None) -> np.ndarray:
    """How often each unit has each value (U, K)."""
    values = sorted({value for unit in units for value in unit}) if values is None else values
    index = {value: k for k, value in enumerate(values)}
    count_UK = np.zeros((len(units), len(values)))
    for row, unit in zip(count_UK, units, strict=True):
        for value in unit:
            row[index[value]] += 1
    return count_UK


def _agreement(
    disagreement: Callable[[np.ndarray], Disagreement], clusters: Sequence[Hashable], bootstrap: Bootstrap
) -> Agreement:
    """The coefficient and its percentile interval; resamples in which one value is all there is are left out.

    Where no two values differ, resampling shows no spread at all. The lower end is then 1 - (1 - w) / D_e with w the
    lower end of the Wilson interval of "no cluster differs", as if one that differed did so completely. Where values
    differ and there is no spread either, nothing is known: a kappa is 0 whatever is said by a rater to whom all units
    are alike. There is no interval then (NaN).
    """
    num_units = len(clusters)
    unknown = Interval(float("nan"), float("nan"))
    if num_units == 0:
        return Agreement(float("nan"), unknown, num_units)
    found = disagreement(np.ones((1, num_units)))
    value = float(found.coefficients()[0])
    if np.isnan(value):
        return Agreement(value, unknown, num_units)
    index = {own: place for place, own in enumerate(dict.fromkeys(clusters))}
    if found.observed_R[0] == 0:
        low = 1 - (1 - wilson(len(index), len(index), bootstrap.confidence).low) / float(found.expected_R[0])
        return Agreement(value, Interval(low, 1.0), num_units)
    cluster_U = np.array([index[own] for own in clusters])
    weights = (weight_RC[:, cluster_U] for weight_RC in _weights(len(index), bootstrap))
    resampled = np.concatenate([disagreement(weight_RU).coefficients() for weight_RU in weights])
    tail = (1 - bootstrap.confidence) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    is_known = np.nanmax(resampled) - np.nanmin(resampled) > SPREAD
    return Agreement(value, Interval(float(low), float(high)) if is_known else unknown, num_units)


def _weights(num_clusters: int, bootstrap: Bootstrap) -> list[np.ndarray]:
    """How often each cluster is drawn in each resample, in parts (R, C)."""
    rng = np.random.default_rng(bootstrap.seed)
    shares = np.full(num_clusters, 1 / num_clusters)
    sizes = [min(CHUNK, bootstrap.resamples - start) for start in range(0, bootstrap.resamples, CHUNK)]
    return [rng.multinomial(num_clusters, shares, size=size).astype(float) for size in sizes]
