"""Power by enumeration against scipy's test, the simulation of it, and the changes that it finds."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import binom, fisher_exact

from analysis.compare.power import accepted, detectable_fall, detectable_rise, power


@pytest.mark.parametrize(("total_a", "total_b", "together"), [(5, 7, 4), (112, 89, 6), (30, 20, 25), (12, 12, 12)])
def test_accepted_counts_are_those_that_scipy_does_not_reject(total_a: int, total_b: int, together: int) -> None:
    low, high = accepted(total_a, total_b, together, 0.05)
    for count in range(max(0, together - total_b), min(total_a, together) + 1):
        table = [[count, total_a - count], [together - count, total_b - together + count]]
        assert (fisher_exact(table).pvalue >= 0.05) == (low <= count <= high)


def test_power_is_the_sum_over_all_pairs_of_counts() -> None:
    share_a, share_b, total_a, total_b = 0.2, 0.7, 12, 9
    expected = sum(
        binom.pmf(a, total_a, share_a) * binom.pmf(b, total_b, share_b)
        for a, b in product(range(total_a + 1), range(total_b + 1))
        if fisher_exact([[a, total_a - a], [b, total_b - b]]).pvalue < 0.05
    )
    assert power(share_a, share_b, total_a, total_b) == pytest.approx(expected, abs=1e-8)


def test_a_true_doubling_at_the_published_sizes() -> None:
    # arXiv 2509.18792: 112 latents of it, 89 of SimPO, 109 of DPO; a share of 4.5 % is that of Instruction Following.
    assert power(0.045, 0.09, 112, 109) == pytest.approx(0.24, abs=0.005)
    assert power(0.045, 0.09, 112, 89) == pytest.approx(0.21, abs=0.005)
    assert power(0.045, 0.09, 1000, 1000) == pytest.approx(0.98, abs=0.005)
    rng = np.random.default_rng(0)
    drawn = zip(rng.binomial(112, 0.045, 2000), rng.binomial(109, 0.09, 2000), strict=True)
    found = np.mean([fisher_exact([[a, 112 - a], [b, 109 - b]]).pvalue < 0.05 for a, b in drawn])
    assert found == pytest.approx(power(0.045, 0.09, 112, 109), abs=0.03)


def test_the_test_keeps_its_level() -> None:
    assert power(0.1, 0.1, 112, 89) < 0.05
    assert power(0.3, 0.3, 112, 89, alpha=0.01) < 0.01


def test_detectable_changes_are_found_with_their_power() -> None:
    rise, fall = detectable_rise(0.1, 400, 350), detectable_fall(0.1, 400, 350)
    assert rise > 0 > fall > -1
    assert power(0.1, 0.1 * (1 + rise), 400, 350) == pytest.approx(0.8, abs=0.005)
    assert power(0.1, 0.1 * (1 + fall), 400, 350) == pytest.approx(0.8, abs=0.005)
    assert detectable_rise(0.1, 400, 350, 0.9) > rise
    assert detectable_rise(0.1, 400, 350, 0.8, 0.01) > rise


def test_what_cannot_be_found() -> None:
    assert detectable_rise(0.0, 112, 89) == math.inf
    assert detectable_rise(0.9, 5, 5) == math.inf
    # Even without one latent in b, 2 of 112 are no sign.
    assert math.isnan(detectable_fall(2 / 112, 112, 89))
