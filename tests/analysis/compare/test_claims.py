"""What takes a claim away: near-duplicates, votes, annotators and people on one side, and models without latents."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from analysis.compare.bootstrap import IN_NONE, Units, units_of_counts
from analysis.compare.claims import may_be_claimed
from analysis.compare.comparison_tables import changes_table, table_of
from analysis.compare.config import CompareConfig
from analysis.compare.counts import Counts
from analysis.compare.pairwise import compare_counts
from analysis.compare.selected import Side

CONFIG = CompareConfig(resamples=2000)


def made_counts(sides: tuple[Side, Side], clusters: int = 0) -> Counts:
    """40 latents of a outside x, 40 of b of which 12 in x; those 12 form `clusters` clusters if that is given."""
    a, b = units_of_counts([0], 40), units_of_counts([12], 28)
    if clusters:
        b.cluster_n[:] = np.unique(
            np.where(np.arange(40) < 12, np.arange(40) % clusters, np.arange(40)), return_inverse=True
        )[1]
    return Counts("category", ["a", "b"], {"x": [0, 12]}, [40, 40], units=(a, b), sides=sides)


def test_near_duplicates_take_a_claim_away() -> None:
    sides = (Side(40, 0, frozenset({"llm"})), Side(40, 0, frozenset({"llm"})))
    (apart,) = compare_counts(made_counts(sides), CONFIG)
    assert apart.changes[0].may_be_claimed and "clusters" not in apart.caveat
    (one,) = compare_counts(made_counts(sides, clusters=1), CONFIG)
    (change,) = one.changes
    # One cluster is in no resample with probability (28/29)^29 = .36: its share can be 0, as that of a.
    assert change.q < 0.05 and change.bootstrap_difference_low == 0 and not change.may_be_claimed
    assert "In spite of its q" in change.claim and "x too, in spite of a q below 0.05" in one.claim
    assert "40 and 29 clusters of near-duplicates, which permutations and resamples keep whole" in one.caveat
    assert change.p_clusters == pytest.approx(29 / 69, abs=0.05) and apart.changes[0].p_clusters == apart.changes[0].p
    # Left out as a whole, nothing remains of x.
    assert change.without_one_low == 0 and apart.changes[0].without_one_low == math.inf
    assert one.global_p > 0.2 > apart.global_p


def test_a_claim_needs_all_of_its_conditions() -> None:
    """Each is taken away alone from a change that may be claimed: both q, an interval without 0, equal annotators."""
    llm = Side(40, 0, frozenset({"llm"}))
    (comparison,) = compare_counts(made_counts((llm, llm)), CONFIG)
    (change,) = comparison.changes
    assert may_be_claimed(change, comparison.basis, 0.05)
    assert not may_be_claimed(replace(change, q=0.05), comparison.basis, 0.05)
    assert not may_be_claimed(replace(change, q_clusters=0.05), comparison.basis, 0.05)
    for low, high in ((-0.2, 0.1), (0.0, 0.3), (-0.3, 0.0), (math.nan, math.nan)):
        across = replace(change, bootstrap_difference_low=low, bootstrap_difference_high=high)
        assert not may_be_claimed(across, comparison.basis, 0.05)
    assert may_be_claimed(
        replace(change, bootstrap_difference_low=-0.3, bootstrap_difference_high=-0.1), comparison.basis, 0.05
    )
    for other in (frozenset({"offline"}), frozenset[str]()):
        basis = replace(comparison.basis, annotators=(frozenset({"llm"}), other))
        assert not may_be_claimed(change, basis, 0.05)


def test_votes_that_differ_take_a_claim_away() -> None:
    """12 of 40 against none by the primary votes; of each of the twelve, nine other votes say it is not in x."""
    sides = (Side(40, 0, frozenset({"llm"})),) * 2
    sure = made_counts(sides)
    votes = np.full((40, 10), IN_NONE)
    votes[:12, 0] = 0
    unsure = replace(sure, units=(sure.units[0], Units(np.arange(40), votes, np.full(40, 10))))
    (one,), (other,) = compare_counts(sure, CONFIG), compare_counts(unsure, CONFIG)
    assert one.changes[0].may_be_claimed and not other.changes[0].may_be_claimed
    # 1.2 votes for x are drawn on average, and none in (1 - 0.3 x 0.1)^40 = 30 % of the resamples.
    assert other.changes[0].bootstrap_difference_low == 0 and "or other votes" in other.changes[0].claim
    assert other.changes[0].q < 0.05 and other.changes[0].q_clusters < 0.05
    # By the second votes no latent is in x: p of the whole is 1.
    assert one.differs_as_a_whole and not other.differs_as_a_whole
    assert "p < 0.001, p = 1.00 by other votes, so that a difference as a whole may not be claimed" in other.claim


def test_without_near_duplicates_the_test_by_clusters_is_fishers() -> None:
    llm = Side(40, 0, frozenset({"llm"}))
    (comparison,) = compare_counts(made_counts((llm, llm)), CompareConfig(resamples=20))
    (change,) = comparison.changes
    # 2 C(40, 12) / C(80, 12) by hand; of 20 permutations no p is below 1/21.
    assert change.p_clusters == change.p == pytest.approx(2 * math.comb(40, 12) / math.comb(80, 12))
    assert change.may_be_claimed


def test_near_duplicates_do_not_make_claims_out_of_nothing() -> None:
    """40 clusters of three equal latents in either model, all alike: Fisher's test takes them for 120."""
    rng = np.random.default_rng(1)
    sides = (Side(120, 0, frozenset()),) * 2
    num, claimed, called = 60, 0, 0
    for seed in range(num):
        names = [np.repeat(rng.integers(0, 5, 40), 3) for _ in sides]
        units = tuple(Units(np.repeat(np.arange(40), 3), row[:, None], np.ones(120, int)) for row in names)
        by_name = {str(name): [int((row == name).sum()) for row in names] for name in range(5)}
        counts = Counts("category", ["a", "b"], by_name, [120, 120], units=units, sides=sides)
        (comparison,) = compare_counts(counts, CompareConfig(resamples=300, seed=seed))
        claimed += any(change.may_be_claimed for change in comparison.changes)
        called += any(change.q < 0.05 for change in comparison.changes)
    assert called / num > 0.3 and claimed / num <= 0.1


def test_different_annotators_take_all_claims_away() -> None:
    for *annotators, first, second in (
        ({"offline"}, {"llm"}, "offline", "llm"),
        ({"llm"}, {"llm", "people (ann)"}, "llm", "llm and people"),
        ({"people (ann)"}, {"people (bob)"}, "people", "other people"),
    ):
        sides = tuple(Side(40, 0, frozenset(one)) for one in annotators)
        (comparison,) = compare_counts(made_counts(sides), CONFIG)
        assert comparison.claim.startswith(
            f"Nothing may be claimed: the latents of a were named by {first}, those of b by {second}"
        )
        assert not comparison.changes[0].may_be_claimed and not comparison.differs_as_a_whole
        assert "different annotators" in comparison.changes[0].claim


def test_latents_that_people_put_into_categories_are_counted_for_either_side() -> None:
    both = frozenset({"llm", "people (ann)"})
    (unlike,) = compare_counts(made_counts((Side(40, 1, both), Side(40, 30, both))), CONFIG)
    said = "People put 1 (2\u00a0%) and 30 (75\u00a0%) of them into their categories: how far they judge unlike"
    assert said in unlike.caveat and unlike.changes[0].may_be_claimed


def test_a_model_without_latents_is_said_to_have_none() -> None:
    sides = (Side(4, 0, frozenset()), Side(5, 0, frozenset({"llm"})))
    units = (units_of_counts([0], 0), units_of_counts([3], 2))
    counts = Counts("category", ["a", "b"], {"x": [0, 3]}, [0, 5], units=units, sides=sides)
    (comparison,) = compare_counts(counts, CONFIG)
    nothing = (
        "Nothing can be compared: a has 0 latents of its own that are in a category (of 4 selected) and b has 5 latents"
    )
    assert comparison.claim.startswith(nothing)
    assert comparison.changes[0].claim.startswith("Nothing can be compared")
    assert table_of(comparison).printed[0][:3] == ["x", "0/0", "–"]
    assert changes_table(comparison, 5).printed == []
    counts = Counts("class", ["a", "b"], {"x": [0, 0]}, [0, 0], units=(units[0], units[0]), sides=sides)
    (neither,) = compare_counts(counts, CONFIG)
    assert neither.claim.startswith("Nothing can be compared") and neither.global_p == 1
    assert changes_table(neither, 5).printed[0][:3] == ["x", "–", "–"]
