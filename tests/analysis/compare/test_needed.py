"""What would have been found, after the correction for all tests and by one, against tests of all possible counts."""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np
import pytest
from scipy.stats import binom, fisher_exact

from analysis.compare.changes import Comparison
from analysis.compare.config import CompareConfig
from analysis.compare.counts import Counts
from analysis.compare.pairwise import compare_counts

TOTAL_A, TOTAL_B = 40, 35
COUNTS = {"up": [10, 11], "down": [16, 8], "rare": [1, 0], "none": [0, 0], "most": [25, 26]}


@cache
def pvalues() -> np.ndarray:
    """(a, b) p of Fisher's test for every two counts."""
    tables = [[a, TOTAL_A - a, b, TOTAL_B - b] for a in range(TOTAL_A + 1) for b in range(TOTAL_B + 1)]
    flat = [fisher_exact(np.reshape(table, (2, 2))).pvalue for table in tables]
    return np.reshape(flat, (TOTAL_A + 1, TOTAL_B + 1))


def found(share_a: float, change: float, alpha: float) -> float:
    """Probability that Fisher's test finds p < alpha, over all counts that the two models can have."""
    a = binom.pmf(np.arange(TOTAL_A + 1), TOTAL_A, share_a)
    b = binom.pmf(np.arange(TOTAL_B + 1), TOTAL_B, share_a * (1 + change))
    return float(a @ (pvalues() < alpha) @ b)


def compared(names: list[str], config: CompareConfig) -> Comparison:
    by_name = {name: COUNTS[name] for name in names}
    (comparison,) = compare_counts(Counts("category", ["a", "b"], by_name, [TOTAL_A, TOTAL_B]), config)
    return comparison


def test_what_is_said_of_a_rise_is_found_with_that_power_after_the_correction_and_by_one_test() -> None:
    up, *_ = compared(["up", "rare", "none"], CompareConfig(resamples=50)).changes
    said = r"Found with 80.% probability, corrected for 3 tests, would be (.*) \(in one uncorrected test: (.*)\)\.$"
    texts = re.search(said, up.claim)
    assert texts
    for text, alpha in zip(texts.groups(), (0.05 / 3, 0.05), strict=True):
        numbers = re.fullmatch(r"a true rise of (\d+).% or more; a doubling, with (\d+).%", text)
        assert numbers
        rise, doubling = (int(number) / 100 for number in numbers.groups())
        assert found(10 / 40, rise - 0.01, alpha) < 0.8 < found(10 / 40, rise + 0.01, alpha)
        assert doubling == pytest.approx(found(10 / 40, 1.0, alpha), abs=0.0051)


def test_a_fall_is_said_where_the_change_is_one() -> None:
    down, rare, none = compared(["down", "rare", "none"], CompareConfig(resamples=50)).changes
    numbers = re.search(r"3 tests, would be a true fall of (\d+).% .*: a true fall of (\d+).% or more\)", down.claim)
    assert numbers
    for number, alpha in zip(numbers.groups(), (0.05 / 3, 0.05), strict=True):
        fall = int(number) / 100
        assert found(16 / 40, -fall + 0.01, alpha) < 0.8 < found(16 / 40, -fall - 0.01, alpha)
    assert "would be no true fall, not even to none (in one uncorrected test: no true fall, not" in rare.claim
    assert found(1 / 40, -1.0, 0.05) < 0.8
    assert none.claim.startswith("Nothing may be claimed: no latent of either model")


def test_the_level_and_the_power_are_those_of_the_settings() -> None:
    (change,) = compared(["up"], CompareConfig(resamples=50, confidence=0.99, power=0.7)).changes
    for size in (change.detectable_rise, change.one_test_rise):
        assert found(10 / 40, size, 0.01) == pytest.approx(0.7, abs=0.005)
    assert change.power_of_doubling == change.one_test_doubling == pytest.approx(found(10 / 40, 1.0, 0.01))
    assert "Found with 70\u00a0% probability, corrected for 1 test, would be" in change.claim


def test_the_correction_is_for_the_names_of_all_comparisons() -> None:
    by_name = {"up": [10, 11, 11], "rare": [1, 0, 0]}
    counts = Counts("category", ["a", "b", "c"], by_name, [TOTAL_A, TOTAL_B, TOTAL_B], num_tests=5)
    first, second = compare_counts(counts, CompareConfig(resamples=50))
    # 5 names in 2 comparisons.
    assert "corrected for 10 tests" in first.changes[0].claim and first.num_tests == 10
    for comparison in (first, second):
        assert found(10 / 40, comparison.changes[0].detectable_rise, 0.005) == pytest.approx(0.8, abs=0.005)
        assert found(5.5 / 40, comparison.average.corrected.rise, 0.005) == pytest.approx(0.8, abs=0.005)


def test_of_an_average_share_it_is_said_once() -> None:
    # 10 and 1 of 40: 13.75 % on average; "none", which neither model has, is no share.
    comparison = compared(["up", "rare", "none"], CompareConfig(resamples=50))
    average, level = comparison.average, 0.05 / 3
    assert average.share == 0.1375
    assert found(0.1375, average.corrected.rise, level) == pytest.approx(0.8, abs=0.005)
    assert found(0.1375, average.one_test.rise, 0.05) == pytest.approx(0.8, abs=0.005)
    corrected, one_test = (f"{100 * found(0.1375, 1.0, alpha):.0f}\u00a0%" for alpha in (level, 0.05))
    factor = f"{1 + average.corrected.rise:.1f}"
    assert comparison.claim.endswith(
        f" At these sizes, corrected for 3 tests, an average share (13.8\u00a0%) would have to grow by a factor of "
        f"{factor} to be found with 80\u00a0% probability; a doubling would be found with {corrected} (in one "
        f"uncorrected test, with {one_test})."
    )


def test_a_share_above_half_cannot_double_and_probabilities_are_not_said_to_be_0_or_1() -> None:
    (most,) = compared(["most"], CompareConfig(resamples=50)).changes
    assert math.isnan(most.power_of_doubling) and "doubling" not in most.claim
    by_name = {"rare": [2, 3], "common": [900, 905]}
    counts = Counts("category", ["a", "b"], by_name, [3000, 3000], num_tests=30)
    (comparison,) = compare_counts(counts, CompareConfig(resamples=50))
    rare, common = comparison.changes
    assert "a doubling, with less than 1\u00a0% (in" in rare.claim
    assert "a doubling, with more than 99\u00a0% (in" in common.claim
