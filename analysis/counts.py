"""How many latents of each model fall into each category: from analysis folders, or from a file of counts.

Such a file is a CSV whose first line is category,<model>,<model>...; a row `unclassified` adds to the totals alone.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.bootstrap import Units
from analysis.categories import Category
from analysis.columns import models_of
from analysis.selected import Side, read_selected, side_of, units_of
from extract.errors import BadInput

UNCLASSIFIED = "unclassified"
CLASS, CATEGORY = "class", "category"
LEVELS = (CLASS, CATEGORY)


@dataclass(frozen=True)
class Counts:
    """Latents by category (or class) and model. `totals` count the unclassified ones too; `annotator` named them.

    `num_tests` is how many names were looked at, those without a row included. `units` and `sides` are what is known
    of the single latents of every model: nothing where counts come from a file.
    """

    level: str
    models: list[str]
    by_name: dict[str, list[int]]
    totals: list[int]
    annotator: str = ""
    num_tests: int = 0
    units: tuple[Units, ...] = ()
    sides: tuple[Side, ...] = ()


def folders_by_base(folders: list[Path]) -> list[list[Path]]:
    """The folders that share a base, together; a base with one tuned model alone is left out."""
    by_base: dict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        by_base[models_of(folder)[0]].append(folder)
    return [sharing for sharing in by_base.values() if len(columns_of_folders(sharing)) > 1]


def counts_of_folders(folders: list[Path], categories: list[Category], human_labels: bool = False) -> list[Counts]:
    """Classes and categories of the tuned-only latents of analysis folders, one column for each tuned model.

    Counted are the placed ones by their primary votes, `other` in the totals alone; with `human_labels`, what people
    said of a latent instead.
    """
    columns = columns_of_folders(folders)
    own = [read_selected(folder, tuned, categories, human_labels) for folder, tuned in columns.values()]
    found = [Counter(row.votes[0] for row in rows if row.is_placed) for rows in own]
    by_name = {category.name: [counter[category.name] for counter in found] for category in categories}
    sides = tuple(side_of(rows) for rows in own)
    counts = Counts(
        CATEGORY,
        list(columns),
        by_name,
        [counter.total() for counter in found],
        "; ".join(sorted(set().union(*(side.annotators for side in sides)))),
        units=tuple(units_of(rows, {name: number for number, name in enumerate(by_name)}) for rows in own),
        sides=sides,
    )
    classes = classes_of(counts, categories)
    number_of = {category.name: list(classes.by_name).index(category.group) for category in categories}
    return [replace(classes, units=tuple(units_of(rows, number_of) for rows in own)), counts]


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
    return Counts(CLASS, counts.models, by_class, counts.totals, counts.annotator, sides=counts.sides)


def read_counts(path: Path, categories: list[Category]) -> list[Counts]:
    """Counts of a CSV file; where its rows are all categories of the taxonomy, their classes come first."""
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
    if not by_name:
        raise BadInput(f"counts ({path}): no row names a category. Write a line for each: category,<count>,<count>...")
    return _levels(Counts(CATEGORY, models, by_name, totals), categories)


def _levels(counts: Counts, categories: list[Category]) -> list[Counts]:
    """The counts of a file as what their names are; of all categories of the taxonomy, their classes come first.

    A category without a row is one that was looked at too, so that it counts as a test, but its number is unknown, and
    with it that of its class.
    """
    names, groups = {category.name for category in categories}, {category.group for category in categories}
    given = set(counts.by_name)
    if given <= groups:
        return [replace(counts, level=CLASS, num_tests=len(groups))]
    if not given <= names:
        return [counts]
    counts = replace(counts, num_tests=len(names))
    return [classes_of(counts, categories), counts] if given == names else [counts]


def _count(cell: str, path: Path, name: str) -> int:
    if not cell.isdecimal():
        raise BadInput(
            f"counts ({path}): {cell!r} in row {name!r} is not a count. Write whole numbers of latents, not shares."
        )
    return int(cell)
