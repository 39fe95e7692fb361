"""What the page says of how latents were selected is what was done, whatever the settings of the last command."""

from __future__ import annotations

import csv
from pathlib import Path

from analysis.annotate.step import annotate
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
    with (page.parent / "tables" / "owners.csv").open(newline="") as file:
        certain = {(row["pair"], row["owner"]): row["certain"] for row in csv.DictReader(file)}
    assert (certain["base_simpo", "simpo"], certain["base_dpo", "dpo"]) == ("3", "0")
