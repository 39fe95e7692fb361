"""What a card says of a latent: its outcome, scores, people's labels, near-duplicates, intervals of nu."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analysis.annotate.annotations import read_annotations, write_annotations
from analysis.annotate.step import annotate
from analysis.config import OwnerConfig, ReportConfig
from analysis.human import HumanLabel, append_label
from analysis.report.cards import Card, Histogram, Score, cards_of, histogram_of, nu_range
from analysis.taxonomy.categories import CATEGORIES, not_described, read_categories, write_categories
from analysis.taxonomy.step import categorise
from tests.analysis.made_study import make_study

OUTCOMES = {301: "refused", 302: "truncated"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The analysis folder of one pair with three latents of simpo."""
    settings, (folder, _) = make_study(tmp_path)
    settings.analysis.taxonomy.encoder = "tfidf"
    annotate(settings, folder)
    categorise(settings, folder)
    return folder


def cards_by_latent(folder: Path) -> dict[int, Card]:
    return {card.latent: card for card in cards_of(folder, ReportConfig(), set(), OwnerConfig())}


def test_a_latent_that_was_not_described_says_why_and_has_no_category(folder: Path) -> None:
    lost = {"label": "", "description": "", "confidence": "", "evidence": (), "fragments": ()}
    records = [
        replace(record, **lost, outcome=OUTCOMES[record.latent]) if record.latent in OUTCOMES else record
        for record in read_annotations(folder)
    ]
    write_annotations(folder, records)
    placed = [row for row in read_categories(folder) if row.latent == 300]
    write_categories(folder, [*placed, *(not_described(record) for record in records if record.latent in OUTCOMES)], [])
    cards = cards_by_latent(folder)
    assert {latent: card.outcome for latent, card in cards.items()} == {
        300: "placed",
        301: "description refused",
        302: "description truncated",
    }
    assert (cards[301].label, cards[301].category) == ("", "") and cards[300].category
    assert cards[301].documents, "what it fires on is shown all the same"


def test_a_description_without_a_category_says_why(folder: Path) -> None:
    lines = (folder / CATEGORIES).read_text().splitlines()
    lines = [line.replace(",placed,", ",invalid,") if line.startswith("300,") else line for line in lines]
    (folder / CATEGORIES).write_text("\n".join(lines) + "\n")
    card = cards_by_latent(folder)[300]
    assert card.outcome == "category invalid" and card.label


def test_votes_after_the_first_are_not_on_the_card(folder: Path) -> None:
    first = read_annotations(folder)
    write_annotations(folder, [*first, *(replace(record, vote=1, label="second") for record in first)])
    placed = read_categories(folder)
    write_categories(folder, [*placed, *(replace(row, vote=1, category="second") for row in placed)], [])
    cards = cards_by_latent(folder).values()
    assert len(cards) == 3 and not [card for card in cards if "second" in (card.label, card.category)]


def test_scores_and_peoples_labels_are_read_where_they_exist(folder: Path) -> None:
    assert not any(card.scores or card.human for card in cards_by_latent(folder).values())
    (folder / "scores.csv").write_text(
        "latent,owner,annotator,kind,control,num_positive,num_negative,balanced_accuracy,low,high,outcome\n"
        "300,simpo,m,detection,none,5,5,0.9,0.7,0.98,scored\n"
        "300,simpo,m,detection,shuffled,5,5,0.5,0.3,0.7,scored\n"
        "300,simpo,m,fuzzing,none,0,0,,,,refused\n"
    )
    append_label(folder, HumanLabel(300, "first", "", "", "Ada", "2026-01-01T00:00:00+00:00"))
    append_label(folder, HumanLabel(300, "last", "", "", "Ada", "2026-01-02T00:00:00+00:00"))
    card = cards_by_latent(folder)[300]
    assert card.scores == [Score("detection", 0.9, 0.7, 0.98)]
    assert card.human and card.human.label == "last"


def test_near_duplicates_and_histograms_come_from_the_table(folder: Path) -> None:
    cards = cards_by_latent(folder)
    assert (cards[300].twins, cards[301].twins, cards[302].twins) == ([301], [300], [])  # as the study plants them
    rows = pq.read_table(folder / "latents.parquet", columns=["num_active_tokens"])["num_active_tokens"].to_pylist()
    histogram = cards[300].histogram
    assert histogram and (sum(histogram.counts), histogram.lowest) == (rows[300], 0.5)
    assert histogram_of([0, 3, 0, 2, 0], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]) == Histogram(2.0, [3, 0, 2])
    assert histogram_of([0, 0], [1.0, 2.0, 4.0]) is None
    shares = cards[300].shares
    assert list(shares) == ["template", "role user", "role assistant", "source prose", "source behaviours"]
    assert shares["source prose"] + shares["source behaviours"] == pytest.approx(1)
    low, high = cards[300].nu_error_range or (0, 0)
    assert (low, high) == pytest.approx((cards[300].nu_error - 0.05, cards[300].nu_error + 0.05))


def test_an_analysis_without_intervals_groups_and_histograms_has_cards_too(folder: Path) -> None:
    table = pq.read_table(folder / "latents.parquet")
    kept = [name for name in table.column_names if not name.endswith(("_low", "_high", "group", "histogram"))]
    kept = [name for name in kept if not name.startswith("share_")]
    pq.write_table(table.select(kept), folder / "latents.parquet")
    card = cards_by_latent(folder)[300]
    assert (card.nu_error_range, card.twins, card.histogram, card.shares) == (None, [], None, {})


def test_the_interval_of_several_models_is_that_of_the_worst_one() -> None:
    row = {"owner": "a", "nu_error_a_b": 0.1, "nu_error_a_c": -0.3, "nu_error_a_b_low": 0.0, "nu_error_a_b_high": 0.2}
    row |= {"nu_error_a_c_low": -0.4, "nu_error_a_c_high": -0.2}
    assert nu_range("nu_error", row, ["a", "b", "c"]) == (-0.4, -0.2)


def test_a_card_says_whether_a_threshold_lies_within_an_interval(folder: Path) -> None:
    """nu_error of the made latents is below 0.15, its interval 0.05 to either side; dedicated ones pass below 0.75."""
    assert {card.certainty for card in cards_by_latent(folder).values()} == {"certain"}
    narrow = OwnerConfig(max_nu_error=0.01)
    assert {card.certainty for card in cards_of(folder, ReportConfig(), set(), narrow)} == {
        "threshold within the interval"
    }
