"""Intervals of shares by resampling latents with their near-duplicates, and the votes of those who categorised them.

Shapes: n latents of one model, K their clusters, V votes, C names (categories or classes), R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from analysis.compare.statistics import Interval

# What a vote can be besides the number of a name: in none of them, or not placed at all (refused, truncated ...).
IN_NONE, LOST = -1, -2
# Numbers that one chunk of resamples may hold.
CHUNK = 1_000_000


@dataclass(frozen=True)
class Units:
    """The latents of one model as they are resampled.

    `cluster_n` numbers the cluster of near-duplicates of each latent from 0. `votes_nV` holds the name (or IN_NONE, or
    LOST) by each vote, the primary one first; only the first `num_votes_n` of a row are votes.
    """

    cluster_n: np.ndarray
    votes_nV: np.ndarray
    num_votes_n: np.ndarray

    @property
    def num_clusters(self) -> int:
        return len(np.unique(self.cluster_n))

    @property
    def num_votes(self) -> int:
        """The most votes that a latent has."""
        return int(self.num_votes_n.max(initial=0))

    @property
    def are_single(self) -> bool:
        """Whether every latent is its own cluster and has one vote: then how many have each name says everything."""
        return self.num_votes <= 1 and self.num_clusters == len(self.cluster_n)

    def read_by(self, vote: int) -> Units:
        """The latents by that vote alone; those with fewer votes keep their first."""
        column_n = np.where(vote < self.num_votes_n, vote, 0)
        votes_n1 = np.take_along_axis(self.votes_nV, column_n[:, None], axis=1)
        return replace(self, votes_nV=votes_n1, num_votes_n=np.ones_like(self.num_votes_n))

    def clusters_of(self, name: int) -> set[tuple[int, int]]:
        """The different (latents with that name, placed latents) of clusters, by the primary votes."""
        primary = self.votes_nV[:, 0]
        inside, size = (np.bincount(self.cluster_n[primary_is]) for primary_is in (primary == name, primary != LOST))
        inside = np.pad(inside, (0, len(size) - len(inside)))
        return {(int(a), int(b)) for a, b in zip(inside, size, strict=True) if b}


def units_of_counts(counts: list[int], rest: int) -> Units:
    """Latents that are known by their number alone: each its own cluster, with one vote."""
    names = np.repeat([*range(len(counts)), IN_NONE], [*counts, rest])
    return Units(np.arange(len(names)), names[:, None], np.ones(len(names), dtype=int))


class Resampled(NamedTuple):
    """Percentile intervals of the difference of shares b - a and of the change `share_b / share_a - 1`."""

    difference: Interval
    change: Interval


def bootstrap(
    a: Units, b: Units, num_names: int, num_resamples: int, confidence: float = 0.95, seed: int = 0
) -> list[Resampled]:
    """Percentile intervals for every name (Efron 1979).

    Each resample draws as many clusters of either model as it has, with replacement and whole, and for every latent
    that it drew one of its votes at random; where that vote is LOST, the latent counts nowhere (of single latents with
    one vote, the counts of a resample are multinomial, and drawn as such). A name without a latent
    in a model has none in any resample, so that its intervals are too narrow: read those from the counts.
    """
    rng = np.random.default_rng(seed)
    share_a, share_b = (_shares(units, num_names, num_resamples, rng) for units in (a, b))
    with np.errstate(divide="ignore", invalid="ignore"):
        difference, change = share_b - share_a, share_b / share_a - 1
    return [
        Resampled(_percentiles(difference[:, name], confidence), _percentiles(change[:, name], confidence))
        for name in range(num_names)
    ]


def _percentiles(values: np.ndarray, confidence: float) -> Interval:
    """Order statistics, since infinite values cannot be interpolated; NaN (nothing drawn) says nothing."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], method="inverted_cdf")
    return Interval(float(low), float(high))


def _shares(units: Units, num_names: int, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(R, C) shares of the names in each resample."""
    if units.are_single:
        column_n = _columns(units.votes_nV[:, 0], num_names)
        count_N = np.bincount(column_n, minlength=num_names + 2)
        counts_RN = rng.multinomial(len(column_n), count_N / max(len(column_n), 1), num_resamples)
    else:
        per_chunk = max(1, CHUNK // max(len(units.cluster_n), 1))
        sizes = [min(per_chunk, num_resamples - start) for start in range(0, num_resamples, per_chunk)]
        counts_RN = np.concatenate([_counts(units, num_names, size, rng) for size in sizes])
    with np.errstate(invalid="ignore"):
        return counts_RN[:, :num_names] / counts_RN[:, : num_names + 1].sum(1, keepdims=True)


def _columns(names: np.ndarray, num_names: int) -> np.ndarray:
    """The columns that votes count in: those of their names, then in none, then lost."""
    return np.where(names >= 0, names, num_names - 1 - names)


def _counts(units: Units, num_names: int, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(R, C + 2) latents by name, in none (column C) and lost (column C + 1) in each resample.

    Clusters are drawn as slices of the latents in their order, and the slices of all resamples laid end to end: s
    latents, of which each has a vote of its own, however often it was drawn.
    """
    order_n, size_K = np.argsort(units.cluster_n, kind="stable"), np.bincount(units.cluster_n)
    start_K, num_clusters, width = np.cumsum(size_K) - size_K, len(size_K), num_names + 2
    picked = rng.integers(0, max(num_clusters, 1), num_resamples * num_clusters)
    size, start = size_K[picked], start_K[picked]
    latent_s = order_n[np.repeat(start - (np.cumsum(size) - size), size) + np.arange(size.sum())]
    resample_s = np.repeat(np.arange(num_resamples), size.reshape(num_resamples, num_clusters).sum(1))
    drawn_s = rng.integers(0, units.num_votes_n[latent_s]) if units.num_votes > 1 else 0
    column_s = _columns(units.votes_nV[latent_s, drawn_s], num_names)
    found = np.bincount(resample_s * width + column_s, minlength=num_resamples * width)
    return found.reshape(num_resamples, width)
