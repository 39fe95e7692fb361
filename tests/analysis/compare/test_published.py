"""The published tables of arXiv 2509.18792 from the counts of latents that come with the analysis."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import analysis
from analysis.compare.changes import Comparison
from analysis.compare.comparison_tables import changes_table
from analysis.compare.config import CompareConfig
from analysis.compare.counts import read_counts
from analysis.compare.pairwise import compare_counts
from analysis.tables import latex_of
from analysis.taxonomy.step import load_taxonomy

FOLDER = Path(analysis.__path__[0]) / "published"
CONFIG = CompareConfig(resamples=4000)

# Table 2: shares of it and SimPO in percent, change in percent, in the printed order.
TABLE_2 = {
    "Linguistic Capabilities": ("6.25", "8.99", "+43.8"),
    "Safety & Content Moderation": ("16.07", "21.35", "+32.8"),
    "Information Processing": ("16.96", "17.98", "+6.0"),
    "Format & Structure Control": ("10.71", "11.24", "+4.9"),
    "User Interaction Management": ("14.29", "12.36", "−13.5"),
    "Specialized Capabilities": ("28.57", "23.60", "−17.4"),
    "Error Handling & Quality Control": ("6.25", "4.49", "−28.1"),
}
# Table 5: shares of it and DPO, change in whole percent.
TABLE_5 = {
    "Linguistic Capabilities": ("6.25", "5.50", "−12"),
    "Safety & Content Moderation": ("16.07", "14.68", "−9"),
    "Information Processing": ("16.96", "14.68", "−13"),
    "Format & Structure Control": ("10.71", "12.84", "+20"),
    "User Interaction Management": ("14.29", "18.35", "+28"),
    "Specialized Capabilities": ("28.57", "25.69", "−10"),
    "Error Handling & Quality Control": ("6.25", "8.26", "+32"),
}
# Table 4: the top rises and falls of categories in the printed order.
TABLE_4 = {
    "Sexual Content Filtering": "+76.2",
    "Template Following": "+151.7",
    "Instruction Following": "+151.7",
    "Multilingual Processing": "+57.3",
    "Factual Verification": "+88.8",
    "Model Self-Reference": "−44.1",
    "Query Classification": "−37.1",
    "Structured Output Generation": "−37.1",
    "Hallucination Detection": "−68.5",
    "Code Generation & Analysis": "−28.1",
}


@pytest.fixture(scope="module")
def classes() -> tuple[Comparison, Comparison]:
    """it against SimPO, and it against DPO."""
    (counts,) = read_counts(FOLDER / "classes.csv", load_taxonomy())
    simpo, dpo = compare_counts(counts, CONFIG)
    return simpo, dpo


@pytest.fixture(scope="module")
def categories() -> Comparison:
    (counts,) = read_counts(FOLDER / "categories.csv", load_taxonomy())
    (comparison,) = compare_counts(counts, CONFIG)
    return comparison


def test_the_counts_are_of_112_89_and_109_latents(
    classes: tuple[Comparison, Comparison], categories: Comparison
) -> None:
    assert classes[0].totals == categories.totals == (112, 89) and classes[1].totals == (112, 109)
    assert classes[0].unclassified == (1, 0)
    # The ten categories of table 4 are the largest changes of 30; the others are not published.
    assert (len(categories.changes), categories.num_names) == (10, 30)


def test_table_2_comes_back_to_the_printed_digit_and_order(classes: tuple[Comparison, Comparison]) -> None:
    table = changes_table(classes[0], 5)
    assert table.heading[:5] == ["class", "it (%)", "SimPO (%)", "difference", "change (%)"]
    assert [(row[0], (row[1], row[2], row[4])) for row in table.printed] == list(TABLE_2.items())


def test_table_5_comes_back_to_the_printed_digit(classes: tuple[Comparison, Comparison]) -> None:
    rows = {row[0]: row for row in changes_table(classes[1], 5).printed}
    assert {name: (row[1], row[2]) for name, row in rows.items()} == {k: v[:2] for k, v in TABLE_5.items()}
    for change in classes[1].changes:
        assert f"{100 * change.change:+.0f}".replace("-", "−") == TABLE_5[change.name][2]
    # The paper prints a difference of -2.28 here, from rounded shares; that of 16/109 and 19/112 is -2.29.
    assert rows["Information Processing"][3] == "−2.29"


def test_table_4_comes_back_to_the_printed_digit(categories: Comparison) -> None:
    printed = [(row[0], row[4]) for row in changes_table(categories, 5).printed]
    assert dict(printed) == TABLE_4
    # By the difference of shares; two changes that are equal in every number may stand in either order.
    equal = {"Template Following": "2 to 4", "Instruction Following": "2 to 4"}
    assert [equal.get(name, name) for name, _ in printed] == [equal.get(name, name) for name in TABLE_4]


def test_beside_them_stand_counts_intervals_and_tests(classes: tuple[Comparison, Comparison]) -> None:
    table = changes_table(classes[0], 5)
    safety = table.printed[1]
    assert safety[5:8] == ["[−26, +138]", "18 : 19", "0.36"]
    assert len(table.heading) == len(safety) == 10
    latex = latex_of(table)
    assert r"Safety \& Content Moderation & 16.07 & 21.35 & +5.28 & +32.8 & [$-$26, +138] & 18 : 19 & 0.36" in latex
    assert "may not be claimed" in latex


def test_no_published_change_is_significant(classes: tuple[Comparison, Comparison], categories: Comparison) -> None:
    for comparison in (*classes, categories):
        assert min(change.p for change in comparison.changes) > 0.3
        assert not any(change.may_be_claimed for change in comparison.changes)
        assert all(change.difference_low < 0 < change.difference_high for change in comparison.changes)
        assert all(change.change_low < 0 < change.change_high for change in comparison.changes)
        assert all(
            change.bootstrap_difference_low < 0 < change.bootstrap_difference_high for change in comparison.changes
        )
        assert comparison.claim.startswith(f"No {comparison.level} differs significantly")
    p = {change.name: round(change.p, 2) for change in (*classes[0].changes, *categories.changes)}
    assert p["Safety & Content Moderation"] == 0.36
    assert (p["Instruction Following"], p["Hallucination Detection"]) == (0.41, 0.39)


def test_the_classes_are_alike_over_all(tmp_path: Path, classes: tuple[Comparison, Comparison]) -> None:
    # With the one latent of it that is in no class, p is a little larger than over the seven classes alone.
    assert classes[0].global_p == pytest.approx(0.93, abs=0.02) and classes[1].global_p > 0.9
    with (FOLDER / "classes.csv").open(encoding="utf-8", newline="") as file:
        rows = [row[:3] for row in csv.reader(file) if row[0] != "unclassified"]
    (tmp_path / "seven.csv").write_text("\n".join(f'"{a}",{b},{c}' for a, b, c in rows))
    (counts,) = read_counts(tmp_path / "seven.csv", load_taxonomy())
    assert counts.totals == [111, 89]
    assert compare_counts(counts, CONFIG)[0].global_p == pytest.approx(0.90, abs=0.02)


def test_the_headline_is_named_with_its_probability_under_no_difference(categories: Comparison) -> None:
    change = next(change for change in categories.changes if change.name == "Instruction Following")
    assert 0.75 <= change.chance <= 0.83
    said = f"(2 to 4 latents, +151.7\u00a0%) with probability {change.chance:.2f} or more, 20 categories being unknown."
    assert said in categories.claim
    assert (change.without_one_low, change.without_one_high) == pytest.approx((0.909, 3.989), abs=5e-4)
    assert round(change.undone_counts, 2) == 0.12 and change.power_of_doubling < 0.1
    assert change.claim.startswith("May not be claimed: that SimPO has more or less of it (4 of 89 against 2 of 112")
