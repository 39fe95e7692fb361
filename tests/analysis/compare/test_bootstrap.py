"""The bootstrap against the exact distribution, its coverage with near-duplicates, and votes that differ."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from analysis.compare.bootstrap import IN_NONE, LOST, Units, bootstrap, units_of_counts


def units(names: list[list[int]], clusters: list[int] | None = None) -> Units:
    votes = np.array(names)
    return Units(np.array(clusters or range(len(votes))), votes, np.full(len(votes), votes.shape[1]))


def test_of_single_latents_it_is_the_binomial_bootstrap() -> None:
    # Against 100 % of b, the difference in a resample is 1 - Bin(50, 0.2) / 50.
    a, b = units_of_counts([10], 40), units_of_counts([5], 0)
    difference, change = bootstrap(a, b, 1, 20_000)[0]
    low, high = binom.ppf([0.025, 0.975], 50, 0.2) / 50
    assert difference == pytest.approx((1 - high, 1 - low), abs=0.021)
    assert change == pytest.approx((1 / high - 1, 1 / low - 1), rel=0.12)


def test_latents_are_read_by_another_vote() -> None:
    """The second latent has one vote alone, which is padded; the third was lost by its second vote."""
    three = Units(np.array([0, 0, 1]), np.array([[0, 1], [2, LOST], [1, LOST]]), np.array([2, 1, 2]))
    second = three.read_by(1)
    assert second.votes_nV.tolist() == [[1], [2], [LOST]] and second.num_votes == 1
    assert second.cluster_n.tolist() == [0, 0, 1]
    assert three.read_by(0).votes_nV.tolist() == [[0], [2], [1]]


SINGLE = (units_of_counts([10, 5], 40), units_of_counts([5, 20], 30))


def test_numbers_of_single_latents_are_drawn_as_the_latents_are() -> None:
    lost = Units(np.arange(20), np.full((20, 1), LOST), np.ones(20, int))
    a = Units(np.arange(75), np.concatenate([SINGLE[0].votes_nV, lost.votes_nV]), np.ones(75, int))
    assert a.are_single and SINGLE[1].are_single
    laid_out = [units(np.repeat(one.votes_nV, 2, axis=1).tolist()) for one in (a, SINGLE[1])]
    assert not any(one.are_single for one in laid_out)
    assert not units([[0], [0]], clusters=[0, 0]).are_single
    for drawn, other in zip(bootstrap(a, SINGLE[1], 2, 20_000), bootstrap(*laid_out, 2, 20_000), strict=True):
        assert drawn.difference == pytest.approx(other.difference, abs=0.021)
        assert drawn.change == pytest.approx(other.change, rel=0.13)


def coverage(size: int, clustered: bool, num: int = 400) -> np.ndarray:
    """How often the 95 % intervals of difference and change cover these; latents come as clusters of `size` equal
    ones.
    """
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for seed in range(num):
        sides = []
        for share in (0.3, 0.45):
            names = np.repeat(np.where(rng.random(60) < share, 0, IN_NONE), size)
            clusters = np.repeat(np.arange(60), size) if clustered else np.arange(60 * size)
            sides.append(Units(clusters, names[:, None], np.ones(len(names), int)))
        covered += covers(sides, seed)
    return covered / num


def covers(sides: list[Units], seed: int) -> list[bool]:
    """Whether the intervals hold the difference and the change from 0.3 to 0.45."""
    difference, change = bootstrap(*sides, 1, 400, seed=seed)[0]
    return [difference.low <= 0.15 <= difference.high, change.low <= 0.5 <= change.high]


def test_it_covers_the_truth_and_near_duplicates_only_in_clusters() -> None:
    # Four standard errors of .95 over the trials are .044.
    for covered in (coverage(1, clustered=False), coverage(3, clustered=True)):
        assert (covered >= 0.906).all() and (covered <= 0.99).all()
    # Three times the latents with no more information: without clusters the interval is sqrt(3) too narrow, and covers
    # 2 Phi(1.96 / sqrt(3)) - 1 = 74 % of the time.
    assert coverage(3, clustered=False) == pytest.approx([0.742, 0.742], abs=4 * 0.022)


def test_it_covers_the_truth_when_votes_differ() -> None:
    """A fifth of the latents is in the category by one vote in two; the truth is the share of all votes."""
    rng, covered, num = np.random.default_rng(1), np.zeros(2), 200
    for seed in range(num):
        sides = []
        for share in (0.3, 0.45):
            inside_n = rng.choice([1, 0.5, 0], 60, p=[share - 0.1, 0.2, 0.9 - share])
            votes = np.where(rng.random((60, 3)) < inside_n[:, None], 0, IN_NONE)
            sides.append(Units(np.arange(60), votes, np.full(60, 3)))
        covered += covers(sides, seed)
    assert (covered / num >= 0.95 - 4 * 0.0154).all()


def test_each_resample_draws_one_vote_of_each_latent() -> None:
    # Every latent of a has one vote for and one against: nobody knows better than one in two, and b is certain.
    a, b = units([[0, IN_NONE]] * 100), units([[IN_NONE, IN_NONE]] * 100)
    low, high = bootstrap(a, b, 1, 4000)[0].difference
    half = 1.96 * math.sqrt(0.25 / 100)
    assert (low, high) == pytest.approx((-0.5 - half, -0.5 + half), abs=0.02)
    # By the primary votes alone all of a are in it, and nothing varies.
    assert bootstrap(units([[0]] * 100), b, 1, 200)[0].difference == (-1, -1)


def test_a_vote_that_was_not_placed_counts_nowhere() -> None:
    # Of a, 30 latents are in it and 30 lost: its share of the placed is 1 in every resample.
    a, b = units([[0]] * 30 + [[LOST]] * 30), units([[0]] * 10)
    assert bootstrap(a, b, 1, 500)[0].difference == (0, 0)
    assert a.clusters_of(0) == {(1, 1)}


def test_nothing_is_known_without_latents() -> None:
    none = units_of_counts([0, 0], 0)
    for name in bootstrap(none, units_of_counts([1, 2], 3), 2, 50):
        assert all(math.isnan(end) for end in (*name.difference, *name.change))
    assert none.num_clusters == 0


def test_clusters_of_a_category_are_counted_by_their_kind() -> None:
    # Clusters: {0: two in the category}, {1: one in, one not}, {2: one not}, {3: lost}.
    one = units([[0], [0], [0], [IN_NONE], [IN_NONE], [LOST]], clusters=[0, 0, 1, 1, 2, 3])
    assert one.clusters_of(0) == {(2, 2), (1, 2), (0, 1)}
    assert one.num_clusters == 4 and one.num_votes == 1


def test_chunks_do_not_change_what_is_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each latent has its vote twice, so that latents are drawn and not their numbers.
    a, b = (units(np.repeat(one.votes_nV, 2, axis=1).tolist()) for one in SINGLE)
    whole = bootstrap(a, b, 2, 3000)
    monkeypatch.setattr("analysis.compare.bootstrap.CHUNK", 500)
    for first, second in zip(whole, bootstrap(a, b, 2, 3000), strict=True):
        assert first.difference == pytest.approx(second.difference, abs=0.03)
