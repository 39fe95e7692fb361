"""Tables of latents: all that cards show, and the nearest latents of a crosscoder that has none."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

from analysis.config import OwnerConfig
from analysis.human import HumanLabel, append_label
from analysis.report import cards
from analysis.report.nearest import nearest_to
from analysis.report.step import report
from tests.analysis.made_study import make_study, write_latents
from tests.analysis.pages import Page, cards_in, words
from tests.analysis.report.test_report import analyse


def test_the_table_of_latents_holds_what_cards_show(tmp_path: Path) -> None:
    settings, (folder, _) = make_study(tmp_path)
    analyse(settings, [folder])
    append_label(folder, HumanLabel(300, "No advice", "Entity Recognition & Extraction", "", "Ada", "now"))
    found = cards_in(Page(report(settings, [folder]).read_text(encoding="utf-8")))
    with (tmp_path / "report" / "tables" / "latents.csv").open(encoding="utf-8", newline="") as file:
        rows = {int(row["latent"]): row for row in csv.DictReader(file)}
    latents = {row["latent"]: row for row in cards.read_rows(folder)}
    for latent, row in rows.items():
        card, measured = found[f"base_simpo-{latent}"], latents[latent]
        assert [row[name] for name in ("pattern", "description", "class")] == [
            card[name] for name in ("pattern", "description", "class")
        ]
        assert int(row["num_documents"]) == card["numDocuments"] == measured["num_documents"]
        for name in ("nu_error", "nu_reconstruction"):
            ends = [float(row[f"{name}_low"]), float(row[f"{name}_high"])]
            assert ends == [measured[f"{name}_simpo_low"], measured[f"{name}_simpo_high"]]
    assert [rows[n]["near_duplicates"] for n in (300, 301, 302)] == ["301", "300", ""]
    assert (rows[300]["label_by_hand"], rows[300]["category_by_hand"]) == (
        "No advice",
        "Entity Recognition & Extraction",
    )
    assert rows[301]["label_by_hand"] == "" and all(row["description"] for row in rows.values())


def test_a_crosscoder_without_own_latents_says_so_and_shows_the_nearest(tmp_path: Path) -> None:
    settings, (folder, _) = make_study(tmp_path)
    write_latents(folder / "latents.parquet", ["base", "simpo"], set())
    (folder / "tags.csv").write_text((folder / "tags.csv").read_text().splitlines()[0] + "\n")
    shutil.rmtree(tmp_path / "runs")
    analyse(settings, [folder])
    page = Page(report(settings, [folder]).read_text(encoding="utf-8"))
    text = words(page.all("main")[0].text)
    assert "No document of this study carries the tag “behaviour”" in text
    assert "base_simpo has no latent of simpo alone" in text
    assert "None of these crosscoders has a latent that belongs to one model alone" in text
    assert "No metrics.jsonl" in text and "no tuned models to compare" in text
    rows = cards.read_rows(folder)
    alive = [row for row in rows if row["owner"] in ("shared", "other")]
    nearest = nearest_to("simpo", rows, ["base", "simpo"], OwnerConfig())
    best = sorted(alive, key=lambda row: -row["delta_norm"])[:5]
    assert [near.latent for near in nearest] == [row["latent"] for row in best]
    assert f"{nearest[0].delta_norm:.3f}" in text and "Δ-norm within the thresholds" in text
    with (tmp_path / "report" / "tables" / "nearest.csv").open(encoding="utf-8", newline="") as file:
        table = [(row["focus"], int(row["latent"]), float(row["delta_norm"])) for row in csv.DictReader(file)]
    assert table[-5:] == [("simpo", near.latent, near.delta_norm) for near in nearest]
    assert "tables/nearest.csv" in {link.attributes["href"] for link in page.all("a")}
    assert "base_simpo & simpo" in (tmp_path / "report" / "tables" / "nearest.tex").read_text().replace("\\_", "_")
