"""What the analysis tells Weights & Biases: latents by owner, tables, the report, and its files as an artifact."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.compare.step import outputs_of
from analysis.config import AnalysisSettings
from analysis.report.step import INDEX, NEEDED, WRITTEN
from analysis.written_files import written
from extract.mirror import Mirror
from train.metric_table import units

# Of an analysis folder: what becomes a table, by its name, and what the artifact holds.
TABLES = {"categories": "categories.csv", "classes": "classes.csv"}
FILES = (*NEEDED, "classes.csv", "config.yaml")
# Of these, what quotes documents, or names folders of this machine: not sent where the report is redacted.
WITHHELD = ("examples.sqlite", "annotations.jsonl", "categories.csv", "config.yaml")


def track(settings: AnalysisSettings, folders: list[Path], report_folder: Path) -> None:
    """Log the finished analyses in `folders` and their report as one W&B run, the same one whenever they change.

    A redacted report has a run and an artifact of its own for each level: what others hold stays in W&B.
    """
    level = settings.analysis.report.redact
    owners, page = report_folder / "tables" / "owners.csv", report_folder / INDEX
    facts = facts_of(settings) | {"units": units("analysis")}
    ending, folder = (
        ("", report_folder) if level == "none" else (f"-redacted-{level}", report_folder / f"wandb_{level}")
    )
    mirror = Mirror(settings.tracking, folder, f"analysis{ending}", "analysis", settings.study, facts)
    tables = tables_of(settings, folders, report_folder)
    mirror.show(latents_by_owner(owners), {"analysis/owners": owners, **tables}, {"analysis/report": page})
    mirror.artifact(f"analysis-{settings.study}{ending}", "analysis", files_of(settings, folders, report_folder))
    mirror.end(0)


def facts_of(settings: AnalysisSettings) -> dict[str, Any]:
    """The configuration of the run; of a redacted report without settings, which name folders and servers."""
    level = settings.analysis.report.redact
    return asdict(settings) if level == "none" else {"study": settings.study, "redact": level}


def tables_of(settings: AnalysisSettings, folders: list[Path], report_folder: Path) -> dict[str, Path]:
    """The tables that are logged: of each analysis, and the comparisons."""
    shared = {name: file for name, file in TABLES.items() if _is_shared(settings, file)}
    tables = {f"analysis/{name}/{f.name}": f / file for f in folders for name, file in shared.items()}
    compared = _comparisons(settings, folders, report_folder)
    return tables | {f"analysis/comparisons/{path.stem}": path for path in compared}


def files_of(settings: AnalysisSettings, folders: list[Path], report_folder: Path) -> dict[str, Path]:
    """The files of the artifact by their names in it."""
    shared = [name for name in FILES if _is_shared(settings, name)]
    found = {f"{folder.name}/{name}": folder / name for folder in folders for name in shared}
    shown = [report_folder / INDEX, *written(report_folder / WRITTEN)]
    found |= {f"report/{path.relative_to(report_folder)}": path for path in shown}
    return {name: path for name, path in found.items() if path.is_file()}


def _is_shared(settings: AnalysisSettings, name: str) -> bool:
    return settings.analysis.report.redact == "none" or name not in WITHHELD


def latents_by_owner(table: Path) -> dict[str, float]:
    """The rows of the report's table of owners as metrics."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {f"analysis/latents/{row['pair']}/{row['owner']}": int(row["count"]) for row in rows}


def _comparisons(settings: AnalysisSettings, folders: list[Path], report_folder: Path) -> list[Path]:
    """The tables of tuned models that share a base, and the flow of latents."""
    names = outputs_of(settings.analysis.compare, folders)
    return [report_folder / name for name in names if name.endswith(".csv")]
