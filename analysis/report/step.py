"""The report of a study: one HTML file that needs no network, and its figures and tables for a paper.

outputs/STUDY/report/index.html, figures/*.pdf, figures/*.png, tables/*.csv, tables/*.tex
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import tables
from analysis.compare.changes import Comparison
from analysis.compare.comparison_tables import changes_table
from analysis.compare.comparison_tables import table_of as comparison_table
from analysis.compare.flow import flow_table
from analysis.compare.step import comparisons_of, flows_of, leaderboard_said
from analysis.config import AnalysisSettings
from analysis.latents.columns import models_of
from analysis.report import behaviours, figures
from analysis.report.figure_comparison import forest, forest_caption
from analysis.report.page import records_of, render
from analysis.report.pairs import latent_table, owner_table, pair_of
from analysis.report.quality import parts_of
from analysis.taxonomy.categories import read_categories
from extract.errors import BadInput
from extract.publish import publish

NEEDED = ("latents.parquet", "examples.sqlite", "tags.csv", "annotations.jsonl", "categories.csv")
# Shown where they exist: of an analysis folder, and of the folder of all analyses.
OPTIONAL = ("nulls.csv", "rules.csv", "scores.csv", "score_summary.csv", "agreement.csv", "human.jsonl")
OPTIONAL_OF_STUDY = ("costs.csv",)


@dataclass(frozen=True)
class Compared:
    """One comparison of two tuned models: every row in print, the largest changes as arXiv 2509.18792 prints them, and
    the forest plot, None if no latent of either model has a category.
    """

    comparison: Comparison
    table: tables.Table
    changes: tables.Table
    forest: figures.Drawn | None


def report(settings: AnalysisSettings, folders: list[Path]) -> Path:
    """Write the report on the analysis `folders` and return the path of its page; the page is written last."""
    check_complete(folders)
    target = Path(settings.outputs) / "report"
    members = {folder.name: models_of(folder) for folder in folders}
    colours = figures.model_colours(list(members.values()))
    planted = settings.analysis.report.planted
    measured = [row for folder in folders for row in behaviours.read_measured(folder, members[folder.name], planted)]
    pairs = [pair_of(settings, folder, named_latents(measured, folder), colours, target) for folder in folders]
    comparisons = comparisons_of(settings, folders)
    num_top = settings.analysis.compare.top_changes
    compared = [_compared(comparison, num_top, colours, target) for comparison in comparisons]
    flow, beside = flow_table(flows_of(settings, folders)), leaderboard_said(settings, comparisons)
    for table in [
        behaviours.table_of(measured),
        owner_table(pairs),
        latent_table(pairs),
        flow,
        *(t for t, _ in beside),
    ]:
        tables.write_table(table, target / "tables")
    context = {
        **answer(measured, members),
        "compared": compared,
        "beside": beside,
        "encoders": encoders_of(folders),
        "quality": parts_of(Path(settings.outputs), folders, flow, colours),
        "records": records_of(folders),
    }
    publish(target / "index.html", render(settings, pairs, context, colours).encode("utf-8", errors="backslashreplace"))
    return target / "index.html"


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
        "verdicts": {row.verdict: behaviours.VERDICTS[row.verdict] for row in measured},
    }


def _compared(comparison: Comparison, num_top: int, colours: dict[str, str], target: Path) -> Compared:
    table, changes = comparison_table(comparison), changes_table(comparison, num_top)
    for each in (table, changes):
        tables.write_table(each, target / "tables")
    drawn = None
    if any(change.count_a + change.count_b for change in comparison.changes):
        name, source = f"forest_{table.name}", f"tables/{table.name}.csv"
        drawn = figures.draw(forest(comparison, colours), target, name, [source], forest_caption(comparison))
    return Compared(comparison, table, changes, drawn)
