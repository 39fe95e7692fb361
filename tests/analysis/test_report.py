"""The page says what the files say, no more; documents cannot do anything to it; it needs no network."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sqlite3
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis import behaviours, cards
from analysis.annotate import annotate
from analysis.config import AnalysisSettings, OwnerConfig
from analysis.examples import Example
from analysis.report import report
from analysis.taxonomy import categorise
from extract.errors import BadInput
from tests.analysis.made_study import make_study, write_examples, write_latents, write_latents_of_many

PLANTED = {
    "financial_refusal": ["simpo", "dpo"],
    "ask_back": ["simpo"],
    "business_tone": ["simpo"],
    "self_reference": ["dpo"],
}
VOID = {"meta", "img", "br", "input", "link", "hr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""


class Page(HTMLParser):
    """Elements of a page with their text; an element closed out of order or left open is an error."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {[element.tag for element in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1].tag == tag, f"</{tag}> closes {self._open[-1:]}"
        if self._open.pop().tag in ("td", "th", "dt", "dd"):
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, tag: str, name: str | None = None) -> list[Element]:
        return [
            element
            for element in self.elements
            if element.tag == tag and (name is None or name in (element.attributes.get("class") or "").split())
        ]


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


def words(text: str) -> str:
    return " ".join(text.split())


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
    assert "ask back F1 0.96 [0.91, 0.98] found AUROC 0.99 [0.97, 1.00] · latent 301" in text
    assert "F1 0.21 [0.11, 0.33] absent AUROC 0.61 [0.52, 0.70]" in text
    assert text.count("found") == 5 and text.count("absent") == 3


def test_counts_by_owner_and_variance_explained(made: tuple[Path, str]) -> None:
    rows = [words(row.text) for row in Page(made[1]).all("tr")]
    row = next(row for row in rows if row.startswith("base_simpo base 0 simpo 3"))
    shared, other, dead, total, dedicated = (int(cell) for cell in row.split()[5:10])
    assert (total, dedicated) == (400, 3) and shared + other + dead + 3 == 400
    assert "base 0.890, simpo 0.894" in row


def test_the_comparison_states_what_may_not_be_claimed(made: tuple[Path, str]) -> None:
    claims = [words(element.text) for element in Page(made[1]).all("p", "claim")]
    assert len(claims) == 2
    assert all("3 latents of simpo and 2 of dpo" in claim and "may not be claimed" in claim for claim in claims)
    assert "Safety & Content Moderation 1/3 33.33 % 1/2 50.00 % +16.67" in words(Page(made[1]).all("section")[1].text)


def test_a_card_for_each_latent_with_its_numbers_and_annotator(made: tuple[Path, str]) -> None:
    page = Page(made[1])
    found = page.all("article", "card")
    assert {card.attributes["id"] for card in found} == {
        "base_simpo-300",
        "base_simpo-301",
        "base_simpo-302",
        "base_dpo-350",
        "base_dpo-351",
    }
    assert all("Annotator: offline (n-grams)" in words(card.text) for card in found)
    card = next(card for card in found if card.attributes["id"] == "base_simpo-300")
    assert "Request Refusal Mechanisms" in card.text and "Δ-norm 1.00" in words(card.text)
    assert float(card.attributes["data-error"] or "nan") < 0.2
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
            assert re.match(r"(data:image/svg\+xml;base64,|#|figures/$|tables/$|$)", target), (element.tag, target)
    assert not page.all("link") and not page.all("iframe")
    assert "@import" not in made[1] and "url(" not in made[1] and "fetch(" not in made[1]
    assert "http://" not in made[1] and "https://" not in made[1]
    for image in page.all("img"):
        svg = base64.b64decode((image.attributes["src"] or "").split(",", 1)[1]).decode()
        assert not re.search(r'href="(?!#|data:)', svg)


def test_figures_and_tables_lie_beside_the_page(made: tuple[Path, str]) -> None:
    stems = {path.stem for path in (made[0] / "figures").iterdir()}
    assert stems == {
        f"{kind}_base_{tuned}" for kind in ("training", "delta_norm", "nu") for tuned in ("simpo", "dpo")
    } | {"forest_class_simpo_dpo", "forest_category_simpo_dpo"}
    tables = {path.stem for path in (made[0] / "tables").iterdir()}
    assert {"behaviours", "owners", "latents", "class_simpo_dpo", "category_simpo_dpo"} == tables
    assert all(len(list((made[0] / "tables").glob(f"{name}.*"))) == 2 for name in tables)


def test_a_crosscoder_of_three_models_has_figures_of_each_tuned_one(tmp_path: Path) -> None:
    settings, (folder, other) = make_study(tmp_path)
    settings.analysis.report.planted = PLANTED
    own = {"simpo": {300, 301}, "dpo": {302}}
    write_latents_of_many(folder / "latents.parquet", ["base", "simpo", "dpo"], own)
    analyse(settings, [folder, other])
    page = Page(report(settings, [folder, other]).read_text(encoding="utf-8"))
    stems = {path.stem for path in (tmp_path / "report" / "figures").iterdir()}
    expected = {f"{kind}_base_simpo_base_{tuned}" for kind in ("delta_norm", "nu") for tuned in ("simpo", "dpo")}
    expected |= {"delta_norm_base_dpo", "nu_base_dpo"}
    assert {stem for stem in stems if stem.startswith(("delta_norm", "nu"))} == expected
    shown = [element.attributes["alt"] for element in page.all("img")]
    assert "Histogram of Δ-norm of base and dpo in base_simpo" in shown
    rows = [words(row.text) for row in page.all("tr")]
    assert any(row.startswith("base_simpo base 0 simpo 2 dpo 1 0 397") for row in rows)
    assert any(row.startswith("base_dpo base 0 dpo 2") for row in rows)
    (card,) = (card for card in page.all("article") if card.attributes["id"] == "base_simpo-302")
    assert "dpo only" in words(card.text) and "Δ-norm 1.00" in words(card.text)
    compared = "base_simpo dpo against base_simpo simpo"
    assert any(compared in words(element.text) for element in page.all("h3"))


def test_latents_of_two_of_three_models_are_counted_and_have_cards(tmp_path: Path) -> None:
    settings, (folder, _) = make_study(tmp_path)
    own = {"simpo": {300}, "base+dpo": {301}, "simpo+dpo": {302}}
    write_latents_of_many(folder / "latents.parquet", ["base", "simpo", "dpo"], own)
    analyse(settings, [folder])
    page = Page(report(settings, [folder]).read_text(encoding="utf-8"))
    rows = [words(row.text) for row in page.all("tr")]
    assert any(row.startswith("base_simpo base 0 simpo 1 dpo 0 base+dpo 1, simpo+dpo 1 0 397") for row in rows)
    cards_by_id = {card.attributes["id"]: words(card.text) for card in page.all("article")}
    assert list(cards_by_id) == ["base_simpo-300", "base_simpo-301", "base_simpo-302"]
    assert "base+dpo only" in cards_by_id["base_simpo-301"] and "Δ-norm 0.00" in cards_by_id["base_simpo-301"]
    assert "simpo+dpo only" in cards_by_id["base_simpo-302"] and "Δ-norm 1.00" in cards_by_id["base_simpo-302"]
    options = [option.attributes["value"] for option in page.all("option")]
    assert "simpo+dpo in base_simpo" in options and "base in base_simpo" not in options
    assert "one model alone, or of several but not all" in words(page.all("section")[3].text)
    owners = (tmp_path / "report" / "tables" / "owners.csv").read_text().splitlines()
    counts = ["base,0", "simpo,1", "dpo,0", "base+dpo,1", "simpo+dpo,1", "shared,0", "other,397", "dead,0"]
    assert owners[1:] == [f"base_simpo,{count},400" for count in counts]
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
    page = Page(report(settings, [folder]).read_text(encoding="utf-8"))
    assert [element.text[:12] for element in page.all("script")] == ['"use strict"']
    assert page.all("h1")[0].text == "<script>title</script> & co"
    assert not [element for element in page.elements if any(name.startswith("on") for name in element.attributes)]
    card = next(card for card in page.all("article") if card.attributes["id"] == "base_simpo-300")
    assert "<script>alert(1)</script>" in card.text and "{{ 7 * 7 }}" in card.text and "<b>source</b>" in card.text


def test_a_wrong_attribution_and_a_miss_are_stated(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    settings.analysis.report.planted = {**PLANTED, "business_tone": ["dpo"]}
    analyse(settings, folders)
    page = Page(report(settings, folders).read_text(encoding="utf-8"))
    simpo, dpo = (words(element.text) for element in page.all("p", "answer"))
    assert "2 of 2 planted" in simpo and "wrong-model attributions: business tone (F1 0.95)." in simpo
    assert "2 of 3 planted" in dpo and "missed: business tone; wrong-model attributions: none." in dpo


def test_a_behaviour_found_in_the_base_is_not_called_added(tmp_path: Path) -> None:
    settings, (folder, _) = make_study(tmp_path)
    tags = (folder / "tags.csv").read_text()
    line = "behaviour,ask_back,base,17,1.0,0.88,0.81,0.93,0.97,0.95,0.99,40,900,True"
    (folder / "tags.csv").write_text(re.sub(r"behaviour,ask_back,base,.*", line, tags))
    analyse(settings, [folder])
    said = words(Page(report(settings, [folder]).read_text(encoding="utf-8")).all("section")[0].text)
    assert "which tuning cannot have added: ask back (base in base_simpo, latent 17, F1 0.88)" in said


def test_verdicts() -> None:
    def verdicts(value: str, owner: str, other: str) -> list[str]:
        return [behaviours.verdict(found, value, owner, [other, owner], PLANTED) for found in (True, False)]

    assert verdicts("ask_back", "simpo", "base") == ["found", "missed"]
    assert verdicts("ask_back", "dpo", "base") == ["wrong model", "absent"]
    assert verdicts("ask_back", "base", "simpo") == ["untuned model", "absent"]
    assert verdicts("unknown", "dpo", "base") == ["added", "not found"]
    # Both models of the pair were taught it: a latent of one alone shows that they learned it differently.
    assert verdicts("financial_refusal", "dpo", "simpo") == ["shared behaviour", "absent"]
    assert verdicts("ask_back", "simpo", "dpo") == ["found", "missed"]
    assert verdicts("ask_back", "dpo", "simpo") == ["wrong model", "absent"]
    assert set(behaviours.VERDICTS) >= {*verdicts("ask_back", "simpo", "base"), "shared behaviour", "wrong model"}


def test_a_shared_behaviour_is_told_from_a_wrong_attribution(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    # As if the base of both pairs had been tuned as well, so that financial refusals set no model apart.
    settings.analysis.report.planted = {**PLANTED, "financial_refusal": ["base", "simpo"]}
    analyse(settings, folders)
    page = Page(report(settings, folders).read_text(encoding="utf-8"))
    simpo, dpo = (words(element.text) for element in page.all("p", "answer"))
    assert simpo.endswith(
        "shared behaviours with a latent of simpo alone: financial refusal (F1 0.94); wrong-model attributions: none."
    )
    assert "2 of 2 planted" in simpo and "wrong-model attributions: financial refusal (F1 0.94)." in dpo
    assert [words(element.text) for element in page.all("span", "v-shared")] == ["shared behaviour"]
    explained = words(page.all("section")[0].text)
    assert "shared behaviour: known to have been tuned into this model and another" in explained
    rows = (tmp_path / "report" / "tables" / "behaviours.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows if row.endswith("shared behaviour")] == ["base_simpo"]


def test_a_model_that_is_tuned_somewhere_has_a_column_wherever_it_is() -> None:
    pairs = {"base_simpo": ["base", "simpo"], "base_dpo": ["base", "dpo"], "simpo_dpo": ["simpo", "dpo"]}
    assert [(column.pair, column.owner) for column in behaviours.columns_of(pairs)] == [
        ("base_simpo", "simpo"),
        ("base_dpo", "dpo"),
        ("simpo_dpo", "simpo"),
        ("simpo_dpo", "dpo"),
    ]


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
    nearest = cards.nearest_to("simpo", rows, ["base", "simpo"], OwnerConfig())
    best = sorted(alive, key=lambda row: -row["delta_norm"])[:5]
    assert [near.latent for near in nearest] == [row["latent"] for row in best]
    assert f"{nearest[0].delta_norm:.3f}" in text and "Δ-norm within the thresholds" in text


def test_a_missing_step_is_named_before_anything_is_drawn(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    with pytest.raises(BadInput, match=r"base_simpo lacks annotations\.jsonl, categories\.csv"):
        report(settings, folders)
    assert not (tmp_path / "report").exists()
    with pytest.raises(BadInput, match="no analysis"):
        report(settings, [])


def test_three_hundred_cards_stay_below_five_megabytes(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path, num_cards=150)
    analyse(settings, folders)
    page = report(settings, folders)
    assert Page(page.read_text(encoding="utf-8")).all("article")[299]
    assert page.stat().st_size < 5_000_000


def test_the_number_of_cards_is_limited_but_named_latents_stay(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path, num_cards=20)
    settings.analysis.report.latents_per_model = 2
    analyse(settings, folders)
    page = Page(report(settings, folders).read_text(encoding="utf-8"))
    shown = {card.attributes["id"] for card in page.all("article")}
    assert {"base_simpo-300", "base_simpo-301", "base_simpo-302", "base_dpo-350", "base_dpo-351"} <= shown
    assert len(shown) <= 9
    assert "Of 23 latents of simpo in base_simpo, the 2 most exclusive" in words(page.all("section")[3].text)


def test_spans_mark_tokens_by_activation() -> None:
    tokens = ("<|im_start|>", "user", "\n", "Hi", "", "é", " there", "\n", " you")
    spans = cards.spans_of(Example(0, tokens, {4: 5.0, 7: 10.0}), 64, 10.0)
    assert [(span.text, span.kind, span.opacity) for span in spans] == [
        ("<|im_start|>user", "template", 0.0),
        ("↵ Hi", "", 0.0),
        ("é", "fired", 0.5),  # the activation of the empty token before it
        (" there", "", 0.0),
        ("↵ ", "fired", 1.0),
        (" you", "", 0.0),
    ]


def test_a_long_document_is_cut_around_its_peak() -> None:
    tokens = tuple(f" t{i}" for i in range(300))
    spans = cards.spans_of(Example(0, tokens, {200: 3.0}), 30, 3.0)
    text = "".join(span.text for span in spans)
    assert text.startswith("…  t180") and " t200" in text and text.endswith(" t209 …")
    assert cards.visible("  ", fired=True) == "␣"
