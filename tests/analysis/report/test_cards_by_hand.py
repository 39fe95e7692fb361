"""Which category a card has where a person gave one, and in which order cards stand."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.annotate.step import annotate, read_annotations
from analysis.examples.database import reading
from analysis.human import HumanLabel, append_label
from analysis.report import cards
from analysis.report.step import report
from analysis.taxonomy.step import categorise, load_taxonomy
from tests.analysis.made_study import make_study, write_record
from tests.analysis.pages import Page, cards_in

GROUPS = {category.name: category.group for category in load_taxonomy()}


def hand_labelled(root: Path, human_labels: bool) -> tuple[dict, str]:
    """The card in the page of a latent that a person puts elsewhere than the annotator, and the page."""
    settings, (folder, _) = make_study(root)
    settings.analysis.taxonomy.encoder = "tfidf"
    settings.analysis.compare.human_labels = human_labels
    annotate(settings, folder)
    categorise(settings, folder)
    append_label(folder, HumanLabel(300, "", "Creative Generation", "", "Ada", "2026-01-01T00:00:00+00:00"))
    html = report(settings, [folder]).read_text(encoding="utf-8")
    return cards_in(Page(html))["base_simpo-300"], html


def test_a_category_by_hand_is_the_cards_only_where_it_is_compared(tmp_path: Path) -> None:
    card, page = hand_labelled(tmp_path / "machine", False)
    assert (card["category"], card["class"]) == ("Request Refusal Mechanisms", "Safety & Content Moderation")
    assert card["similarity"] and card["human"]["category"] == "Creative Generation"
    assert "take the annotator's category" in page
    card, page = hand_labelled(tmp_path / "person", True)
    assert (card["category"], card["class"]) == ("Creative Generation", GROUPS["Creative Generation"])
    assert card["similarity"] is None and card["outcome"] == "placed by people"
    assert "take the category that was given by hand" in page
    assert "card.human.category;" not in (Path(cards.__file__).parent / "templates" / "report.js").read_text()


def test_the_page_says_which_labels_by_hand_are_of_another_crosscoder(tmp_path: Path) -> None:
    settings, (folder, _) = make_study(tmp_path)
    settings.analysis.taxonomy.encoder = "tfidf"
    annotate(settings, folder)
    categorise(settings, folder)
    append_label(folder, HumanLabel(300, "Old", "", "", "Ada", "2026-01-01T00:00:00+00:00"))
    assert "of another crosscoder" not in report(settings, [folder]).read_text(encoding="utf-8")
    # Trained anew, with other weights; a second label is of these.
    write_record(folder, weights="ab")
    append_label(folder, HumanLabel(301, "New", "", "", "Ada", "2026-01-02T00:00:00+00:00"))
    settings.analysis.report.redact = "documents"
    html = report(settings, [folder]).read_text(encoding="utf-8")
    said = "analysis/base_simpo/human.jsonl: 1 of 2 lines are of another crosscoder and not used."
    assert said in Page(html).all("main")[0].text and str(tmp_path) not in html
    found = cards_in(Page(html))
    assert found["base_simpo-300"]["human"] is None and found["base_simpo-301"]["human"]["label"] == "New"


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%41b", "a b"])
def test_examples_are_read_from_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    settings, (folder, _) = make_study(tmp_path / name)
    annotate(settings, folder)
    with reading(folder) as database, pytest.raises(sqlite3.OperationalError, match="readonly"):
        database.execute("DELETE FROM examples")
    assert len(read_annotations(folder)) == 3 and [path.name for path in tmp_path.iterdir()] == [name]


def test_cards_of_tuned_models_come_first_the_most_exclusive_at_the_top(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path, num_cards=3)
    settings.analysis.taxonomy.encoder = "tfidf"
    for folder in folders:
        owners = pq.read_table(folder / "latents.parquet")
        named = ["base" if row["latent"] in (100, 102) else row["owner"] for row in owners.to_pylist()]
        changed = owners.set_column(owners.column_names.index("owner"), "owner", pa.array(named))
        base = {f"nu_{kind}_base": pa.array([0.01] * len(named)) for kind in ("error", "reconstruction")}
        for name, values in base.items():
            changed = changed.set_column(changed.column_names.index(name), name, values)
        pq.write_table(changed, folder / "latents.parquet")
        annotate(settings, folder)
        categorise(settings, folder)
    shown = list(cards_in(Page(report(settings, folders).read_text(encoding="utf-8"))).values())
    bases = [card["owner"] == "base" for card in shown]
    assert bases == [False] * (len(shown) - 4) + [True] * 4
    sums = [abs(card["error"]) + abs(card["reconstruction"]) for card in shown if card["owner"] != "base"]
    assert sums == sorted(sums) and len({card["pair"] for card in shown[:-4]}) == 2
