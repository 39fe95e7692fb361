"""Permutation tests against exact p, scipy's own, their calibration, and near-duplicates that move together."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import PermutationMethod, chi2_contingency, hypergeom

from analysis.compare.bootstrap import IN_NONE, LOST, Units, units_of_counts
from analysis.compare.permutation import chance_of_change, counts_of, dealt_out, differences, homogeneity


def p_of(rows: list[list[int]], num: int = 20_000, seed: int = 0) -> float:
    """The global p of rows of counts whose last column is in no category."""
    units = [units_of_counts(row[:-1], row[-1]) for row in rows]
    return homogeneity(np.array(rows), dealt_out(units, len(rows[0]) - 1, num, seed))


def test_the_global_p_is_the_exact_conditional_one() -> None:
    # Columns (3, 1) and (1, 3): by symmetry the two-sided p is that of the lady tasting tea, 34 / 70.
    assert p_of([[3, 1, 0], [1, 3, 0]]) == pytest.approx(34 / 70, abs=0.02)


def test_the_global_p_is_scipys() -> None:
    for rows in ([[7, 18, 19, 12, 16, 32, 7, 1], [8, 19, 16, 10, 11, 21, 4, 0]], [[9, 1, 4], [2, 8, 4], [3, 3, 3]]):
        method = PermutationMethod(n_resamples=20_000, rng=np.random.default_rng(1))
        expected = chi2_contingency(np.array(rows), correction=False, method=method).pvalue
        assert p_of(rows) == pytest.approx(expected, abs=0.015)


def test_the_global_p_is_calibrated_and_reproducible() -> None:
    rng = np.random.default_rng(0)
    draws = [[[*rng.multinomial(60, [0.1] * 10).tolist(), 0] for _ in range(2)] for _ in range(200)]
    pvalues = np.array([p_of(rows, 200) for rows in draws])
    assert 0.01 <= np.mean(pvalues < 0.05) <= 0.10
    assert p_of([[9, 1, 4], [2, 8, 4]], 500, 3) == p_of([[9, 1, 4], [2, 8, 4]], 500, 3)


def test_without_anything_to_compare() -> None:
    assert p_of([[0, 5, 0], [0, 3, 0]], 100) == 1
    assert p_of([[0, 0, 0], [2, 3, 0]], 100) == 1


def test_permutations_keep_the_models_sizes_and_the_categories() -> None:
    units = [units_of_counts([2, 1], 1), units_of_counts([0, 3], 2)]
    dealt = dealt_out(units, 2, 500)
    assert (dealt.sum(2) == [4, 5]).all()
    assert (dealt.sum(1) == [2, 4, 3]).all()
    assert len(np.unique(dealt[:, 0, 0])) == 3


def test_latents_that_are_lost_are_not_dealt_out() -> None:
    """Of a all latents but two are lost, one of them in a cluster with a placed one; the models keep 2 and 4."""
    a = Units(np.array([0, 1, 1, 2, 3, 4]), np.array([[0], [1]] + [[LOST]] * 4), np.ones(6, int))
    b = Units(np.arange(5), np.array([[0], [0], [1], [IN_NONE], [LOST]]), np.ones(5, int))
    assert counts_of(a, 2).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert counts_of(b, 2).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    dealt = dealt_out([a, b], 2, 500)
    assert (dealt.sum(2) == [2, 4]).all() and (dealt.sum(1) == [3, 2, 1]).all()
    # The same where clusters are laid out: b's first two latents are one.
    dealt = dealt_out([a, Units(np.array([0, 0, 1, 2, 3]), b.votes_nV, b.num_votes_n)], 2, 500)
    assert (dealt.sum(1) == [3, 2, 1]).all() and set(dealt[:, 0].sum(1)) == {2, 3}


def test_losses_do_not_make_equal_models_differ() -> None:
    """45 of 60 latents of a are lost, none of b: p and the probability of chance stay what they promise."""
    rng = np.random.default_rng(2)
    pvalues, chances = [], []
    for seed in range(200):
        names = rng.integers(0, 5, (2, 60))
        names[0, :45] = LOST
        units = [Units(np.arange(60), row[:, None], np.ones(60, int)) for row in names]
        observed = np.array([np.bincount(row[row != LOST], minlength=6) for row in names])
        dealt = dealt_out(units, 5, 400, seed)
        pvalues.append(homogeneity(observed, dealt))
        chances.append(min(chance_of_change(observed, dealt)))
    assert np.mean(np.array(pvalues) < 0.05) <= 0.10
    # The largest rise and the largest fall are two tests.
    assert np.mean(np.array(chances) < 0.05) <= 0.15


def test_the_numbers_of_single_latents_are_dealt_out_as_the_latents_are() -> None:
    rows = [[3, 0, 2, 1], [1, 4, 0, 2], [2, 2, 2, 0]]
    units = [units_of_counts(row[:-1], row[-1]) for row in rows]
    # A cluster of two in none of the names makes latents be laid out; its model is left out of what is compared.
    pair = Units(np.array([0, 0]), np.full((2, 1), IN_NONE), np.ones(2, int))
    alone, laid_out = dealt_out(units, 3, 20_000)[..., :3], dealt_out([*units, pair], 3, 20_000)[:, :3, :3]
    for model in range(3):
        for name in range(3):
            # Hypergeometric: size, and number of that name, of all 19 latents (of 20 clusters with the pair).
            size, of_name = sum(rows[model]), sum(row[name] for row in rows)
            expected = hypergeom.pmf(np.arange(8), 19, of_name, size)
            assert np.bincount(alone[:, model, name].astype(int), minlength=8) / 20_000 == pytest.approx(
                expected, abs=0.012
            )
            expected = hypergeom.pmf(np.arange(8), 20, of_name, size)
            assert np.bincount(laid_out[:, model, name].astype(int), minlength=8) / 20_000 == pytest.approx(
                expected, abs=0.012
            )


def test_near_duplicates_are_dealt_out_together_and_make_the_test_weaker() -> None:
    # Five latents of b in category 0 are one cluster: they move as one, and are one observation.
    single = [Units(np.arange(10), np.full((10, 1), 1), np.ones(10, int))]
    names = np.array([0] * 5 + [1] * 5)[:, None]
    apart = [*single, Units(np.arange(10), names, np.ones(10, int))]
    together = [*single, Units(np.array([0] * 5 + [1, 2, 3, 4, 5]), names, np.ones(10, int))]
    observed = np.array([[0, 10, 0], [5, 5, 0]])
    assert counts_of(together[1], 2)[0].tolist() == [5, 0, 0]
    assert set(dealt_out(together, 2, 500)[:, 0, 0]) == {0, 5}
    assert homogeneity(observed, dealt_out(apart, 2, 5000)) < 0.06
    assert homogeneity(observed, dealt_out(together, 2, 5000)) > 0.3


def test_differences_of_single_names_by_enumeration() -> None:
    # 3 of 4 against 0 of 3: of the 35 deals of seven latents, three of them named, to models of four and three, the
    # shares differ by 3/4 or more where all three go to the first (4 deals, 3/4) or all to the second (1 deal, 1).
    units = [units_of_counts([3], 1), units_of_counts([0], 3)]
    p = differences(np.array([[3, 1], [0, 3]]), dealt_out(units, 1, 20_000))
    assert p == pytest.approx([5 / 35], abs=0.01)
    # Two of the three named ones as one cluster, so that six clusters are dealt three to three: 20 deals. The pair and
    # the third go together to the first (4 deals: 3 of 4 against 0 of 3), as observed, or to the second (4 deals).
    pair = [Units(np.array([0, 0, 1, 2]), np.array([0, 0, 0, -1])[:, None], np.ones(4, int)), units[1]]
    p = differences(np.array([[3, 1], [0, 3]]), dealt_out(pair, 1, 20_000))
    assert p == pytest.approx([8 / 20], abs=0.015)


def test_no_p_is_smaller_than_the_number_of_permutations_allows() -> None:
    # 30 of 30 against none of 30: none of 20 permutations is as extreme, and what was observed is one itself.
    observed, units = np.array([[30, 0], [0, 30]]), [units_of_counts([30], 0), units_of_counts([0], 30)]
    dealt = dealt_out(units, 1, 20)
    found = [*differences(observed, dealt), homogeneity(observed, dealt), *chance_of_change(observed, dealt)]
    assert found == pytest.approx([1 / 21] * 3)


def test_chance_by_enumeration() -> None:
    # Four latents of two categories (2 and 2) dealt to two models of two: the observed rise of category 0 from one to
    # one is none; from 0 to 2 it is infinite, and some category rises so in both extreme deals out of six.
    units = [units_of_counts([0, 2], 0), units_of_counts([2, 0], 0)]
    chance = chance_of_change(np.array([[0, 2, 0], [2, 0, 0]]), dealt_out(units, 2, 20_000))
    deals = list(combinations([0, 0, 1, 1], 2))
    expected = sum(len(set(deal)) == 1 for deal in deals) / len(deals)
    assert chance == pytest.approx([expected, expected], abs=0.01)
    level = chance_of_change(np.array([[1, 1, 0], [1, 1, 0]]), dealt_out(units, 2, 100))
    assert all(math.isnan(p) for p in level)


def test_under_no_difference_some_category_rises_as_much_as_the_published_one() -> None:
    # arXiv 2509.18792, table 4: it and SimPO in ten categories, of 112 and 89 latents. The headline is 2 against 4.
    it, simpo = [5, 2, 2, 4, 2, 9, 10, 8, 4, 7], [7, 4, 4, 5, 3, 4, 5, 4, 1, 4]
    rests = (112 - sum(it), 89 - sum(simpo))
    units = [units_of_counts(it, rests[0]), units_of_counts(simpo, rests[1])]
    chance = chance_of_change(np.array([[*it, rests[0]], [*simpo, rests[1]]]), dealt_out(units, 10, 20_000))
    assert 0.75 <= chance[1] <= 0.83 and chance[1] == chance[2]
    # The same by drawing labels one after another, which knows no tables.
    rng = np.random.default_rng(5)
    pool = np.repeat(np.arange(11), np.array([*it, rests[0]]) + np.array([*simpo, rests[1]]))
    rises = []
    for _ in range(4000):
        rng.shuffle(pool)
        a, b = np.bincount(pool[:112], minlength=11)[:10], np.bincount(pool[112:], minlength=11)[:10]
        rises.append(np.any(b / 89 >= (4 / 89) / (2 / 112) * (a / 112) - 1e-12, where=(a + b) > 0))
    assert chance[1] == pytest.approx(np.mean(rises), abs=0.025)
