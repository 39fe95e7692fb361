"""The published tables from their counts, what may be claimed, and bad files of counts."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.annotate import annotate
from analysis.compare import show
from analysis.comparison import Comparison, compare, compare_counts, comparisons_of, outputs_of, table_of
from analysis.config import CompareConfig
from analysis.counts import columns_of_folders, read_counts
from analysis.taxonomy import categorise, load_taxonomy
from extract.errors import BadInput
from tests.analysis.made_study import make_study, write_latents

# arXiv 2509.18792, tables 2 and 5: latents of 112 (it), 89 (SimPO) and 109 (DPO), and the printed shares and changes.
CLASSES = {
    "Linguistic Capabilities": ((7, 8, 6), ("6.25", "8.99", "5.50"), ("+43.8", "−12")),
    "Safety & Content Moderation": ((18, 19, 16), ("16.07", "21.35", "14.68"), ("+32.8", "−9")),
    "Information Processing": ((19, 16, 16), ("16.96", "17.98", "14.68"), ("+6.0", "−13")),
    "Format & Structure Control": ((12, 10, 14), ("10.71", "11.24", "12.84"), ("+4.9", "+20")),
    "User Interaction Management": ((16, 11, 20), ("14.29", "12.36", "18.35"), ("−13.5", "+28")),
    "Specialized Capabilities": ((32, 21, 28), ("28.57", "23.60", "25.69"), ("−17.4", "−10")),
    "Error Handling & Quality Control": ((7, 4, 9), ("6.25", "4.49", "8.26"), ("−28.1", "+32")),
}
# Table 4: latents of it and SimPO, and the printed change.
CATEGORIES = {
    "Sexual Content Filtering": (5, 7, "+76.2"),
    "Template Following": (2, 4, "+151.7"),
    "Instruction Following": (2, 4, "+151.7"),
    "Multilingual Processing": (4, 5, "+57.3"),
    "Factual Verification": (2, 3, "+88.8"),
    "Model Self-Reference": (9, 4, "−44.1"),
    "Query Classification": (10, 5, "−37.1"),
    "Structured Output Generation": (8, 4, "−37.1"),
    "Hallucination Detection": (4, 1, "−68.5"),
    "Code Generation & Analysis": (7, 4, "−28.1"),
}
CONFIG = CompareConfig(resamples=2000)


def write_counts(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def class_file(folder: Path) -> Path:
    rows: list[list[object]] = [[name, *counts] for name, (counts, _, _) in CLASSES.items()]
    return write_counts(folder / "classes.csv", ["category", "it", "SimPO", "DPO"], [*rows, ["unclassified", 1, 0, 0]])


def compared(path: Path) -> list[Comparison]:
    return [one for counts in read_counts(path, load_taxonomy()) for one in compare_counts(counts, CONFIG)]


def test_the_published_class_tables_come_back_from_their_counts(tmp_path: Path) -> None:
    simpo, dpo = compared(class_file(tmp_path))
    assert (simpo.level, simpo.changes[0].total_a, simpo.changes[0].total_b) == ("class", 112, 89)
    assert (dpo.model_b, dpo.changes[0].total_b) == ("DPO", 109)
    for row in table_of(simpo).printed:
        (it, _, _), shares, changes = CLASSES[row[0]]
        assert row[1] == f"{it}/112"
        assert (row[2], row[4], row[7]) == (f"{shares[0]}\u00a0%", f"{shares[1]}\u00a0%", changes[0])
    for change in dpo.changes:
        _, shares, changes = CLASSES[change.name]
        assert f"{100 * change.share_b:.2f}" == shares[2]
        # Whole percents as printed; -13.46 and 32.1 round to them.
        assert f"{100 * change.change:+.0f}".replace("-", "−") == changes[1]
    information = next(change for change in dpo.changes if change.name == "Information Processing")
    assert round(100 * information.difference, 2) == -2.29


def test_the_published_category_table_comes_back_from_its_counts(tmp_path: Path) -> None:
    rows: list[list[object]] = [[name, it, simpo] for name, (it, simpo, _) in CATEGORIES.items()]
    named = [sum(row[side] for row in CATEGORIES.values()) for side in (0, 1)]
    rest = ["unclassified", 112 - named[0], 89 - named[1]]
    classes, categories = compared(write_counts(tmp_path / "c.csv", ["category", "it", "SimPO"], [*rows, rest]))
    assert (classes.level, categories.level) == ("class", "category")
    printed = {row[0]: row[7] for row in table_of(categories).printed}
    assert printed == {name: row[2] for name, row in CATEGORIES.items()}
    safety = next(change for change in classes.changes if change.name == "Safety & Content Moderation")
    assert (safety.count_a, safety.count_b) == (5, 7)


def test_nothing_may_be_claimed_from_the_published_counts(tmp_path: Path) -> None:
    simpo, dpo = compared(class_file(tmp_path))
    for comparison in (simpo, dpo):
        assert min(change.q for change in comparison.changes) > 0.05
        assert comparison.global_p > 0.8
        assert comparison.claim.startswith("No class differs significantly")
        assert "may not be claimed" in comparison.claim
    assert f"p = {simpo.global_p:.2f}" in simpo.claim


def test_a_true_difference_is_claimed_and_the_rest_is_not(tmp_path: Path) -> None:
    rows: list[list[object]] = [["one", 5, 60], ["two", 50, 48], ["unclassified", 145, 92]]
    (comparison,) = compared(write_counts(tmp_path / "c.csv", ["category", "a", "b"], rows))
    assert comparison.claim.startswith("May be claimed")
    assert "one more frequent in b (5 of 200 against 60 of 200" in comparison.claim
    assert "two" not in comparison.claim
    # Of 2,000 permutations of so unequal rows none is as extreme: p = 1 / 2,001.
    assert comparison.claim.endswith("at once, the 145 and 92 latents in none included: p < 0.001.")


def test_unclassified_latents_count_towards_the_totals_alone(tmp_path: Path) -> None:
    rows: list[list[object]] = [["x", 1, 1], ["unclassified", 3, 0]]
    (comparison,) = compared(write_counts(tmp_path / "c.csv", ["category", "a", "b"], rows))
    assert [change.name for change in comparison.changes] == ["x"]
    assert (comparison.changes[0].share_a, comparison.changes[0].share_b) == (0.25, 1.0)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "first line"),
        ("category,it\nx,1\n", "at least two"),
        ("category,it,it\nx,1,2\n", "different models"),
        ("category,it,dpo\nx,0.5,2\n", "'0.5' in row 'x' is not a count"),
        ("category,it,dpo\nx,-1,2\n", "'-1'"),
        ("category,it,dpo\nx,1\n", "1 counts for 2 models"),
        ("category,it,dpo\nx,1,2\nx,1,2\n", "'x' occurs twice"),
        ("category,it,dpo\nx,0,2\n", "it has no latents"),
    ],
)
def test_bad_counts_are_named(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "counts.csv"
    path.write_text(content)
    with pytest.raises(BadInput, match=problem):
        read_counts(path, load_taxonomy())


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_bytes("category,it,dpo\nübrig,1,2\n".encode("latin-1"))
    with pytest.raises(BadInput, match=r"counts\.csv\) is not UTF-8"):
        read_counts(path, load_taxonomy())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nothing\.csv"):
        read_counts(tmp_path / "nothing.csv", load_taxonomy())


def test_only_pairs_that_share_a_base_are_compared(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    settings.analysis.taxonomy.encoder = "tfidf"
    settings.analysis.compare.resamples = 200
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
    comparisons = compare(settings, folders)
    assert [(c.level, c.model_a, c.model_b) for c in comparisons] == [
        ("class", "simpo", "dpo"),
        ("category", "simpo", "dpo"),
    ]
    assert (comparisons[0].changes[0].total_a, comparisons[0].changes[0].total_b) == (3, 2)  # planted latents
    assert comparisons[0].annotator == comparisons[1].annotator == "offline (n-grams), category by TF-IDF"
    tables = tmp_path / "report" / "tables"
    for name in ("category_simpo_dpo", "class_simpo_dpo"):
        assert "Annotator: offline (n-grams), category by TF-IDF." in (tables / f"{name}.tex").read_text()
        with (tables / f"{name}.csv").open(newline="") as file:
            assert {row["annotator"] for row in csv.DictReader(file)} == {comparisons[0].annotator}
    written = sorted(path.name for path in tables.iterdir())
    assert written == ["category_simpo_dpo.csv", "category_simpo_dpo.tex", "class_simpo_dpo.csv", "class_simpo_dpo.tex"]
    assert sorted(outputs_of(folders)) == [f"tables/{name}" for name in written]
    assert comparisons_of(settings, folders[:1]) == [] and outputs_of(folders[:1]) == ()
    assert show([]).startswith("Nothing to compare")


def test_columns_are_named_after_tuned_models_and_folders_where_these_repeat(tmp_path: Path) -> None:
    def folder(name: str, models: list[str]) -> Path:
        (tmp_path / name).mkdir()
        write_latents(tmp_path / name / "latents.parquet", models, {300})
        return tmp_path / name

    both, a, again = folder("b_a_c", ["b", "a", "c"]), folder("b_a", ["b", "a"]), folder("b_d", ["b", "d"])
    assert list(columns_of_folders([both, again])) == ["a", "c", "d"]
    assert columns_of_folders([both, a]) == {"b_a_c a": (both, "a"), "b_a_c c": (both, "c"), "b_a": (a, "a")}


def test_the_command_needs_no_experiment_for_a_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "analysis.compare", f"counts={class_file(tmp_path)}", f"outputs={tmp_path / 'o'}"]
    done = subprocess.run([*command, "resamples=200"], capture_output=True, text=True, check=True)
    assert "6.25\u00a0%" in done.stdout and "may not be claimed" in done.stdout
    assert (tmp_path / "o" / "class_it_DPO.tex").is_file()
    wrong = subprocess.run([*command, "reasmples=200"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "reasmples" in wrong.stderr and "resamples" in wrong.stderr and "Traceback" not in wrong.stderr
