"""The comparison on certain latents alone: which they are, what they are counted as, and what a claim rests on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from analysis.compare.bootstrap import units_of_counts
from analysis.compare.changes import Comparison
from analysis.compare.claims import are_alike, holds_of_certain
from analysis.compare.command import CERTAIN_ALONE, show
from analysis.compare.comparison_tables import certain_table
from analysis.compare.config import CompareConfig
from analysis.compare.counts import Counts, counts_of_folders
from analysis.compare.pairwise import compare_counts
from analysis.compare.selected import Side
from analysis.human import append_label
from analysis.steps import steps_of_study
from analysis.taxonomy.step import load_taxonomy
from tests.analysis.compare.test_flow import CODE, STYLE, make_folder, said
from tests.analysis.made_study import make_study, write_record

CONFIG = CompareConfig(resamples=2000)


def made_counts(x: tuple[int, int], totals: tuple[int, int], certain: Counts | None = None) -> Counts:
    """Latents of a and b in x, the others in none; 3 and 4 of them have no interval."""
    rest = [total - count for count, total in zip(x, totals, strict=True)]
    units = tuple(units_of_counts([count], none) for count, none in zip(x, rest, strict=True))
    sides = tuple(Side(total, 0, frozenset({"llm"})) for total in totals)
    counts = Counts("category", ["a", "b"], {"x": list(x)}, list(totals), units=units, sides=sides)
    return replace(counts, certain=certain, without_interval=(3, 4))


def compared(certain: Counts | None) -> Comparison:
    """12 of 40 against 0 of 40 latents, which may be claimed, beside those of the certain ones."""
    (comparison,) = compare_counts(made_counts((0, 12), (40, 40), certain), CONFIG)
    assert comparison.changes[0].may_be_claimed and comparison.global_p < 0.05
    return comparison


def test_a_claim_that_the_certain_latents_bear_out_is_said_to_hold_for_them() -> None:
    comparison = compared(made_counts((0, 11), (30, 30)))
    (change,) = comparison.changes
    assert holds_of_certain(change, comparison)
    # C(30, 11) / C(60, 11) on either side.
    assert change.claim.endswith("of the certain latents alone too (11 of 30 against 0 of 30, q < 0.001).")
    assert "q < 0.001, of certain latents too)" in comparison.claim
    assert "as a whole may be claimed, of the certain latents alone too (p < 0.001)." in comparison.claim
    assert "are 30 of 40 and 30 of 40 selected latents; 3 and 4 have no interval and count as not" in comparison.caveat


@pytest.mark.parametrize(
    ("x", "totals"),
    [
        ((0, 2), (30, 10)),  # too few of b to tell
        ((12, 0), (40, 40)),  # as clear as before, but the other way round
        ((0, 0), (0, 0)),  # none at all
    ],
)
def test_a_claim_that_they_do_not_bear_out_depends_on_uncertain_ones(
    x: tuple[int, int], totals: tuple[int, int]
) -> None:
    comparison = compared(made_counts(x, totals))
    (change,) = comparison.changes
    numbers = f"{x[1]} of {totals[1]} against {x[0]} of {totals[0]}, q"
    assert not holds_of_certain(change, comparison)
    assert f"It depends on uncertain latents: of the certain ones alone ({numbers}" in change.claim
    assert "q < 0.001, depending on uncertain latents)" in comparison.claim


def test_a_difference_as_a_whole_depends_on_uncertain_latents_too() -> None:
    comparison = compared(made_counts((0, 2), (30, 10)))
    # Both are b's in C(10, 2) = 45 of C(40, 2) = 780 deals, the only ones as far from the expected half a latent.
    assert "as a whole may be claimed, but depends on uncertain latents (of the certain ones alone p = 0.0" in (
        comparison.claim
    )


def test_from_counts_alone_nothing_is_said_of_certain_latents() -> None:
    comparison = compared(None)
    said = " ".join([comparison.claim, comparison.caveat, comparison.changes[0].claim, show([comparison], [])])
    assert comparison.certain is None and "certain" not in said


def test_the_table_has_their_counts_and_whether_a_claim_holds() -> None:
    comparison = compared(made_counts((1, 2), (10, 4)))
    table = certain_table(comparison)
    row = dict(zip(table.columns, table.raw[0], strict=True))
    assert (row["count_a"], row["total_a"], row["count_b"], row["total_b"]) == (1, 10, 2, 4)
    assert (row["claimed_of_all"], row["holds_of_certain"]) == (True, False)
    # 2 of 4 against 1 of 10: 40 points more.
    assert table.name == "certain_category_a_b" and table.printed[0][:4] == ["x", "1/10", "2/4", "+40.00"]
    assert table.printed[0][-1] == "no"
    assert f"{CERTAIN_ALONE}\ncategory" in show([comparison], [])
    assert certain_table(compared(made_counts((0, 11), (30, 30)))).printed[0][-1] == "yes"
    (nothing,) = compare_counts(made_counts((9, 9), (40, 40), made_counts((0, 11), (30, 30))), CONFIG)
    assert certain_table(nothing).printed[0][-1] == "–" and "uncertain" not in nothing.claim


def test_certain_latents_are_counted_by_their_intervals(tmp_path: Path) -> None:
    """10 to 14 are certain: two of CODE, one of other, two lost; 15 to 17 cross a threshold, 18 has no interval."""
    folders = [make_folder(tmp_path), make_folder(tmp_path, "second")]
    for counts in counts_of_folders(folders, load_taxonomy()):
        assert counts.certain is not None and counts.certain.level == counts.level
        assert counts.totals == [5, 5] and counts.certain.totals == [3, 3]
        assert [side.num_selected for side in counts.certain.sides] == [5, 5]
        assert counts.without_interval == (1, 1)
    assert (counts.by_name[CODE], counts.by_name[STYLE]) == ([3, 3], [1, 1])
    assert (counts.certain.by_name[CODE], counts.certain.by_name[STYLE]) == ([2, 2], [0, 0])
    write_record(folders[1], max_nu_error=0.05)  # each folder by its own thresholds
    (_, strict) = counts_of_folders(folders, load_taxonomy())
    assert strict.certain is not None and strict.certain.totals == [3, 0] and strict.totals == [5, 5]


def test_certain_latents_were_named_as_all_were_though_people_said_something_of_uncertain_ones(tmp_path: Path) -> None:
    """Ann judged latents of both: a certain one of the first, and 16, which is uncertain, of the second."""
    folders = [make_folder(tmp_path), make_folder(tmp_path, "second")]
    for folder, latent in zip(folders, (10, 16), strict=True):
        append_label(folder, said(latent, STYLE))
    for counts in counts_of_folders(folders, load_taxonomy(), human_labels=True):
        assert counts.certain is not None
        assert [side.num_by_people for side in counts.certain.sides] == [1, 0]
        assert [side.annotators for side in counts.certain.sides] == 2 * [frozenset({"stub", "people (ann)"})]
        ((whole,), (certain,)) = (compare_counts(some, CONFIG) for some in (counts, counts.certain))
        assert are_alike(whole.basis) and are_alike(certain.basis) and "were named by" not in certain.claim


def test_other_thresholds_have_the_comparison_made_again(tmp_path: Path) -> None:
    """They may leave every owner as it is, and with it the file of latents, but not what is certain."""
    settings, folders = make_study(tmp_path)
    said_there = [step for step in steps_of_study(settings, folders) if step.name in ("compare", "report")]
    assert [step.inputs["base_dpo/latents.json"] for step in said_there] == 2 * [folders[1] / "latents.json"]
