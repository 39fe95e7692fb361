"""What the page says of how latents were selected is what was done, whatever the settings of the last command."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.annotate.step import annotate
from analysis.config import AnalysisConfig
from analysis.report.step import report
from analysis.taxonomy.step import categorise
from tests.analysis.made_study import make_study, write_record
from tests.analysis.pages import Page


def test_the_thresholds_are_those_that_each_pair_was_analysed_with(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    settings.analysis.taxonomy.encoder, settings.analysis.compare.resamples = "tfidf", 50
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
    write_record(folders[1], max_nu_error=0.001)
    settings.analysis.owner.max_nu_error = 0.77
    page = report(settings, folders)
    sections = Page(page.read_text(encoding="utf-8")).all("section")
    (methods,) = (section for section in sections if section.attributes.get("id") == "methods")
    _, simpo, dpo = methods.text.split(". Statistics, training and analysis leave out")
    assert "|ν error| < 0.2 " in simpo and simpo.endswith("base_dpo") and "|ν error| < 0.001 " in dpo
    assert "0.77" not in methods.text
    assert "as a whole is claimed by that p of the categories alone, by the votes with the largest," in methods.text
    with (page.parent / "tables" / "owners.csv").open(newline="") as file:
        certain = {(row["pair"], row["owner"]): row["certain"] for row in csv.DictReader(file)}
    assert (certain["base_simpo", "simpo"], certain["base_dpo", "dpo"]) == ("3", "0")


def write_records(folder: Path, **settings: dict[str, Any]) -> None:
    """The records of the steps from tags to score, under the default settings but for those that are given."""
    config = AnalysisConfig()
    defaults = {
        "tags": asdict(config.tags),
        "annotate": asdict(config.annotate),
        "categorise": asdict(config.taxonomy),
        "score": asdict(config.scoring),
    }
    for step, said in defaults.items():
        record = {"step": step, "settings": said | settings.get(step, {}), "inputs": {}}
        (folder / f"{step}.json").write_text(json.dumps(record))


def sections_of(page: Path) -> dict[str, str]:
    sections = Page(page.read_text(encoding="utf-8")).all("section")
    return {section.attributes.get("id") or "": " ".join(section.text.split()) for section in sections}


def test_what_is_said_of_tags_annotator_taxonomy_and_scores_is_what_was_done(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    analysis = settings.analysis
    analysis.taxonomy.encoder, analysis.compare.resamples = "tfidf", 50
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
        write_records(folder)
    # The command that the page is written by may have settings that no pair was analysed with.
    analysis.tags.min_f1, analysis.tags.confidence, analysis.tags.resamples = 0.945, 0.77, 777
    analysis.annotate.annotator, analysis.llm.model, analysis.annotate.window = "llm", "never-asked", 77
    analysis.taxonomy.similarity_floor, analysis.taxonomy.path = 0.77, None
    said = sections_of(report(settings, folders))
    assert "with 95 % intervals" in said["answer"] and "Found means F1 of at least 0.8; not certain" in said["answer"]
    assert "not certain)" not in said["answer"]  # no interval holds 0.8
    assert "percentiles of 1,000 bootstrap resamples" in said["methods"]
    assert "within 10 words of the activations in the top 20 documents" in said["methods"]
    assert "The taxonomy is that of arXiv 2509.18792; similarities below 0.25, a quarter" in said["methods"]
    page = " ".join(said.values())
    assert not any(unsaid in page for unsaid in ("never-asked", "0.945", "77 %", "777", "below 0.77", "Scores (arXiv"))


def test_pairs_that_were_made_unlike_are_told_apart(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    settings.analysis.taxonomy.encoder, settings.analysis.compare.resamples = "tfidf", 50
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
    asked = {"llm": {"models": ["one", "two"], "repeats": 3}}
    write_records(folders[0])
    write_records(
        folders[1],
        tags={"min_f1": 0.945, "confidence": 0.9},  # within [0.88, 0.95] and [0.91, 0.98]
        annotate={"annotator": "llm", **asked},
        categorise={"path": "folder/mine.yaml", **asked},
        score={"judge": "one", "positives": 7},
    )
    said = sections_of(report(settings, folders))
    answer, methods = said["answer"], said["methods"]
    assert "Found means F1 of at least 0.8 (base_simpo); Found means F1 of at least 0.945 (base_dpo);" in answer
    assert "with 95 % (base_simpo) or 90 % (base_dpo) intervals" in answer
    simpo, dpo = (answer.split(f"{name} (in base_{name})")[1].split("wrong-model")[0] for name in ("simpo", "dpo"))
    assert "not certain" not in simpo.split("dpo (in")[0] and dpo.split(". ")[0].count("not certain") == 2
    assert "base_simpo. The annotator offline (n-grams) sets words" in methods
    assert (
        "base_dpo. one and two described each latent from its top 20 documents with marked tokens, 3 times" in methods
    )
    assert "base_simpo. The taxonomy is that of arXiv 2509.18792; similarities below 0.25" in methods
    assert "base_dpo. The taxonomy is that of mine.yaml; the model's own answer decides." in methods
    assert "base_dpo. Scores (arXiv 2410.13928)" in methods and "7 and 10 a question" in methods
    assert methods.count("Scores (arXiv") == 1
