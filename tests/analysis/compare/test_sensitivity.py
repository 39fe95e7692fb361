"""One latent left out, by hand, and label errors against their simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.compare.sensitivity import leave_one_out, undone_by_label_errors


def test_leaving_out_one_latent_by_hand() -> None:
    # 2 of 112 against 4 of 89: without one of the 2 the change is largest, without one of the 4 smallest.
    low, high = leave_one_out(2, 112, 4, 89)
    assert low == pytest.approx((3 / 88) / (2 / 112) - 1)
    assert high == pytest.approx((4 / 89) / (1 / 111) - 1)
    assert low == pytest.approx(0.909, abs=5e-4) and high == pytest.approx(3.989, abs=5e-4)


def test_the_only_latent_of_a_category_is_all_that_its_fall_rests_on() -> None:
    low, high = leave_one_out(1, 10, 2, 10)
    assert high == math.inf and low == pytest.approx((1 / 9) / (1 / 10) - 1)
    assert all(math.isnan(end) for end in leave_one_out(0, 10, 0, 10))
    assert leave_one_out(3, 3, 3, 3) == (0, 0)
    # Without the only latent of all nothing is left of an infinite rise.
    assert leave_one_out(0, 10, 1, 10) == (0, math.inf)


def test_near_duplicates_are_left_out_together() -> None:
    # Of b's 4 latents 3 are near-duplicates: without them 1 of 7 remains.
    clusters_b = {(3, 3), (1, 1), (0, 1)}
    low, _ = leave_one_out(2, 10, 4, 10, {(1, 1), (0, 1)}, clusters_b)
    assert low == pytest.approx((1 / 7) / (2 / 10) - 1)
    assert leave_one_out(2, 10, 4, 10, {(1, 1), (0, 1)}, {(1, 1), (0, 1)}) == leave_one_out(2, 10, 4, 10)


def test_ten_percent_of_wrong_labels_undo_a_true_two_against_four() -> None:
    # arXiv 2509.18792, Instruction Following: 2 of 112 latents against 4 of 89, 30 categories.
    undone = undone_by_label_errors(2, 112, 4, 89, 0.1, 30)
    assert round(undone.counts, 2) == 0.12
    rng = np.random.default_rng(0)
    size = 200_000
    a = rng.binomial(2, 0.9, size) + rng.binomial(110, 0.1 / 29, size)
    b = rng.binomial(4, 0.9, size) + rng.binomial(85, 0.1 / 29, size)
    assert undone.counts == pytest.approx(np.mean(b <= a), abs=0.004)
    assert undone.shares == pytest.approx(np.mean(b / 89 <= a / 112), abs=0.004)


def test_without_errors_nothing_is_undone() -> None:
    assert undone_by_label_errors(2, 112, 4, 89, 0.0, 30) == (0, 0)
    assert undone_by_label_errors(9, 112, 4, 89, 0.0, 30) == (0, 0)
    # As many latents, but a larger share: level counts, shares that can be undone.
    counts, shares = undone_by_label_errors(4, 112, 4, 89, 0.1, 30)
    assert math.isnan(counts) and 0 < shares < 1
    assert all(math.isnan(value) for value in undone_by_label_errors(0, 0, 1, 5, 0.1, 30))
