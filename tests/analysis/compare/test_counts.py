"""Counts of latents by category: what a file of them is taken for, bad files, and the columns of folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.compare.counts import columns_of_folders, read_counts
from analysis.taxonomy.step import load_taxonomy
from extract.errors import BadInput
from tests.analysis.made_study import write_latents


def test_classes_come_from_files_of_all_categories_alone(tmp_path: Path) -> None:
    lines = [f'"{category.name}",1,2' for category in load_taxonomy()]
    path = tmp_path / "counts.csv"
    path.write_text("\n".join(["category,a,b", *lines]))
    classes, categories = read_counts(path, load_taxonomy())
    assert (classes.level, categories.level) == ("class", "category")
    assert classes.by_name["Safety & Content Moderation"] == [6, 12]
    path.write_text("\n".join(["category,a,b", *lines[1:]]))
    (alone,) = read_counts(path, load_taxonomy())
    assert alone.level == "category" and alone.num_tests == 30


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "first line"),
        ("category,it\nx,1\n", "at least two"),
        ("Safety & Content Moderation,18,19\nLinguistic Capabilities,7,8\n", "the first line is 'Safety & Content"),
        ("category,18,19\nx,7,8\n", "by names that are no numbers"),
        ("category,it,0.5\nx,7,8\n", "by names that are no numbers"),
        (",it,dpo\nx,7,8\n", "first line is ',it,dpo'"),
        ("category,it,dpo,\nx,7,8,9\n", "at least two different models"),
        ("category,it,dpo\n,3,4\nx,1,2\n", "line 2 names no category"),
        ("category,it,dpo\n\n\nx,1,2\nx,3,4\n", "line 5: 'x' occurs twice"),
        (f"category,it,dpo\n{'x' * 200_000},1,2\n", "line 2, is no CSV: field larger"),
        ("category,it,dpo\nx,1000000000000,2\n", "line 2: 1000000000000 latents in row 'x' are more than 100000"),
        (f"category,it,dpo\nx,{'9' * 5000},2\n", "are more than 100000"),
        ("category,it,dpo\nx,60000,2\ny,60000,2\n", "it has 120000 latents, more than 100000"),
        (
            "category,it,dpo\nSaftey & Content Moderation,1,2\nLinguistic Capabilities,3,4\n",
            "'Saftey & Content Moderation' is not in the taxonomy, which has 'Linguistic Capabilities'. "
            "Did you mean 'Safety & Content Moderation'",
        ),
        (
            "category,it,dpo\nCode Generation & Analysis,1,2\nLinguistic Capabilities,3,4\n",
            "'Linguistic Capabilities' is a class and 'Code Generation & Analysis' a category",
        ),
        ("category,it,it\nx,1,2\n", "different models"),
        ("Category;it;dpo\nx;0,5;2\n", "line 2: '0,5' in row 'x' is not a count"),
        ("category,it,dpo\nx,0.5,2\n", "'0.5' in row 'x' is not a count"),
        ("category,it,dpo\nx,-1,2\n", "'-1'"),
        ("category,it,dpo\nx,1\n", "1 counts for 2 models"),
        ("category,it,dpo\nx,1,2\nx,1,2\n", "'x' occurs twice"),
        ("category,it,dpo\nx,0,2\n", "it has no latents"),
        ("category,it,dpo\nunclassified,3,4\n", "no row names a category"),
        ("category,it,dpo\n", "no row names a category"),
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


def test_spreadsheets_semicolons_are_read(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_bytes(b"\xef\xbb\xbfCategory;it;dpo\r\n x ;1;2\r\n;;\r\n")
    (counts,) = read_counts(path, load_taxonomy())
    assert (counts.models, counts.by_name, counts.totals) == (["it", "dpo"], {"x": [1, 2]}, [1, 2])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nothing\.csv"):
        read_counts(tmp_path / "nothing.csv", load_taxonomy())


def test_columns_are_named_after_tuned_models_and_folders_where_these_repeat(tmp_path: Path) -> None:
    def folder(name: str, models: list[str]) -> Path:
        (tmp_path / name).mkdir()
        write_latents(tmp_path / name / "latents.parquet", models, {300})
        return tmp_path / name

    both, a, again = folder("b_a_c", ["b", "a", "c"]), folder("b_a", ["b", "a"]), folder("b_d", ["b", "d"])
    assert list(columns_of_folders([both, again])) == ["a", "c", "d"]
    assert columns_of_folders([both, a]) == {"b_a_c a": (both, "a"), "b_a_c c": (both, "c"), "b_a": (a, "a")}
