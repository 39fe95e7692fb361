"""What is withheld for sharing: no string of a document is in any file of the report, nor in what is sent to W&B."""

from __future__ import annotations

import json
import re
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from analysis import tracking
from analysis.annotate.step import annotate, read_annotations
from analysis.compare.step import compare
from analysis.config import AnalysisSettings
from analysis.human import HumanLabel, append_label
from analysis.report.step import report
from analysis.taxonomy.categories import read_categories, write_categories
from analysis.taxonomy.step import categorise
from analysis.tracking import facts_of, files_of, tables_of
from tests.analysis.made_study import make_study, write_examples
from tests.analysis.pages import Page, cards_in

SECRET = "Zanzibar quokka ledger seventeen"
# Documents without blanks, which descriptions quote without marks.
JAPANESE, RECORD = "患者は東京在住の佐藤花子で電話番号は零三", "patient_record_4711_hanako_sato"


def make_secret_study(root: Path) -> tuple[AnalysisSettings, list[Path]]:
    """A study of one pair whose documents hold SECRET; one latent was described by a model, one by a person."""
    settings, (folder, _) = make_study(root)
    (folder / "examples.sqlite").unlink()
    write_examples(folder / "examples.sqlite", {300: f"{SECRET} {JAPANESE} {RECORD}", 301: SECRET, 302: SECRET})
    with sqlite3.connect(folder / "examples.sqlite") as database:
        database.execute("UPDATE documents SET tags = ?", (json.dumps({"title": SECRET}),))
    settings.analysis.taxonomy.encoder = "tfidf"
    annotate(settings, folder)
    categorise(settings, folder)
    placed = [replace(row, reason=f"says {SECRET}") for row in read_categories(folder)]  # as a language model would
    write_categories(folder, placed, [])
    first, *others = read_annotations(folder)
    said = f"Fires on inventories: “{SECRET[:8]}”, or {SECRET.upper()} in full, {JAPANESE} too, and {RECORD}."
    texts = {"pattern": f"as in {SECRET}", "description": said, "reason": f"{SECRET} is common"}
    model = replace(first, annotator="a-model", label="Inventories", **texts)
    lines = (json.dumps(asdict(annotation)) + "\n" for annotation in [model, *others])
    (folder / "annotations.jsonl").write_text("".join(lines))
    said = HumanLabel(301, "Lists", f"My {SECRET[:8]}", f"see {SECRET}", "Ada", "2026-01-01T00:00:00+00:00")
    append_label(folder, said)
    return settings, [folder]


def leaks(root: Path) -> list[str]:
    """Files below `root` that hold a word of SECRET, or a part of the other documents."""
    words = [word.lower().encode() for word in (*SECRET.split(), "佐藤花子", "hanako", '"ada"')]
    return [
        str(path) for path in root.rglob("*") if path.is_file() and any(w in path.read_bytes().lower() for w in words)
    ]


@pytest.mark.parametrize("level", ["documents", "all"])
def test_no_file_of_the_report_nor_anything_sent_holds_text_of_documents(tmp_path: Path, level: str) -> None:
    settings, folders = make_secret_study(tmp_path)
    settings.analysis.report.redact = level
    page = report(settings, folders)
    assert not leaks(page.parent)
    sent = [*tables_of(settings, folders, page.parent).values(), *files_of(settings, folders, page.parent).values()]
    assert page in sent and not {str(path) for path in sent} & set(leaks(tmp_path))
    found = cards_in(Page(page.read_text(encoding="utf-8")))
    model, person, offline = (found[f"base_simpo-{latent}"] for latent in (300, 301, 302))
    assert all(card["documents"] == [] and card["category"] for card in found.values())
    assert (offline["label"], offline["description"], offline["reason"]) == ("", "", "")
    assert offline["confidence"] and offline["error"] is not None
    if level == "documents":
        assert model["label"] == "Inventories"
        assert (model["pattern"], model["reason"]) == ("as in […]", "[…] is common")
        assert model["description"] == ("Fires on inventories: […], or […] in full, […] too, and […].")
        assert (person["human"]["label"], person["human"]["note"]) == ("Lists", "see […]")
    else:
        assert model["label"] == model["pattern"] == model["description"] == person["human"]["label"] == ""
    assert person["human"]["who"] == person["human"]["category"] == ""


def test_a_redacted_report_names_no_folders_and_links_nothing_that_is_not_shared(tmp_path: Path) -> None:
    settings, folders = make_secret_study(tmp_path)
    settings.models["base"].id = str(tmp_path / "private" / "base_model")
    settings.analysis.report.redact = "documents"
    page = report(settings, folders)
    html = page.read_text(encoding="utf-8")
    assert "base_model" in html and "private" not in html and str(tmp_path) not in html
    links = {element.attributes["href"] or "" for element in Page(html).all("a")}
    assert not [link for link in links if link.split("/")[0] not in ("figures", "tables") and not link.startswith("#")]
    assert not [name for name in files_of(settings, folders, page.parent) if name.endswith("config.yaml")]
    assert facts_of(settings) == {"study": "made", "redact": "documents"}


def test_a_redacted_report_has_a_run_of_its_own_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, folders = make_secret_study(tmp_path)
    made: list[tuple[Path, str]] = []

    class Noted:
        def __init__(self, config: object, folder: Path, name: str, *rest: object) -> None:
            made.append((folder, name))

        def show(self, *arguments: object) -> None: ...

        def artifact(self, name: str, *rest: object) -> None:
            made.append((made[-1][0], name))

        def end(self, status: int) -> None: ...

    monkeypatch.setattr(tracking, "Mirror", Noted)
    monkeypatch.setattr(tracking, "latents_by_owner", lambda path: {})
    for level in ("none", "documents", "all"):
        settings.analysis.report.redact = level
        tracking.track(settings, folders, tmp_path / "report")
    assert len(set(made)) == 6 and len({folder for folder, _ in made}) == 3


@pytest.mark.parametrize("level", ["none", "documents", "all"])
def test_who_labelled_is_in_nothing_of_a_comparison_and_in_nothing_at_all_of_what_is_redacted(
    tmp_path: Path, level: str
) -> None:
    settings, folders = make_study(tmp_path)
    settings.analysis.taxonomy.encoder, settings.analysis.compare.human_labels = "tfidf", True
    settings.analysis.report.redact = level
    for folder, latent, who in zip(folders, (300, 350), ("Zuleika", "Xanthippe"), strict=True):
        annotate(settings, folder)
        categorise(settings, folder)
        append_label(folder, HumanLabel(latent, "", "Creative Generation", "", who, "2026-01-01T00:00:00+00:00"))
        row = "cohen_kappa,annotator and people: {},category,0.5,0.2,0.8,9\n"
        rows = row.format(who) + row.format("Ada")
        (folder / "agreement.csv").write_text(f"measure,between,level,value,low,high,num_latents\n{rows}")
    compare(settings, folders, tmp_path / "report")
    page = report(settings, folders)
    named = {path.name for path in page.parent.rglob("*") if re.search(rb"(?i)zuleika|xanthippe", path_bytes(path))}
    agreement = {f"agreement_base_{tuned}.{ending}" for tuned in ("simpo", "dpo") for ending in ("csv", "tex")}
    assert named == ({"index.html", *agreement} if level == "none" else set())  # on cards where all is shown
    said = (page.parent / "tables" / "category_simpo_dpo.txt").read_text()
    assert "people" in said and "by offline (n-grams)" in said and "other people" in said
    if level != "none":
        between = (page.parent / "tables" / "agreement_base_dpo.csv").read_text()
        assert "people: person 1" in between and "people: person 2" in between and "Ada" not in between
        sent = [*tables_of(settings, folders, page.parent).values(), *files_of(settings, folders, page.parent).values()]
        assert not [path for path in sent if re.search(rb"(?i)zuleika|xanthippe", path_bytes(path))]


def path_bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def test_without_redaction_the_same_study_shows_it(tmp_path: Path) -> None:
    settings, folders = make_secret_study(tmp_path)
    page = report(settings, folders)
    assert {Path(path).name for path in leaks(page.parent)} == {"index.html", "latents.csv", "latents.tex"}
