"""From selection to category: votes, losses at each step, near-duplicates, and what people said."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.annotate.annotations import Annotation, write_annotations
from analysis.compare.bootstrap import IN_NONE, LOST
from analysis.compare.changes import Comparison
from analysis.compare.config import CompareConfig
from analysis.compare.counts import counts_of_folders
from analysis.compare.flow import FlowRow, flow_of, flow_table
from analysis.compare.pairwise import compare_counts
from analysis.compare.selected import read_selected, units_of
from analysis.human import HumanLabel, append_label
from analysis.taxonomy.categories import Placed, write_categories
from analysis.taxonomy.step import load_taxonomy
from extract.errors import BadInput
from tests.analysis.made_study import write_record

CATEGORIES = load_taxonomy()
CODE, STYLE, OTHER = "Code Generation & Analysis", "Grammar & Style Analysis", "other"
# Latent -> outcomes and categories of its votes; 10 to 17 are of the tuned model, 18 is selected but has no line.
VOTES: dict[int, list[tuple[str, str]]] = {
    10: [("placed", CODE), ("placed", STYLE), ("placed", CODE)],
    11: [("placed", CODE), ("refused", ""), ("placed", OTHER)],
    12: [("placed", OTHER)],
    13: [("not described", "")],
    14: [("truncated", ""), ("placed", STYLE)],
    15: [("not described", "")],
    16: [("placed", STYLE)],
    17: [("placed", CODE)],
    30: [("placed", CODE)],
}
DESCRIBED = {13: "refused", 15: "invalid"}
NUM = 40


def make_folder(root: Path, tuned: str = "tuned", group: bool = True) -> Path:
    """An analysis folder: latents 10 and 17 are near-duplicates, 30 is of the base, 15 to 17 uncertain by their nu."""
    folder = root / f"base_{tuned}"
    folder.mkdir(parents=True)
    owner = [tuned if 10 <= i <= 18 else "base" if i == 30 else "shared" for i in range(NUM)]
    columns = {"latent": list(range(NUM)), "owner": owner, "norm_base": [1.0] * NUM, f"norm_{tuned}": [1.0] * NUM}
    columns |= {"dedicated": [False] * NUM, f"nu_error_{tuned}_low": [0.1] * NUM}
    # Where a latent fires in too few documents, there is no interval.
    columns[f"nu_error_{tuned}_high"] = [0.3 if 15 <= i <= 17 else math.nan if i == 18 else 0.15 for i in range(NUM)]
    columns |= {f"nu_reconstruction_{tuned}_{end}": [0.2] * NUM for end in ("low", "high")}
    write_record(folder)
    groups = pa.array([10 if i == 17 else i for i in range(NUM)], pa.int32())
    pq.write_table(pa.table(columns | ({"group": groups} if group else {})), folder / "latents.parquet")
    line = Annotation(0, "", "label", "text", "high", "", "stub", 5, (), ())
    write_annotations(
        folder,
        [
            replace(line, latent=latent, owner=owner[latent], vote=vote, outcome=DESCRIBED.get(latent, "described"))
            for latent, votes in VOTES.items()
            for vote in range(len(votes))
        ],
    )
    group_of = {category.name: category.group for category in CATEGORIES} | {OTHER: OTHER, "": ""}
    rows = [
        Placed(latent, owner[latent], category, group_of[category], math.nan, "stub", vote, outcome)
        for latent, votes in VOTES.items()
        for vote, (outcome, category) in enumerate(votes)
    ]
    # The order of lines is nobody's promise.
    write_categories(folder, rows[::-1], sorted({category.group for category in CATEGORIES}))
    return folder


def said(latent: int, category: str, who: str = "ann") -> HumanLabel:
    return HumanLabel(latent, "a label", category, "", who, "2025-01-01T00:00:00+00:00")


def test_the_flow_counts_every_latent_once_at_each_step(tmp_path: Path) -> None:
    rows = [row for row in flow_of(make_folder(tmp_path), CATEGORIES) if row.model == "tuned"]
    assert {(row.stage, row.outcome): row.count for row in rows} == {
        ("selected", "selected"): 9,
        ("annotated", "described"): 6,
        ("annotated", "refused"): 1,
        ("annotated", "invalid"): 1,
        ("annotated", "missing"): 1,
        ("categorised", "placed"): 4,
        ("categorised", "other"): 1,
        ("categorised", "truncated"): 1,
    }
    kept = {"selected": "selected", "annotated": "described"}
    totals = [sum(row.count for row in rows if row.stage == stage) for stage in (*kept, "categorised")]
    passed = [sum(row.count for row in rows if (row.stage, row.outcome) == step) for step in kept.items()]
    assert totals == [9, *passed]


def test_the_table_has_a_line_for_each_model_and_a_row_for_each_outcome(tmp_path: Path) -> None:
    table = flow_table(flow_of(make_folder(tmp_path), CATEGORIES))
    assert table.columns == ["pair", "model", "stage", "outcome", "count"]
    assert ["base_tuned", "tuned", "categorised", "truncated", 1] in table.raw
    assert table.printed[0] == ["base_tuned", "base", "1", "1", "1 (100\u00a0%)", "0", "none"]
    assert table.printed[1][:6] == ["base_tuned", "tuned", "9", "6", "5 (56\u00a0%)", "1"]
    assert sorted(table.printed[1][6].split(", ")) == ["1 invalid", "1 missing", "1 refused", "1 truncated"]


def test_a_model_without_latents_flows_as_zero(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    table = pq.read_table(folder / "latents.parquet")
    pq.write_table(table.set_column(1, "owner", pa.array(["shared"] * NUM)), folder / "latents.parquet")
    assert flow_of(folder, CATEGORIES) == [
        FlowRow("base_tuned", model, "selected", "selected", 0) for model in ("base", "tuned")
    ]


def test_votes_and_near_duplicates_become_units(tmp_path: Path) -> None:
    selected = read_selected(make_folder(tmp_path), "tuned", CATEGORIES, human_labels=False)
    assert [row.latent for row in selected] == list(range(10, 19))
    assert selected[0].votes == (CODE, STYLE, CODE) and selected[0].group == selected[7].group == 10
    units = units_of(selected, {CODE: 0, STYLE: 1})
    assert units.num_clusters == 8 and units.num_votes == 3
    assert units.votes_nV[1].tolist() == [0, LOST, IN_NONE]
    assert units.votes_nV[:, 0].tolist() == [0, 0, IN_NONE, LOST, LOST, LOST, 1, 0, LOST]
    assert units.num_votes_n.tolist() == [3, 3, 1, 1, 2, 1, 1, 1, 1]
    # Two of the three latents of CODE are one cluster.
    assert units.clusters_of(0) == {(2, 2), (1, 1), (0, 1)}


def test_latents_of_earlier_versions_are_their_own_groups(tmp_path: Path) -> None:
    selected = read_selected(make_folder(tmp_path, group=False), "tuned", CATEGORIES, human_labels=False)
    assert [row.group for row in selected] == [row.latent for row in selected]


def test_lost_latents_are_in_no_total_and_other_in_the_totals_alone(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path), make_folder(tmp_path, "second")]
    classes, counts = counts_of_folders(folders, CATEGORIES)
    assert counts.totals == classes.totals == [5, 5]
    assert counts.by_name[CODE] == [3, 3] and counts.by_name[STYLE] == [1, 1]
    assert sum(row[0] for row in counts.by_name.values()) == 4
    assert classes.by_name["Specialized Capabilities"] == [3, 3]
    assert [side.num_selected for side in counts.sides] == [9, 9]
    assert classes.units[0].votes_nV[0].tolist() == [6, 1, 6]  # the classes of CODE and STYLE


def test_people_take_the_place_of_annotators_only_where_they_are_to(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path), make_folder(tmp_path, "second")]
    for label in (said(12, CODE), said(12, STYLE), said(13, CODE), said(16, ""), said(25, CODE)):
        append_label(folders[0], label)
    _, without = counts_of_folders(folders, CATEGORIES)
    assert without.totals == [5, 5] and without.sides[0].num_by_people == 0
    _, counts = counts_of_folders(folders, CATEGORIES, human_labels=True)
    # 12 from other to STYLE (the last label), 13 from lost to CODE; 16 has no category from people, 25 is nobody's.
    assert counts.totals == [6, 5]
    assert counts.by_name[CODE] == [4, 3] and counts.by_name[STYLE] == [2, 1]
    assert counts.sides[0].num_by_people == 2 and counts.annotator == "people; stub"
    assert [set(side.annotators) for side in counts.sides] == [{"people (ann)", "stub"}, {"stub"}]
    rows = [row for row in flow_of(folders[0], CATEGORIES, human_labels=True) if row.model == "tuned"]
    assert {row.outcome: row.count for row in rows if row.stage == "categorised"} == {
        "placed": 4,
        "placed by people": 2,
        "truncated": 1,
    }


def test_nothing_may_be_claimed_where_people_labelled_one_side_alone(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path), make_folder(tmp_path, "second")]
    for latent in range(10, 18):
        append_label(folders[0], said(latent, STYLE))
    for comparison in compare_folders(folders):
        assert "latents of tuned were named by people, those of second by stub" in comparison.claim
        assert not any(change.may_be_claimed for change in comparison.changes)
        assert "People put 8 (100\u00a0%) and 0 (0\u00a0%) of them into their categories: how far" in comparison.caveat
    for latent in range(10, 18):
        append_label(folders[1], said(latent, CODE, "bob"))
    assert all("named by people, those of second by other people" in one.claim for one in compare_folders(folders))
    for latent in range(10, 18):
        append_label(folders[1], said(latent, CODE))
    classes, categories = compare_folders(folders)
    # All eight placed latents of either model, in two different categories: seven clusters against seven.
    assert {change.name for change in categories.changes if change.may_be_claimed} == {CODE, STYLE}
    assert "People put 8 (100\u00a0%) and 8 (100\u00a0%) of them into their categories. " in classes.caveat


def compare_folders(folders: list[Path]) -> list[Comparison]:
    counts = counts_of_folders(folders, CATEGORIES, human_labels=True)
    return [one for level in counts for one in compare_counts(level, CompareConfig(resamples=2000))]


def test_a_category_of_people_that_does_not_exist_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    append_label(folder, said(12, "Code Generation and Analysis"))
    with pytest.raises(BadInput, match=f"latent 12 is in .* Did you mean '{CODE}'"):
        read_selected(folder, "tuned", CATEGORIES, human_labels=True)
    assert read_selected(folder, "tuned", CATEGORIES, human_labels=False)
