"""The files of comparisons: a name for each, and every number of a claim in one of them."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from analysis.compare.bootstrap import units_of_counts
from analysis.compare.command import compare_file
from analysis.compare.comparison_tables import name_of
from analysis.compare.config import CompareConfig
from analysis.compare.counts import Counts
from analysis.compare.pairwise import compare_counts
from analysis.compare.selected import Side
from analysis.compare.summary import comparisons_table


@pytest.mark.parametrize(
    "models", [["a b", "a_b", "c"], ["it", "dpo_simpo", "it_dpo", "simpo"], ["a_x", "b--c", "a_x--b", "c"]]
)
def test_every_comparison_has_files_of_its_own(tmp_path: Path, models: list[str]) -> None:
    path = tmp_path / "c.csv"
    counts = [str(number) for number in range(1, len(models) + 1)]
    path.write_text("".join(f"{','.join(row)}\n" for row in (["category", *models], ["x", *counts], ["y", *counts])))
    compare_file([f"counts={path}", f"outputs={tmp_path / 'o'}", "every_pair=true", "resamples=50"])
    written = list((tmp_path / "o").glob("category_*.csv"))
    found = set()
    for table in written:
        with table.open(newline="") as file:
            row = next(csv.DictReader(file))
        found.add((row["count_a"], row["count_b"]))
    assert found == set(combinations(counts, 2)) and len(written) == len(found)


def test_names_of_files_are_readable() -> None:
    assert name_of("class", "it", "gemma-2.5") == "class_it_gemma-2.5"
    assert name_of("class", "gemma_it", "dpo") == "class_gemma_it--dpo"
    assert name_of("class", "it@block10", "dpo").startswith("class_it_block10--dpo_")
    assert name_of("class", "it@block10", "dpo") != name_of("class", "it_block10", "dpo")


def test_the_numbers_of_a_claim_are_in_the_table_of_all_comparisons() -> None:
    units = (units_of_counts([0], 30), units_of_counts([24], 16))
    sides = (Side(34, 0, frozenset({"llm"})), Side(41, 0, frozenset({"llm"})))
    counts = Counts("category", ["a", "b"], {"x": [0, 24]}, [30, 40], units=units, sides=sides, num_tests=1)
    few = (units_of_counts([0], 5), units_of_counts([2], 3))
    alone = replace(counts, by_name={"x": [0, 2]}, totals=[5, 5], units=few)
    config = CompareConfig(resamples=100, seed=3, confidence=0.9, power=0.7)
    (comparison,) = compare_counts(replace(counts, certain=alone, without_interval=(1, 2)), config)
    table = comparisons_table([comparison])
    whole, certain = (dict(zip(table.columns, row, strict=True)) for row in table.raw)
    assert (whole["level"], whole["model_a"], whole["model_b"], whole["latents"]) == ("category", "a", "b", "selected")
    assert [whole[f"{name}_{side}"] for name in ("total", "in_none", "selected", "clusters") for side in "ab"] == [
        *(30, 40, 30, 16, 34, 41, 30, 40),
    ]
    assert (whole["without_interval_a"], whole["without_interval_b"], whole["annotators_b"]) == (1, 2, "llm")
    assert (certain["latents"], certain["total_a"], certain["without_interval_a"]) == ("certain", 5, None)
    # None of 100 permutations is as extreme.
    assert whole["global_p"] == whole["global_p_corrected"] == pytest.approx(1 / 101)
    assert (whole["num_claimed"], certain["num_claimed"]) == (1, 0)
    assert [whole[name] for name in ("confidence", "power", "resamples", "seed")] == [0.9, 0.7, 100, 3]
    assert whole["claim"] == comparison.claim and whole["caveat"] == comparison.caveat
    assert table.printed[0][:8] == ["category", "a", "b", "selected", "30", "40", "0.010", "0.010"]
    assert len(table.heading) == len(table.printed[0])


def test_a_category_that_one_model_lacks_has_no_probability_of_chance(tmp_path: Path) -> None:
    """Any rare category can vanish from one model, so that such a change is no sign of anything."""
    by_name = {"new": [0, 3], "gone": [3, 0], "both": [10, 12]}
    (comparison,) = compare_counts(Counts("category", ["a", "b"], by_name, [40, 40]), CompareConfig(resamples=50))
    assert [change.chance == change.chance for change in comparison.changes] == [False, False, True]
