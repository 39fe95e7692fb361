"""CSV files of other steps that the report shows where they exist, read with one sentence for whatever is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis.csv_files import read_csv
from extract.errors import BadInput

# By the name of the file: columns of text, of whole numbers, and of numbers that may be missing; it may have more.
COLUMNS: dict[str, tuple[str, str, str]] = {
    "nulls.csv": ("null measure focus other", "", "q05 q50 q95"),
    "rules.csv": ("rule owner", "count", ""),
    "scores.csv": ("kind control", "latent", "balanced_accuracy low high"),
    "score_summary.csv": ("kind control owner", "num_latents", "balanced_accuracy low high"),
    "agreement.csv": ("measure between level", "num_latents", "value low high"),
    "costs.csv": ("kind", "", ""),
}
REMEDY = "Remove it and run `python -m analysis` again, which writes it anew."


def read_optional(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The names of the columns and the rows of a file that COLUMNS knows; BadInput names file, line and column."""
    lines = read_csv(path, path.name, REMEDY)
    header = lines[0].cells if lines else []
    texts, whole, numbers = (names.split() for names in COLUMNS[path.name])
    missing = [name for name in (*texts, *whole, *numbers) if name not in header]
    if missing:
        raise BadInput(f"{path} has no column {' and no column '.join(missing)}. {REMEDY}")
    rows = []
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise BadInput(f"{path}, line {number}, has {len(cells)} cells for {len(header)} columns. {REMEDY}")
        row = dict(zip(header, cells, strict=True))
        _check_numbers(row, whole, numbers, f"{path}, line {number}")
        rows.append(row)
    return header, rows


def _check_numbers(row: dict[str, str], whole: Sequence[str], numbers: Sequence[str], place: str) -> None:
    for name in (*whole, *numbers):
        try:
            if row[name] or name in whole:
                int(row[name]) if name in whole else float(row[name])
        except ValueError as error:
            raise BadInput(f"{place}: {name} ({row[name]!r}) is no number. {REMEDY}") from error
