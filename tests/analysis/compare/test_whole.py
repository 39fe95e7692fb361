"""Whether models differ as a whole: one test a comparison, of one level, corrected for the comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.compare.changes import Comparison
from analysis.compare.config import CompareConfig
from analysis.compare.counts import Counts, classes_of, read_counts
from analysis.compare.pairwise import compare_counts
from analysis.taxonomy.step import load_taxonomy

CONFIG = CompareConfig(resamples=4000)


def compared(*in_x: int) -> list[Comparison]:
    """Of 40 latents of each model these are in x, the others in y: its p is that of Fisher's test, for equal sizes."""
    by_name = {"x": list(in_x), "y": [40 - count for count in in_x]}
    return compare_counts(Counts("category", [*"abcd"[: len(in_x)]], by_name, [40] * len(in_x)), CONFIG)


def test_a_difference_as_a_whole_may_be_claimed_below_the_level_alone() -> None:
    (below,), (above,) = compared(2, 10), compared(3, 10)
    assert 0.01 < below.global_p < 0.045 and 0.055 < above.global_p < 0.1
    assert below.differs_as_a_whole and not above.differs_as_a_whole
    assert "included: p = 0.0" in below.claim and "so that a difference as a whole may be claimed." in below.claim
    assert "so that a difference as a whole may not be claimed." in above.claim and "Holm" not in above.claim
    # The level is that of the settings.
    (strict,) = compare_counts(
        Counts("category", ["a", "b"], {"x": [2, 10], "y": [38, 30]}, [40, 40]), CompareConfig(confidence=0.99)
    )
    assert strict.global_p == pytest.approx(below.global_p, abs=0.01) and not strict.differs_as_a_whole


def test_it_is_corrected_for_the_comparisons_that_share_a_reference() -> None:
    """By Holm: the smaller p twice, then the larger, but not below."""
    b, c = compared(2, 10, 2)
    (alone,) = compared(2, 10)
    assert b.global_p == alone.global_p and alone.differs_as_a_whole
    assert b.global_p_corrected == pytest.approx(2 * b.global_p) and not b.differs_as_a_whole
    assert c.global_p == c.global_p_corrected == 1
    said = (
        f"p = {2 * b.global_p:.3f} after Holm's correction for 2 comparisons, so that a difference as a whole may not"
    )
    assert said in b.claim
    b, c = compared(2, 20, 10)
    assert b.differs_as_a_whole and c.differs_as_a_whole and c.global_p_corrected == c.global_p


def test_of_classes_p_is_a_number_where_their_categories_are_tested() -> None:
    categories = load_taxonomy()
    by_name = {category.name: [0, 0] for category in categories}
    by_name[categories[0].name], by_name[categories[-1].name] = [2, 20], [38, 20]
    counts = Counts("category", ["a", "b"], by_name, [40, 40])
    (classes,), (whole,) = (compare_counts(one, CONFIG) for one in (classes_of(counts, categories), counts))
    assert classes.global_p < 0.001 and classes.global_p_corrected is None and not classes.differs_as_a_whole
    assert "p < 0.001; whether the models differ as a whole is tested once, on the categories." in classes.claim
    assert whole.differs_as_a_whole


def test_of_a_part_of_the_categories_nothing_is_claimed(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("category,a,b\nCreative Generation,5,60\nunclassified,195,140\n")
    (counts,) = read_counts(path, load_taxonomy())
    (comparison,) = compare_counts(counts, CONFIG)
    assert comparison.global_p < 0.001 and not comparison.differs_as_a_whole
    assert (
        "Over these 1 categories and all other latents as one: p < 0.001, from which nothing may be claimed, 29 "
        "categories being unknown."
    ) in comparison.claim
    # Classes of a file have no categories that could be tested: the test is theirs.
    path.write_text("category,a,b\n" + "".join(f"{name},2,9\n" for name in {c.group for c in load_taxonomy()}))
    (counts,) = read_counts(path, load_taxonomy())
    (comparison,) = compare_counts(counts, CONFIG)
    assert comparison.level == "class" and comparison.global_p_corrected == comparison.global_p
