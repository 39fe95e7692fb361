"""Agreement coefficients on published and hand-worked tables, beside slow forms; their intervals cover the truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from analysis.compare.statistics import wilson
from analysis.scoring.raters import Bootstrap, cohen, krippendorff

QUICK = Bootstrap(resamples=300)
# The reliability data of Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", example C: four observers,
# twelve units, missing values; printed alpha for nominal data: 0.743.
PUBLISHED = [
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
]


def units_of(observers: list[str]) -> list[list[str | None]]:
    rows = [[None if value == "." else value for value in row.split()] for row in observers]
    return [list(unit) for unit in zip(*rows, strict=True)]


def slow_alpha(units: list[list[str | None]]) -> float:
    """From the coincidence matrix, pair by pair."""
    coincidences: dict[tuple[str, str], float] = {}
    for unit in units:
        values = [value for value in unit if value is not None]
        for a, b in itertools.permutations(range(len(values)), 2):
            pair = values[a], values[b]
            coincidences[pair] = coincidences.get(pair, 0) + 1 / (len(values) - 1)
    totals: dict[str, float] = {}
    for (first, _), value in coincidences.items():
        totals[first] = totals.get(first, 0) + value
    n = sum(totals.values())
    observed = sum(value for (first, second), value in coincidences.items() if first != second)
    expected = sum(totals[a] * totals[b] for a, b in itertools.permutations(totals, 2)) / (n - 1)
    return 1 - observed / expected


def test_alpha_is_the_published_one() -> None:
    found = krippendorff(units_of(PUBLISHED), QUICK)
    assert round(found.value, 3) == 0.743
    assert found.num_units == 11  # one value alone says nothing about agreement
    assert found.interval.low < found.value < found.interval.high


def test_alpha_of_two_observers_by_hand() -> None:
    # Example A of the same paper, printed as 0.095: four of ten units differ, 14 zeros and 6 ones.
    first, second = "0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0"
    assert krippendorff(units_of([first, second]), QUICK).value == pytest.approx(1 - 19 * 4 / 84)


@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_that_of_the_coincidence_matrix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = ["a", "b", "c", None]
    units = [[values[i] for i in rng.choice(4, size=rng.integers(1, 6), p=[0.5, 0.2, 0.1, 0.2])] for _ in range(30)]
    assert krippendorff(units, QUICK).value == pytest.approx(slow_alpha(units))


def test_kappa_by_hand() -> None:
    # 20 both yes, 5 yes/no, 10 no/yes, 15 both no: p_o = .7, p_e = .5 * .6 + .5 * .4 = .5, kappa = .4.
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    found = cohen([*pairs, (None, "y"), ("n", None)], QUICK)
    assert (found.value, found.num_units) == (pytest.approx(0.4), 50)
    # With p_e taken as known, the standard error is sqrt(p_o (1 - p_o) / 50) / (1 - p_e) = .130.
    assert found.interval.low == pytest.approx(0.4 - 1.96 * 0.130, abs=0.05)
    assert found.interval.high == pytest.approx(0.4 + 1.96 * 0.130, abs=0.05)


def test_kappa_counts_values_that_one_rater_alone_uses() -> None:
    # p_o = 1/3, p_e = 1/3 * 2/3 (a) + 2/3 * 0 (b) + 0 * 1/3 (c) = 2/9.
    found = cohen([("a", "a"), ("b", "a"), ("b", "c")], QUICK)
    assert found.value == pytest.approx(1 - (2 / 3) / (7 / 9))


def test_raters_who_never_differ_are_not_certain_to_agree() -> None:
    pairs: list[tuple[str | None, str | None]] = [("a", "a"), ("b", "b")] * 5
    kappa, alpha = cohen(pairs, QUICK), krippendorff(pairs, QUICK)
    assert kappa.value == alpha.value == 1 and kappa.interval.high == alpha.interval.high == 1
    assert kappa.interval.low == pytest.approx(1 - (1 - wilson(10, 10).low) / 0.5)
    assert 0 < alpha.interval.low < 0.6


@pytest.mark.parametrize("pairs", [[], [("a", None)], [("a", "a")] * 9])
def test_nothing_is_said_where_chance_alone_agrees(pairs: list[tuple[str | None, str | None]]) -> None:
    for found in (cohen(pairs, QUICK), krippendorff(pairs, QUICK)):
        assert math.isnan(found.value) and math.isnan(found.interval.low) and math.isnan(found.interval.high)


def test_intervals_are_the_same_every_time_and_narrow_with_the_units() -> None:
    pairs: list[tuple[str | None, str | None]] = [("y", "y"), ("n", "y"), ("n", "n"), ("n", "n")]
    few, many = cohen(pairs * 10, QUICK), cohen(pairs * 1000, QUICK)
    assert few == cohen(pairs * 10, QUICK)
    assert many.interval.high - many.interval.low < 0.2 * (few.interval.high - few.interval.low)


@pytest.mark.parametrize("copies", [0.5, 0.8, 0.95])
def test_intervals_cover_the_truth(copies: float) -> None:
    """Two raters over three values: the second copies the first with probability `copies`, else guesses alike.

    The truth of both coefficients is then `copies`: kappa's by definition, and alpha's because both have one
    distribution of values.
    """
    rng = np.random.default_rng(3)
    covered = {"kappa": 0, "alpha": 0}
    trials = 300
    for trial in range(trials):
        first = rng.choice(3, size=100, p=[0.5, 0.3, 0.2])
        guess = rng.choice(3, size=100, p=[0.5, 0.3, 0.2])
        second = np.where(rng.random(100) < copies, first, guess)
        pairs = [(str(a), str(b)) for a, b in zip(first, second, strict=True)]
        bootstrap = Bootstrap(resamples=400, seed=trial)
        for name, found in {"kappa": cohen(pairs, bootstrap), "alpha": krippendorff(pairs, bootstrap)}.items():
            covered[name] += found.interval.low <= copies <= found.interval.high
    # Four standard errors of a binomial share of .95 over the trials.
    for count in covered.values():
        assert 0.90 <= count / trials <= 1


def test_intervals_over_clusters_cover_the_truth() -> None:
    """60 clusters of three equal units: taken for 180 units, the interval is sqrt(3) too narrow and covers 74 %."""
    rng, trials = np.random.default_rng(5), 200
    covered = {"clusters": 0, "units": 0}
    for trial in range(trials):
        first = rng.choice(3, size=60, p=[0.5, 0.3, 0.2])
        second = np.where(rng.random(60) < 0.6, first, rng.choice(3, size=60, p=[0.5, 0.3, 0.2]))
        pairs = [(str(a), str(b)) for a, b in zip(first, second, strict=True) for _ in range(3)]
        for name, clusters in {"clusters": np.repeat(range(60), 3).tolist(), "units": range(180)}.items():
            interval = cohen(pairs, Bootstrap(resamples=300, seed=trial), clusters).interval
            covered[name] += interval.low <= 0.6 <= interval.high
    assert covered["clusters"] / trials >= 0.95 - 4 * 0.0154
    assert covered["units"] / trials == pytest.approx(0.742, abs=4 * 0.031)


@pytest.mark.parametrize("size", [21, 200])
def test_a_rater_to_whom_all_units_are_alike_tells_nothing(size: int) -> None:
    """Kappa is 0 then, by its formula, and in every resample: that is no certainty."""
    pairs = [("abc"[i % 3], "other") for i in range(size)]
    found = cohen([*pairs, ("other", "other")], QUICK)
    assert found.value == pytest.approx(0) and all(map(math.isnan, found.interval)) and found.num_units == size + 1
    # Of alpha, which pools the values, the same ratings tell something.
    alpha = krippendorff([*map(list, pairs), ["other", "other"]], QUICK)
    assert alpha.interval.low < alpha.value < alpha.interval.high


def test_units_of_one_cluster_are_resampled_together() -> None:
    """Each unit ten times over: the value stays, and with clusters the interval too; without them it is narrower."""
    pairs = [("a", "a"), ("b", "b"), ("a", "b"), ("b", "b"), ("a", "a"), ("b", "a"), ("a", "a"), ("b", "b")]
    copies, clusters = pairs * 10, list(range(8)) * 10
    for measure in (cohen, krippendorff):
        single, grouped, apart = measure(pairs, QUICK), measure(copies, QUICK, clusters), measure(copies, QUICK)
        assert grouped.interval.high - grouped.interval.low > 2 * (apart.interval.high - apart.interval.low)
        assert grouped.num_units == apart.num_units == 80
        if measure is cohen:  # alpha corrects for the number of units
            assert grouped.interval == pytest.approx(single.interval)


def test_agreement_in_all_units_of_few_clusters_is_known_less_well() -> None:
    pairs = [("a", "a"), ("b", "b")] * 20
    few, many = cohen(pairs, QUICK, [0, 1] * 20), cohen(pairs, QUICK)
    assert few.value == many.value == 1
    assert few.interval.low == pytest.approx(1 - (1 - wilson(2, 2, 0.95).low) / 0.5)
    assert few.interval.low < many.interval.low
