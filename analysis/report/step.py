"""The report of a study: one HTML file that needs no network, and its figures and tables for a paper.

outputs/STUDY/report/index.html, figures/*.pdf, .png and .txt (captions), tables/*.csv, .tex and .txt (notes)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

from analysis import tables
from analysis.compare.changes import Comparison
from analysis.compare.claims import PLURAL
from analysis.compare.comparison_tables import certain_table, changes_table
from analysis.compare.comparison_tables import table_of as comparison_table
from analysis.compare.flow import flow_table
from analysis.compare.step import comparisons_of, flows_of, leaderboard_said
from analysis.compare.summary import comparisons_table
from analysis.config import AnalysisSettings
from analysis.latents.columns import models_of
from analysis.made_with import recorded, settings_of
from analysis.report import behaviours, figures
from analysis.report.figure_comparison import forest, forest_caption
from analysis.report.latent_tables import latent_table, nearest_table, owner_table
from analysis.report.page import records_of, render
from analysis.report.pairs import pair_of, selections_of
from analysis.report.quality import parts_of
from analysis.taxonomy.categories import read_categories
from analysis.written_files import rewriting
from extract.errors import BadInput
from extract.publish import publish

# The page, and what names the figures and tables that a report wrote; with their folders all that the step leaves.
INDEX, WRITTEN = "index.html", "report_files.json"
REPORTED = (INDEX, WRITTEN, "figures", "tables")
NEEDED = ("latents.parquet", "examples.sqlite", "tags.csv", "annotations.jsonl", "categories.csv")
# Shown where they exist: of an analysis folder, and of the folder of all analyses.
OPTIONAL = (
    "nulls.csv",
    "rules.csv",
    "scores.csv",
    "score_summary.csv",
    "agreement.csv",
    "human.jsonl",
    "tags.json",
    "score.json",
)
OPTIONAL_OF_STUDY = ("costs.csv",)


@dataclass(frozen=True)
class Compared:
    """One comparison of two tuned models: the largest changes as arXiv 2509.18792 prints them, `more` tables with what
    they show, without the rows that neither model has a latent of, and the forest plot, None if all are such rows.
    """

    comparison: Comparison
    changes: tables.Table
    more: list[tuple[tables.Table, str]]
    forest: figures.Drawn | None


def report(settings: AnalysisSettings, folders: list[Path]) -> Path:
    """Write the report on the analysis `folders` and return the path of its page; the page is written last.

    Figures and tables that an earlier report wrote, of pairs that are gone say, are removed.
    """
    check_complete(folders)
    target = Path(settings.outputs) / "report"
    with rewriting(target / WRITTEN, [target / "figures", target / "tables"]):
        page = _page(settings, folders, target)
        publish(target / INDEX, page.encode("utf-8", errors="backslashreplace"))
    return target / INDEX


def _page(settings: AnalysisSettings, folders: list[Path], target: Path) -> str:
    """The page, once its figures and tables are written."""
    members = {folder.name: models_of(folder) for folder in folders}
    colours = figures.model_colours(list(members.values()))
    measured = [row for folder in folders for row in _measured(settings, folder, members[folder.name])]
    pairs = [pair_of(settings, folder, named_latents(measured, folder), colours, target) for folder in folders]
    comparisons = comparisons_of(settings, folders)
    num_top = settings.analysis.compare.top_changes
    compared = [_compared(comparison, num_top, colours, target) for comparison in comparisons]
    flow, beside = flow_table(flows_of(settings, folders)), leaderboard_said(settings, comparisons)
    nearest = [nearest_table(pairs)] if any(pair.nearest for pair in pairs) else []
    whole = [behaviours.table_of(measured), owner_table(pairs), latent_table(pairs), *nearest, flow]
    over_all = [comparisons_table(comparisons)] if comparisons else []
    for table in [*whole, *over_all, *(table for table, _ in beside)]:
        tables.write_table(table, target / "tables")
    context = {
        **answer(measured, members),
        "selections": selections_of(pairs),
        "recorded": partial(recorded, folders),
        "compared": compared,
        "beside": beside,
        "encoders": encoders_of(folders),
        "quality": parts_of(Path(settings.outputs), folders, flow, colours, settings.analysis.report.redact == "none"),
        "records": records_of(folders),
    }
    return render(settings, pairs, context, colours)


def _measured(settings: AnalysisSettings, folder: Path, models: list[str]) -> list[behaviours.Measured]:
    """The behaviours of a pair with the threshold that they were found by."""
    config = settings.analysis
    min_f1 = settings_of(folder, "tags").get("min_f1", config.tags.min_f1)
    return behaviours.read_measured(folder, models, config.report.planted, min_f1)


def check_complete(folders: list[Path]) -> None:
    """BadInput that names what is missing before anything is drawn."""
    if not folders:
        raise BadInput("There is no analysis to report on. Run `python -m analysis experiment=STUDY`.")
    for folder in folders:
        missing = [name for name in NEEDED if not (folder / name).is_file()]
        if missing:
            raise BadInput(f"{folder} lacks {', '.join(missing)}. Run `python -m analysis` for this pair first.")


def optional_inputs(outputs: Path, folders: list[Path]) -> dict[str, Path]:
    """The files that a report shows where they exist, by their names in its record."""
    found = {f"{folder.name}/{name}": folder / name for folder in folders for name in OPTIONAL}
    found |= {name: outputs / "analysis" / name for name in OPTIONAL_OF_STUDY}
    return {name: path for name, path in found.items() if path.is_file()}


def encoders_of(folders: list[Path]) -> list[str]:
    """Who put the latents into categories, as the files themselves say."""
    return sorted({row.annotator for folder in folders for row in read_categories(folder)})


def named_latents(measured: list[behaviours.Measured], folder: Path) -> set[int]:
    """The latents of a pair that the answer names."""
    return {row.latent for row in measured if row.pair == folder.name and row.found and row.latent is not None}


def answer(measured: list[behaviours.Measured], members: dict[str, list[str]]) -> dict[str, Any]:
    """What the first section shows: sentences, cells, verdicts."""
    columns = behaviours.columns_of(members)
    return {
        "measured": measured,
        "columns": columns,
        "values": list(dict.fromkeys(row.value for row in measured)),
        "cells": {(row.value, row.pair, row.owner): row for row in measured},
        "answers": list(zip(columns, behaviours.answers(measured, columns), strict=True)),
        "misplaced": behaviours.misplaced_in_base(measured, columns),
        "of_several": behaviours.of_several(measured),
        "verdicts": {row.verdict: behaviours.VERDICTS[row.verdict] for row in measured},
    }


def _compared(comparison: Comparison, num_top: int, colours: dict[str, str], target: Path) -> Compared:
    changes, whole = changes_table(comparison, num_top), comparison_table(comparison)
    more = [(whole, f"All {PLURAL[comparison.level]} in the order of the taxonomy")]
    if comparison.certain:
        more.append((certain_table(comparison), "The certain latents alone"))
    for table in (changes, *(table for table, _ in more)):
        tables.write_table(table, target / "tables")
    seen = [change.count_a + change.count_b > 0 for change in comparison.changes]
    drawn = None
    if any(seen):
        name, source = f"forest_{whole.name}", f"tables/{whole.name}.csv"
        drawn = figures.draw(forest(comparison, colours), target, name, [source], forest_caption(comparison))
    shown = [(replace(table, printed=list(compress(table.printed, seen))), said) for table, said in more]
    return Compared(comparison, changes, shown, drawn)
