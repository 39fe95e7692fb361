"""Text of models and people with unusual line ends and halves of characters goes through to the page and its tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from analysis.annotate.annotations import read_annotations, write_annotations
from analysis.annotate.step import annotate
from analysis.csv_files import read_csv
from analysis.human import HumanLabel, append_label
from analysis.report.step import report
from analysis.taxonomy.categories import read_categories, write_categories
from analysis.taxonomy.step import categorise
from tests.analysis.made_study import make_study
from tests.analysis.pages import Page, cards_in

ENDS = "a\u2028b\u2029c\u0085d\x0be\x1cf\rg"
HALF = "half \ud83d of it"


def make_odd_study(root: Path) -> tuple:
    """A study of one pair with odd text wherever a model or a person writes."""
    settings, (folder, _) = make_study(root)
    settings.analysis.taxonomy.encoder = "tfidf"
    annotate(settings, folder)
    categorise(settings, folder)
    first, second, third = read_annotations(folder)
    odd = [
        replace(first, label=ENDS, description=ENDS, reason=HALF, pattern=HALF),
        replace(second, label=HALF),
        replace(third, label="=1+1", annotator=f"model {HALF}"),
    ]
    write_annotations(folder, odd)
    placed = read_categories(folder)
    write_categories(folder, [replace(placed[0], category=ENDS, group=HALF, reason=ENDS), *placed[1:]], [HALF])
    append_label(folder, HumanLabel(301, HALF, ENDS, ENDS, "Ada", "2026-01-01T00:00:00+00:00"))
    return settings, [folder]


def test_odd_text_reaches_the_page_and_its_tables(tmp_path: Path) -> None:
    settings, folders = make_odd_study(tmp_path)
    page = report(settings, folders)
    found = cards_in(Page(page.read_text(encoding="utf-8")))
    card = found["base_simpo-300"]
    assert (card["label"], card["reason"], card["pattern"]) == (ENDS, HALF, HALF)
    # CSV files have "\n" for "\r", and "\ud83d" in letters for what UTF-8 cannot hold.
    assert (card["category"], card["class"]) == (ENDS.replace("\r", "\n"), r"half \ud83d of it")
    assert found["base_simpo-301"]["label"] == HALF
    header, *rows = read_csv(tmp_path / "report" / "tables" / "latents.csv", "latents", "")
    labels = {row.cells[header.cells.index("label")] for row in rows}
    assert labels == {ENDS.replace("\r", "\n"), r"half \ud83d of it", "'=1+1"}
