"""What is withheld for sharing: no string of a document is in any file of the report, nor in what is sent to W&B."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from analysis.annotate import annotate, read_annotations
from analysis.config import AnalysisSettings
from analysis.human import HumanLabel, append_label
from analysis.redaction import runs_of, without_quotes
from analysis.report import report
from analysis.taxonomy import categorise
from analysis.tracking import files_of, tables_of
from tests.analysis.made_study import make_study, write_examples
from tests.analysis.pages import Page, cards_in

SECRET = "Zanzibar quokka ledger seventeen"
RUNS = runs_of([f"the ledger says {SECRET} , no more"])


def test_quoted_passages_and_runs_of_documents_are_withheld() -> None:
    assert without_quotes("Fires on “Dear Sir” and on greetings.", RUNS) == "Fires on […] and on greetings."
    assert without_quotes("words such as 'quokka' or `x`, don't they", RUNS) == "words such as […] or […], don't they"
    assert without_quotes("About zanzibar QUOKKA ledger, seventeen times.", RUNS) == "About […] times."
    # A run that goes on: "says zanzibar quokka ledger seventeen no more" is one gap, not several.
    assert without_quotes(f"Where it says {SECRET}: no more.", RUNS) == "Where it […]."
    assert without_quotes("Three words: zanzibar quokka ledger.", RUNS) == "Three words: zanzibar quokka ledger."
    assert without_quotes("", RUNS) == ""


def make_secret_study(root: Path) -> tuple[AnalysisSettings, list[Path]]:
    """A study of one pair whose documents hold SECRET; one latent was described by a model, one by a person."""
    settings, (folder, _) = make_study(root)
    (folder / "examples.sqlite").unlink()
    write_examples(folder / "examples.sqlite", {300: SECRET, 301: SECRET, 302: SECRET})
    with sqlite3.connect(folder / "examples.sqlite") as database:
        database.execute("UPDATE documents SET tags = ?", (json.dumps({"title": SECRET}),))
    settings.analysis.taxonomy.encoder = "tfidf"
    annotate(settings, folder)
    categorise(settings, folder)
    first, *others = read_annotations(folder)
    said = f"Fires on inventories: “{SECRET[:8]}”, or {SECRET.upper()} in full."
    model = replace(first, annotator="a-model", label="Inventories", description=said, reason=f"{SECRET} is common")
    lines = (json.dumps(asdict(annotation)) + "\n" for annotation in [model, *others])
    (folder / "annotations.jsonl").write_text("".join(lines))
    append_label(folder, HumanLabel(301, "Lists", "", f"see {SECRET}", "Ada", "2026-01-01T00:00:00+00:00"))
    return settings, [folder]


def leaks(root: Path) -> list[str]:
    """Files below `root` that hold a word of SECRET."""
    words = [word.lower().encode() for word in SECRET.split()]
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
        assert (model["label"], model["description"]) == ("Inventories", "Fires on inventories: […], or […] in full.")
        assert (person["human"]["label"], person["human"]["note"]) == ("Lists", "see […]")
    else:
        assert model["label"] == model["description"] == person["human"]["label"] == person["human"]["who"] == ""


def test_without_redaction_the_same_study_shows_it(tmp_path: Path) -> None:
    settings, folders = make_secret_study(tmp_path)
    page = report(settings, folders)
    assert {Path(path).name for path in leaks(page.parent)} == {"index.html", "latents.csv", "latents.tex"}
