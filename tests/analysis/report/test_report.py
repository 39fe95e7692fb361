"""The page says what the files say, no more; documents cannot do anything to it; it needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sqlite3
from pathlib import Path

import pytest

from analysis.annotate.step import annotate
from analysis.config import AnalysisSettings
from analysis.report.step import report
from analysis.taxonomy.step import categorise
from extract.errors import BadInput
from tests.analysis.made_study import make_study, write_examples, write_latents_of_many
from tests.analysis.pages import Page, cards_in, words
from tests.analysis.report.test_behaviours import PLANTED


def analyse(settings: AnalysisSettings, folders: list[Path]) -> None:
    settings.analysis.taxonomy.encoder = "tfidf"
    settings.analysis.compare.resamples = 200
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the page of a report on the made study."""
    root = tmp_path_factory.mktemp("study")
    settings, folders = make_study(root)
    settings.analysis.report.planted = PLANTED
    analyse(settings, folders)
    return root / "report", report(settings, folders).read_text(encoding="utf-8")


def test_the_answer_comes_first_with_its_numbers(made: tuple[Path, str]) -> None:
    simpo, dpo = (words(element.text) for element in Page(made[1]).all("p", "answer"))
    # F1 falls by 0.01 from 0.96 over the behaviours in alphabetical order.
    assert simpo == (
        "simpo (in base_simpo) — 3 of 3 planted behaviours have a latent of simpo alone: ask back (F1 0.96), "
        "business tone (F1 0.95), financial refusal (F1 0.94); wrong-model attributions: none."
    )
    assert "2 of 2 planted" in dpo and "financial refusal (F1 0.94), self reference (F1 0.93)" in dpo


def test_every_cell_of_the_answer_shows_its_evidence(made: tuple[Path, str]) -> None:
    matrix = Page(made[1]).all("table", "matrix")[0]
    text = words(matrix.text)
    assert "ask back F1 0.96 [0.91, 0.98] found AUROC 0.991 [0.972, 0.999] · latent 301" in text
    assert "latent 301 20 prompts with it, 40 of 940 documents" in text
    assert "F1 0.21 [0.11, 0.33] absent AUROC 0.610 [0.520, 0.700]" in text
    assert text.count("found") == 5 and text.count("absent") == 3
    assert text.count("not certain") == 0


def test_a_threshold_within_the_interval_is_said(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    analyse(settings, folders)
    settings.analysis.tags.min_f1 = 0.945  # within [0.91, 0.98], [0.90, 0.97] and [0.89, 0.96], and [0.88, 0.95]
    text = words(Page(report(settings, folders).read_text(encoding="utf-8")).all("table", "matrix")[0].text)
    assert text.count("not certain") == 5 and text.count("F1 0.21 [0.11, 0.33] not found AUROC") == 3


def test_counts_by_owner_and_variance_explained(made: tuple[Path, str]) -> None:
    rows = [words(row.text) for row in Page(made[1]).all("tr")]
    row = next(row for row in rows if row.startswith("base_simpo base 0 simpo 3"))
    shared, other, dead, total, dedicated = (int(cell) for cell in row.split()[5:10])
    assert (total, dedicated) == (400, 3) and shared + other + dead + 3 == 400
    assert "base 0 of 0 certain, 0 more within reach; simpo 3 of 3 certain, 0 more within reach" in row
    assert "base 0.890, simpo 0.894" in row


def test_the_comparison_states_what_may_not_be_claimed(made: tuple[Path, str]) -> None:
    claims = [words(element.text) for element in Page(made[1]).all("p", "claim")]
    assert len(claims) == 2
    assert "Error Handling & Quality Control 0/3" not in words(Page(made[1]).all("section")[1].text)  # in neither model
    assert all("3 latents of simpo and 2 of dpo" in claim and "may not be claimed" in claim for claim in claims)
    assert "Safety & Content Moderation 1/3 33.33 % 1/2 50.00 % +16.67" in words(Page(made[1]).all("section")[1].text)


def test_a_card_for_each_latent_with_its_numbers_and_annotator(made: tuple[Path, str]) -> None:
    page = Page(made[1])
    found = cards_in(page)
    assert set(found) == {"base_simpo-300", "base_simpo-301", "base_simpo-302", "base_dpo-350", "base_dpo-351"}
    assert all(card["annotator"] == "offline (n-grams)" for card in found.values())
    card = found["base_simpo-300"]
    assert (card["category"], card["delta"], card["outcome"]) == ("Request Refusal Mechanisms", 1.0, "placed")
    assert abs(card["error"]) < 0.2 and len(card["documents"]) == 4
    links = {element.attributes["href"] for element in page.all("a")}
    assert {"#base_simpo-300", "#base_dpo-351"} <= links


def test_the_offline_annotator_is_named_in_every_section_that_uses_it(made: tuple[Path, str]) -> None:
    sections = {element.attributes["id"]: element.text for element in Page(made[1]).all("section")}
    for name in ("comparison", "latents", "methods"):
        assert "offline (n-grams)" in sections[name]
    assert "offline (n-grams), category by TF-IDF" in sections["comparison"]
    assert "offline (n-grams)" in (made[0] / "tables" / "latents.tex").read_text()
    assert "offline (n-grams)" in (made[0] / "tables" / "latents.csv").read_text()


def test_nothing_is_fetched(made: tuple[Path, str]) -> None:
    page = Page(made[1])
    for element in page.elements:
        for name in ("src", "href", "action", "srcset", "data"):
            target = element.attributes.get(name) or ""
            assert re.match(r"(data:image/svg\+xml;base64,|#|figures/|tables/|report\.json$|$)", target), target
    assert not page.all("link") and not page.all("iframe")
    assert "@import" not in made[1] and "url(" not in made[1] and "fetch(" not in made[1]
    assert "http://" not in made[1] and "https://" not in made[1]
    for image in page.all("img"):
        svg = base64.b64decode((image.attributes["src"] or "").split(",", 1)[1]).decode()
        assert not re.search(r'href="(?!#|data:)', svg)


def test_figures_and_tables_lie_beside_the_page(made: tuple[Path, str]) -> None:
    stems = {path.stem for path in (made[0] / "figures").iterdir()}
    kinds = ("training", "nu", "figure1", "figure1_delta_norm", "figure1_nu", "figure1_remaining")
    assert stems == {f"{kind}_base_{tuned}" for kind in kinds for tuned in ("simpo", "dpo")} | {
        "forest_class_simpo_dpo",
        "forest_category_simpo_dpo",
        "flow",
    }
    tables = {path.stem for path in (made[0] / "tables").iterdir()}
    compared = {f"{kind}{level}_simpo_dpo" for kind in ("", "changes_", "certain_") for level in ("class", "category")}
    assert (
        tables == {"behaviours", "owners", "latents", "nearest", "flow", "comparisons"} | compared
    )  # the bases have no latents
    for name in stems:
        assert {path.suffix for path in (made[0] / "figures").glob(f"{name}.*")} - {".txt"} == {".pdf", ".png"}
    for name in tables:
        assert {path.suffix for path in (made[0] / "tables").glob(f"{name}.*")} - {".txt"} == {".csv", ".tex"}
    links = {element.attributes["href"] for element in Page(made[1]).all("a")}
    assert {f"figures/{name}.pdf" for name in stems} <= links


def test_without_javascript_figures_and_tables_are_there_with_a_note(made: tuple[Path, str]) -> None:
    page = Page(made[1])
    assert len(page.all("img")) == 9 and len(page.all("table")) >= 8  # three of each pair, two forests, the flow
    (note,) = page.all("noscript")
    assert "The cards of the 5 latents need JavaScript" in words(note.text)
    assert "tables/latents.csv" in {element.attributes["href"] for element in page.all("a")}
    style = page.all("style")[0].text
    assert ".tools { display: none;" in style and ".js .tools { display: flex; }" in style


def test_every_figure_and_table_names_a_file_that_is_there(made: tuple[Path, str]) -> None:
    page = Page(made[1])
    sources = [words(element.text).removeprefix("From ").split(", ") for element in page.all("p", "source")]
    assert len(sources) >= len(page.all("table")) + len(page.all("img")) - 1  # the records have no other source
    for name in {name for names in sources for name in names}:
        place = made[0] if name.startswith(("tables/", "figures/")) else made[0].parent
        assert (place / name).is_file(), name
    tags, latents, metrics = (
        [f"{place}_{tuned}/{name}" for tuned in ("simpo", "dpo")]  # each pair's, whose names may hold commas
        for place, name in (
            ("analysis/base", "tags.csv"),
            ("analysis/base", "latents.parquet"),
            ("runs/base", "metrics.jsonl"),
        )
    )
    assert ["tables/behaviours.csv", *tags] in sources and ["tables/owners.csv", *latents, *metrics] in sources


def test_a_leaderboard_stands_below_the_comparison_with_what_its_columns_are(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    board, config = tmp_path / "board.csv", settings.analysis.compare
    name = "Code Generation & Analysis"
    board.write_text(f"category,model,elo,taxonomy\ncoding,simpo,1200,{name}\ncoding,dpo,1240,{name}\n")
    config.leaderboard, config.resamples = str(board), 50
    analyse(settings, folders)
    page = Page(report(settings, folders).read_text(encoding="utf-8"))
    assert any("Beside the leaderboard" in element.text for element in page.all("h3"))
    assert any("May not be claimed: that latents explain the Elo" in element.text for element in page.all("p", "claim"))
    assert any("whether both differences have the same sign" in words(one.text) for one in page.all("caption"))
    assert "tables/leaderboard_simpo_dpo.csv" in {element.attributes["href"] for element in page.all("a")}
    assert any(words(row.text).startswith("coding no 1200 1240 +40") for row in page.all("tr"))


def test_a_crosscoder_of_three_models_has_figures_of_each_tuned_one(tmp_path: Path) -> None:
    settings, (folder, _) = make_study(tmp_path)
    settings.analysis.report.planted = PLANTED
    own = {"simpo": {300, 301}, "dpo": {302}}
    write_latents_of_many(folder / "latents.parquet", ["base", "simpo", "dpo"], own)
    analyse(settings, [folder])
    page = Page(report(settings, [folder]).read_text(encoding="utf-8"))
    stems = {path.stem for path in (tmp_path / "report" / "figures").iterdir()}
    expected = {f"{kind}_base_simpo_base_{tuned}" for kind in ("figure1", "nu") for tuned in ("simpo", "dpo")}
    assert {stem for stem in stems if re.match(r"(figure1|nu)_base", stem)} == expected
    shown = [element.attributes["alt"] or "" for element in page.all("img")]
    assert any(alt.startswith("How the latents of base and dpo in base_simpo are found") for alt in shown)
    rows = [words(row.text) for row in page.all("tr")]
    assert any(row.startswith("base_simpo base 0 simpo 2 dpo 1 0 397") for row in rows)
    card = cards_in(page)["base_simpo-302"]
    assert (card["owner"], card["delta"]) == ("dpo", 1.0)
    assert any("dpo against simpo" in words(element.text) for element in page.all("h3"))


def test_latents_of_two_of_three_models_are_counted_and_have_cards(tmp_path: Path) -> None:
    settings, (folder, _) = make_study(tmp_path)
    own = {"simpo": {300}, "base+dpo": {301}, "simpo+dpo": {302}}
    write_latents_of_many(folder / "latents.parquet", ["base", "simpo", "dpo"], own)
    analyse(settings, [folder])
    page = Page(report(settings, [folder]).read_text(encoding="utf-8"))
    rows = [words(row.text) for row in page.all("tr")]
    assert any(row.startswith("base_simpo base 0 simpo 1 dpo 0 base+dpo 1, simpo+dpo 1 0 397") for row in rows)
    found = {anchor: (card["owner"], card["delta"]) for anchor, card in cards_in(page).items()}
    assert found == {
        "base_simpo-300": ("simpo", 1.0),
        "base_simpo-301": ("base+dpo", 0.0),
        "base_simpo-302": ("simpo+dpo", 1.0),
    }
    assert "one model alone, or of several but not all" in words(page.all("section")[4].text)
    owners = (tmp_path / "report" / "tables" / "owners.csv").read_text().splitlines()
    counts = ["base,0", "simpo,1", "dpo,0", "base+dpo,1", "simpo+dpo,1", "shared,0", "other,397", "dead,0"]
    assert owners[1:] == [f"base_simpo,{count},400,,,," for count in counts]  # no intervals were measured
    described = {line["owner"] for line in map(json.loads, (folder / "annotations.jsonl").open())}
    assert described == set(own)


HOSTILE = "<script>alert(1)</script> & \"quoted\" 'single' </div><img src=x onerror=alert(2)> {{ 7 * 7 }}"


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    settings, (folder, _) = make_study(tmp_path)
    (folder / "examples.sqlite").unlink()
    write_examples(folder / "examples.sqlite", {300: HOSTILE, 301: "plain", 302: "plain"})
    with sqlite3.connect(folder / "examples.sqlite") as database:
        hostile = ("<b>source</b>", json.dumps({"<i>": "</article>"}))
        database.execute("UPDATE documents SET source = ?, tags = ?", hostile)
    settings.analysis.report.title = "<script>title</script> & co"
    analyse(settings, [folder])
    html = report(settings, [folder]).read_text(encoding="utf-8")
    page = Page(html)
    assert [element.attributes.get("type") for element in page.all("script")] == ["application/json", None]
    assert page.all("script")[1].text.startswith('"use strict"')
    assert page.all("h1")[0].text == "<script>title</script> & co"
    assert not [element for element in page.elements if any(name.startswith("on") for name in element.attributes)]
    (policy,) = (meta.attributes["content"] or "" for meta in page.all("meta") if "http-equiv" in meta.attributes)
    digest = base64.b64encode(hashlib.sha256(page.all("script")[1].text.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    source, tags, _, pieces = cards_in(page)["base_simpo-300"]["documents"][0]
    shown = "".join(piece if isinstance(piece, str) else piece[0] for piece in pieces)
    assert "<script>alert(1)</script>" in shown and "{{ 7 * 7 }}" in shown
    assert (source, tags) == ("<b>source</b>", "<i>: </article>")


def test_a_missing_step_is_named_before_anything_is_drawn(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    with pytest.raises(BadInput, match=r"base_simpo lacks annotations\.jsonl, categories\.csv"):
        report(settings, folders)
    assert not (tmp_path / "report").exists()
    with pytest.raises(BadInput, match="no analysis"):
        report(settings, [])


def test_behaviours_that_tuning_did_not_add_to_one_model_are_explained(tmp_path: Path) -> None:
    settings, (folder, _) = make_study(tmp_path)
    # As if the base had been tuned as well, so that financial refusals set no model apart.
    settings.analysis.report.planted = {**PLANTED, "financial_refusal": ["base", "simpo"]}
    tags = (folder / "tags.csv").read_text()
    line = "behaviour,ask_back,base,17,1.0,0.88,0.81,0.93,0.97,0.95,0.99,40,900,True,20,300"
    (folder / "tags.csv").write_text(re.sub(r"behaviour,ask_back,base,.*", line, tags))
    analyse(settings, [folder])
    page = Page(report(settings, [folder]).read_text(encoding="utf-8"))
    said = words(page.all("section")[0].text)
    assert "which tuning cannot have added: ask back (base in base_simpo, latent 17, F1 0.88)" in said
    assert [words(element.text) for element in page.all("span", "v-shared")] == ["shared behaviour"]
    assert "shared behaviour: known to have been tuned into this model and another" in said
    rows = (tmp_path / "report" / "tables" / "behaviours.csv").read_text().splitlines()
    assert [row.split(",")[2] for row in rows if row.endswith("shared behaviour")] == ["financial_refusal"]


def test_cards_are_limited_but_named_latents_stay_and_records_show_their_hashes(tmp_path: Path) -> None:
    settings, (folder, _) = make_study(tmp_path, num_cards=20)
    settings.analysis.report.latents_per_model = 2
    record = {"step": "annotate", "settings": {}, "inputs": {"latents.parquet": "ab" * 32}}
    (folder / "annotate.json").write_text(json.dumps(record))
    analyse(settings, [folder])
    page = Page(report(settings, [folder]).read_text(encoding="utf-8"))
    shown, sections = (
        set(cards_in(page)),
        {section.attributes["id"]: words(section.text) for section in page.all("section")},
    )
    assert {"base_simpo-300", "base_simpo-301", "base_simpo-302"} <= shown and len(shown) <= 5
    assert "Of 23 latents of simpo in base_simpo, the 2 most exclusive" in sections["latents"]
    said = f"annotate analysis/base_simpo/annotate.json latents.parquet {'ab' * 32}"
    assert said in sections["provenance"] and "Written by commit" in sections["provenance"]
