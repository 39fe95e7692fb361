"""Intervals against published worked examples, scipy and their own coverage."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest, contingency

from analysis.compare import statistics


@pytest.mark.parametrize(("count", "total"), [(0, 10), (1, 89), (18, 112), (10, 10)])
def test_wilson_is_scipys_score_interval(count: int, total: int) -> None:
    expected = binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert statistics.wilson(count, total) == pytest.approx((expected.low, expected.high))


def test_newcombe_gives_the_published_worked_example() -> None:
    # Newcombe 1998, table II, example (a): 56/70 - 48/80 by method 10 is 0.0524 to 0.3339.
    assert statistics.newcombe(48, 80, 56, 70) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_newcombe_changes_sign_with_the_order_of_the_models() -> None:
    low, high = statistics.newcombe(2, 112, 4, 89)
    assert statistics.newcombe(4, 89, 2, 112) == pytest.approx((-high, -low))


def test_katz_is_scipys_interval_of_a_relative_risk() -> None:
    expected = contingency.relative_risk(4, 89, 2, 112)
    interval = expected.confidence_interval(0.95)
    assert statistics.ratio(2, 112, 4, 89) == pytest.approx(expected.relative_risk)
    assert statistics.katz(2, 112, 4, 89) == pytest.approx((interval.low, interval.high))


def test_ratio_and_katz_with_zeros() -> None:
    assert statistics.ratio(0, 10, 3, 10) == math.inf
    assert statistics.ratio(3, 10, 0, 10) == 0
    assert math.isnan(statistics.ratio(0, 10, 0, 10))
    low, high = statistics.katz(0, 10, 3, 10)
    assert 0 < low < 1 and high == math.inf
    low, high = statistics.katz(3, 10, 0, 10)
    assert low == 0 and 1 < high < math.inf
    assert statistics.katz(0, 10, 0, 10) == (0, math.inf)
    # Half a latent in each cell: shares 2.5/6 and 5.5/6, or all of all: 5.5/6 against 8.5/9.
    assert statistics.katz(5, 5, 8, 8)[0] < 1 < statistics.katz(5, 5, 8, 8)[1] < math.inf


def test_without_latents_nothing_is_known() -> None:
    assert statistics.wilson(0, 0) == (0, 1)
    assert statistics.newcombe(0, 0, 1, 5) == (-1, 1)
    assert statistics.katz(0, 0, 1, 5) == (0, math.inf)
    assert math.isnan(statistics.ratio(0, 0, 1, 5))


def exact_coverage(interval, share_a: float, share_b: float, truth: float, n_a: int, n_b: int) -> float:
    """Probability that the interval contains the truth, summed over every possible pair of counts."""
    weights = [
        np.array([math.comb(n, x) * p**x * (1 - p) ** (n - x) for x in range(n + 1)])
        for n, p in ((n_a, share_a), (n_b, share_b))
    ]
    covered = 0.0
    for x_a, x_b in product(range(n_a + 1), range(n_b + 1)):
        low, high = interval(x_a, n_a, x_b, n_b)
        covered += weights[0][x_a] * weights[1][x_b] * (low <= truth <= high)
    return float(covered)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5])
def test_wilson_covers_the_truth(share: float) -> None:
    covered = sum(
        math.comb(89, x) * share**x * (1 - share) ** (89 - x)
        for x in range(90)
        if statistics.wilson(x, 89).low <= share <= statistics.wilson(x, 89).high
    )
    assert 0.92 < covered < 0.98


@pytest.mark.parametrize(("share_a", "share_b"), [(0.1, 0.2), (0.05, 0.05), (0.3, 0.25)])
def test_the_intervals_of_two_shares_cover_the_truth(share_a: float, share_b: float) -> None:
    difference = exact_coverage(statistics.newcombe, share_a, share_b, share_b - share_a, 30, 25)
    ratio = exact_coverage(statistics.katz, share_a, share_b, share_b / share_a, 30, 25)
    assert 0.93 < difference <= 1
    assert 0.93 < ratio <= 1


def test_fisher_gives_the_lady_tasting_tea() -> None:
    # 3 of 4 against 1 of 4: two-sided p = 2 * (16 + 1) / 70.
    assert statistics.fisher(3, 4, 1, 4) == pytest.approx(34 / 70)


def test_fisher_reproduces_the_paper() -> None:
    # 18 of 112 against 19 of 89 latents: p = .36; 2 against 4: .41; 4 against 1: .39.
    tables = [(18, 112, 19, 89), (2, 112, 4, 89), (4, 112, 1, 89)]
    assert [round(statistics.fisher(*table), 2) for table in tables] == [0.36, 0.41, 0.39]


def test_benjamini_hochberg_by_hand() -> None:
    # p * 4 / rank = .04, .06, .0533, .5; then the running minimum from the largest p.
    assert statistics.benjamini_hochberg([0.01, 0.03, 0.04, 0.5]) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert statistics.benjamini_hochberg([]) == []


def test_holm_by_hand() -> None:
    # Sorted .005 * 4, .01 * 3, .03 * 2, .04 * 1; then the running maximum from the smallest p.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1, 1]
    assert statistics.holm([]) == []
