"""Rows of agreement for repeats, a second model and several people; latents without a category are missing values."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.config import AnalysisSettings
from analysis.scoring.agreeing import write_agreement
from analysis.scoring.raters import Bootstrap
from analysis.scoring.votes import Vote, agreement_of, primary, read_votes
from analysis.taxonomy.categories import PLACED, Placed, write_categories
from analysis.taxonomy.step import load_taxonomy

GROUPS = {"a": "x", "b": "x", "c": "y", "other": "other"}
QUICK = Bootstrap(resamples=200)


def votes_of(annotator: str, repeat: int, categories: str) -> list[Vote]:
    """One vote per letter; a dot is a latent without a category."""
    given = [None if letter == "." else letter for letter in categories]
    return [Vote(("pair", latent), annotator, repeat, category) for latent, category in enumerate(given)]


def test_one_annotator_and_one_repeat_agree_with_nobody() -> None:
    assert agreement_of(votes_of("m", 0, "abc"), {}, GROUPS, QUICK) == []


def test_repeats_models_and_people_each_have_their_rows() -> None:
    votes = [*votes_of("m", 0, "abcab"), *votes_of("m", 1, "abcaa"), *votes_of("n", 0, "bacab")]
    person = {"anna": {("pair", latent): category for latent, category in enumerate("abc")}}
    rows = agreement_of(votes, person, GROUPS, QUICK)
    found = {(row.measure, row.between, row.level): row for row in rows}
    assert set(found) == {
        (measure, between, level)
        for measure, between in [
            ("krippendorff_alpha", "repeats"),
            ("cohen_kappa", "m and n"),
            ("cohen_kappa", "annotator and people"),
        ]
        for level in ("category", "class")
    }
    # a a, b b, c c, a a, b a: o_ab = o_ba = 1, n = 10 (a 5, b 3, c 2): 1 - 9 * 2 / (100 - 25 - 9 - 4).
    assert found["krippendorff_alpha", "repeats", "category"].value == pytest.approx(1 - 9 * 2 / 62)
    # The classes of all five are the same, x or y.
    assert found["krippendorff_alpha", "repeats", "class"].value == 1
    # abcab against bacab: 3 of 5 agree; by chance (2 * 2 + 2 * 2 + 1 * 1) / 25.
    assert found["cohen_kappa", "m and n", "category"].value == pytest.approx(1 - (2 / 5) / (16 / 25))
    assert found["cohen_kappa", "annotator and people", "category"].num_latents == 3


def test_latents_of_a_group_are_one_cluster() -> None:
    votes = [*votes_of("m", 0, "abcabc" * 5), *votes_of("m", 1, "abcaba" * 5)]
    apart = agreement_of(votes, {}, GROUPS, QUICK)[0]
    grouped = agreement_of(votes, {}, GROUPS, QUICK, lambda key: (key[0], key[1] % 6))[0]
    assert apart.value == grouped.value and apart.num_latents == grouped.num_latents == 30
    assert grouped.high - grouped.low > 1.5 * (apart.high - apart.low)


def test_agreement_takes_groups_from_the_latents_of_the_folder(tmp_path: Path) -> None:
    """40 latents in 8 groups of five, which two repeats place alike or not together: sqrt(5) times as wide."""
    settings = AnalysisSettings(outputs=str(tmp_path))
    settings.analysis.agreement.resamples = 400
    names = [category.name for category in load_taxonomy()]
    placed = [
        Placed(
            latent, "m", names[latent % 3 + (repeat if latent % 8 < 3 else 0)], "c", 1.0, "m", repeat, PLACED, repeat
        )
        for latent in range(40)
        for repeat in range(2)
    ]
    write_categories(tmp_path, placed, ["c"])
    widths = []
    for group in (list(range(40)), [latent % 8 for latent in range(40)]):
        pq.write_table(pa.table({"latent": list(range(40)), "group": group}), tmp_path / "latents.parquet")
        row = write_agreement(settings, [tmp_path], tmp_path)[0]
        widths.append(row.high - row.low)
    assert row.level == "category" and widths[1] > 1.7 * widths[0] > 0


def test_latents_without_a_category_do_not_count() -> None:
    votes = [*votes_of("m", 0, "ab.c"), *votes_of("m", 1, "a.cc")]
    row = agreement_of(votes, {}, GROUPS, QUICK)[0]
    assert row.num_latents == 2 and row.value == 1
    assert 0 <= row.low < 1


def test_several_people_are_compared_with_each_other_too() -> None:
    people = {who: {("pair", i): c for i, c in enumerate(said)} for who, said in {"p": "ab", "q": "aa"}.items()}
    rows = agreement_of(votes_of("m", 0, "ab"), people, GROUPS, QUICK)
    between = [(row.measure, row.between) for row in rows if row.level == "category"]
    kappas = [("cohen_kappa", f"annotator and people: {who}") for who in "pq"]
    expected = [*kappas, ("krippendorff_alpha", "people")]
    assert between == expected
    # All are of class x there: chance alone agrees.
    assert all(math.isnan(row.value) for row in rows if row.level == "class")


def test_primary_votes_are_the_first_annotators_first(tmp_path: Path) -> None:
    header = "latent,owner,vote,outcome,category,class,similarity,annotator,repeat,reason"
    lines = ["3,o,0,placed,a,x,,m,0,", "3,o,1,placed,b,x,,m,1,", "3,o,2,placed,c,y,,n,0,", "4,o,0,refused,,,,m,0,"]
    (tmp_path / "categories.csv").write_text("\n".join([header, *lines]) + "\n")
    votes = read_votes(tmp_path)
    assert [(vote.latent[1], vote.category) for vote in primary(votes)] == [(3, "a"), (4, None)]
    earlier = 'latent,owner,category,class,similarity,annotator\n3,o,a,x,0.5,"m, category by e"\n'  # without votes
    (tmp_path / "categories.csv").write_text(earlier)
    assert [(vote.annotator, vote.repeat) for vote in read_votes(tmp_path)] == [("m", 0)]
