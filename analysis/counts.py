"""How many latents of each model fall into each category: from analysis folders, or from a file of counts.

Such a file is a CSV whose first line is category,<model>,<model>...; a row `unclassified` adds to the totals alone.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from analysis.columns import models_of
from analysis.taxonomy import Category, read_categories
from extract.errors import BadInput

UNCLASSIFIED = "unclassified"
CLASS, CATEGORY = "class", "category"
LEVELS = (CLASS, CATEGORY)


@dataclass(frozen=True)
class Counts:
    """Latents by category (or class) and model. `totals` count the unclassified ones too; `annotator` named them."""

    level: str
    models: list[str]
    by_name: dict[str, list[int]]
    totals: list[int]
    annotator: str = ""


def folders_by_base(folders: list[Path]) -> list[list[Path]]:
    """The folders that share a base, together; a base with one tuned model alone is left out."""
    by_base: dict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        by_base[models_of(folder)[0]].append(folder)
    return [sharing for sharing in by_base.values() if len(columns_of_folders(sharing)) > 1]


def counts_of_folders(folders: list[Path], categories: list[Category]) -> list[Counts]:
    """Classes and categories of the tuned-only latents of analysis folders, one column for each tuned model."""
    columns = columns_of_folders(folders)
    own = [[row for row in read_categories(folder) if row.owner == tuned] for folder, tuned in columns.values()]
    found = [Counter(row.category for row in rows) for rows in own]
    by_name = {category.name: [counter[category.name] for counter in found] for category in categories}
    annotators = "; ".join(sorted({row.annotator for rows in own for row in rows}))
    counts = Counts(CATEGORY, list(columns), by_name, [counter.total() for counter in found], annotators)
    return [classes_of(counts, categories), counts]


def columns_of_folders(folders: list[Path]) -> dict[str, tuple[Path, str]]:
    """Folder and name of every tuned model by its heading: its name, or one with its folder where a name repeats."""
    places = [(folder, tuned) for folder in folders for tuned in models_of(folder)[1:]]
    repeats = Counter(tuned for _, tuned in places)
    if max(repeats.values()) == 1:
        return {tuned: (folder, tuned) for folder, tuned in places}
    alone = Counter(folder for folder, _ in places)
    return {
        folder.name if alone[folder] == 1 else f"{folder.name} {tuned}": (folder, tuned) for folder, tuned in places
    }


def classes_of(counts: Counts, categories: list[Category]) -> Counts:
    """Counts of categories summed to their classes."""
    by_class = {category.group: [0] * len(counts.models) for category in categories}
    for category in categories:
        if category.name in counts.by_name:
            by_class[category.group] = [
                a + b for a, b in zip(by_class[category.group], counts.by_name[category.name], strict=True)
            ]
    return Counts(CLASS, counts.models, by_class, counts.totals, counts.annotator)


def read_counts(path: Path, categories: list[Category]) -> list[Counts]:
    """Counts of a CSV file; where its rows are categories of the taxonomy, their classes come first."""
    if not path.is_file():
        raise BadInput(f"counts ({path}) is not a file. Give a CSV: category,<model>,<model>...")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"counts ({path}) is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if any(row)]
    if not rows or len(rows[0]) < 3 or len(set(rows[0])) < len(rows[0]):
        raise BadInput(
            f"counts ({path}): the first line must be category,<model>,<model>... with at least two different models."
        )
    models, by_name = rows[0][1:], {}
    for row in rows[1:]:
        if row[0] in by_name:
            raise BadInput(f"counts ({path}): {row[0]!r} occurs twice. Add up its rows.")
        by_name[row[0]] = [_count(cell, path, row[0]) for cell in row[1:]]
        if len(row) != len(rows[0]):
            raise BadInput(f"counts ({path}): row {row[0]!r} has {len(row) - 1} counts for {len(models)} models.")
    totals = [sum(column) for column in zip(*by_name.values(), strict=True)] or [0] * len(models)
    for model, total in zip(models, totals, strict=True):
        if total == 0:
            raise BadInput(f"counts ({path}): {model} has no latents. A share needs at least one: remove the column.")
    by_name.pop(UNCLASSIFIED, None)
    level = CLASS if set(by_name) <= {category.group for category in categories} else CATEGORY
    counts = Counts(level, models, by_name, totals)
    known = set(by_name) <= {category.name for category in categories}
    return [classes_of(counts, categories), counts] if known else [counts]


def _count(cell: str, path: Path, name: str) -> int:
    if not cell.isdecimal():
        raise BadInput(
            f"counts ({path}): {cell!r} in row {name!r} is not a count. Write whole numbers of latents, not shares."
        )
    return int(cell)
