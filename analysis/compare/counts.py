"""How many latents of each model fall into each category: from analysis folders, or from a file of counts.

Such a file is a CSV whose first line is category,<model>,<model>...; a row `unclassified` adds to the totals alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.compare.bootstrap import Units
from analysis.compare.selected import Selected, Side, read_selected, side_of, spoken, units_of
from analysis.csv_files import Line, read_csv
from analysis.latents.certainty import CERTAIN, UNKNOWN, certainty_in
from analysis.latents.columns import models_of
from analysis.made_with import made_with, selection_of
from analysis.spelling import did_you_mean
from analysis.taxonomy.categories import Category
from extract.errors import BadInput

UNCLASSIFIED = "unclassified"
CLASS, CATEGORY = "class", "category"
LEVELS = (CLASS, CATEGORY)
EXPECTED = "Give a CSV: category,<model>,<model>... and below it a line for each category: name,<count>,<count>..."
# Latents of one model in a file: the tests are exact sums, made for the latents of a crosscoder.
MAX_LATENTS = 100_000
COUNT_LATENTS = "Count a model's own latents, not what they fire on."


@dataclass(frozen=True)
class Counts:
    """Latents by category (or class) and model. `totals` count the unclassified ones too; `annotator` named them.

    `num_tests` is how many names were looked at, those without a row included. `units` and `sides` are what is known
    of the single latents of every model: nothing where counts come from a file. `certain` counts the certain latents
    alone; `without_interval` are those of each model that have no interval of nu, and cannot be certain.
    `made_with` is what each model's latents were selected and named with.
    `has_categories`: these are classes of categories that are compared as well.
    """

    level: str
    models: list[str]
    by_name: dict[str, list[int]]
    totals: list[int]
    annotator: str = ""
    num_tests: int = 0
    units: tuple[Units, ...] = ()
    sides: tuple[Side, ...] = ()
    certain: Counts | None = None
    without_interval: tuple[int, ...] = ()
    made_with: tuple[dict[str, str], ...] = ()
    has_categories: bool = False


def folders_by_base(folders: list[Path]) -> list[list[Path]]:
    """The folders that share a base, together; a base with one tuned model alone is left out."""
    by_base: dict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        by_base[models_of(folder)[0]].append(folder)
    return [sharing for sharing in by_base.values() if len(columns_of_folders(sharing)) > 1]


def counts_of_folders(folders: list[Path], categories: list[Category], human_labels: bool = False) -> list[Counts]:
    """Classes and categories of the tuned-only latents of analysis folders, one column for each tuned model.

    Counted are the placed ones by their primary votes, `other` in the totals alone; with `human_labels`, what people
    said of a latent instead. They are counted a second time without those that might have been selected otherwise:
    these were named as all were, though an annotator may have none of them.
    """
    columns = columns_of_folders(folders)
    own = [read_selected(folder, tuned, categories, human_labels) for folder, tuned in columns.values()]
    said = [certainty_in(folder, tuned, selection_of(folder).owner) for folder, tuned in columns.values()]
    certain = [[row for row in rows if by[row.latent] == CERTAIN] for rows, by in zip(own, said, strict=True)]
    unknown = tuple(Counter(by.values())[UNKNOWN] for by in said)
    made = tuple(made_with(folder) for folder, _ in columns.values())
    levels = (counts_of(list(columns), rows, categories) for rows in (own, certain))
    return [
        replace(
            whole, certain=_named_as(whole, replace(alone, made_with=made)), without_interval=unknown, made_with=made
        )
        for whole, alone in zip(*levels, strict=True)
    ]


def _named_as(whole: Counts, part: Counts) -> Counts:
    """A part of the latents of `whole`, with the annotators of all of them."""
    sides = zip(part.sides, whole.sides, strict=True)
    return replace(part, sides=tuple(replace(side, annotators=all_.annotators) for side, all_ in sides))


def counts_of(models: list[str], own: list[list[Selected]], categories: list[Category]) -> list[Counts]:
    """Classes and categories of the `own` latents of `models`."""
    found = [Counter(row.votes[0] for row in rows if row.is_placed) for rows in own]
    by_name = {category.name: [counter[category.name] for counter in found] for category in categories}
    sides = tuple(side_of(rows) for rows in own)
    counts = Counts(
        CATEGORY,
        models,
        by_name,
        [counter.total() for counter in found],
        "; ".join(spoken(frozenset().union(*(side.annotators for side in sides)))),
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
    return Counts(
        CLASS, counts.models, by_class, counts.totals, counts.annotator, sides=counts.sides, has_categories=True
    )


def read_counts(path: Path, categories: list[Category]) -> list[Counts]:
    """Counts of a CSV file; where its rows are all categories of the taxonomy, their classes come first."""
    header, *lines = read_csv(path, "counts", EXPECTED) or [Line(1, [])]
    models = _models(path, header.cells)
    by_name: dict[str, list[int]] = {}
    for number, (name, *cells) in lines:
        where = f"counts ({path}), line {number}"
        if not name:
            raise BadInput(f"{where} names no category. {EXPECTED}")
        if name in by_name:
            raise BadInput(f"{where}: {name!r} occurs twice. Add up its rows.")
        if len(cells) != len(models):
            raise BadInput(f"{where}: row {name!r} has {len(cells)} counts for {len(models)} models.")
        by_name[name] = [_count(cell, where, name) for cell in cells]
    if not by_name.keys() - {UNCLASSIFIED}:
        raise BadInput(f"counts ({path}): no row names a category. {EXPECTED}")
    totals = [sum(column) for column in zip(*by_name.values(), strict=True)]
    for model, total in zip(models, totals, strict=True):
        if total == 0:
            raise BadInput(f"counts ({path}): {model} has no latents. A share needs at least one: remove the column.")
        if total > MAX_LATENTS:
            raise BadInput(f"counts ({path}): {model} has {total} latents, more than {MAX_LATENTS}. {COUNT_LATENTS}")
    by_name.pop(UNCLASSIFIED, None)
    return _levels(path, Counts(CATEGORY, models, by_name, totals), categories)


def _models(path: Path, header: list[str]) -> list[str]:
    """The models that the first line names. A first line of counts is a file without header, and not read as one."""
    models = header[1:]
    numbers = [model for model in models if model.replace(".", "").isdecimal()]
    if not header or header[0].lower() != CATEGORY or len(set(models)) < max(len(models), 2) or "" in models or numbers:
        raise BadInput(
            f"counts ({path}): the first line is {','.join(header)!r}. It must be category,<model>,<model>... with at "
            "least two different models, by names that are no numbers."
        )
    return models


def _levels(path: Path, counts: Counts, categories: list[Category]) -> list[Counts]:
    """The counts of a file as what their names are; of all categories of the taxonomy, their classes come first.

    A category without a row is one that was looked at too, so that it counts as a test, but its number is unknown, and
    with it that of its class. Names of which none is known are those of another taxonomy.
    """
    names, groups = {category.name for category in categories}, {category.group for category in categories}
    given = set(counts.by_name)
    if given <= groups:
        return [replace(counts, level=CLASS, num_tests=len(groups))]
    if not given <= names:
        _check_foreign(path, list(counts.by_name), names, groups)
        return [counts]
    counts = replace(counts, num_tests=len(names))
    return [classes_of(counts, categories), counts] if given == names else [counts]


def _check_foreign(path: Path, given: list[str], names: set[str], groups: set[str]) -> None:
    """BadInput where the taxonomy has some of the names: the others are slips, which would be missing in the tests."""
    known = [name for name in given if name in names | groups]
    unknown = [name for name in given if name not in names | groups]
    if known and unknown:
        raise BadInput(
            f"counts ({path}): {unknown[0]!r} is not in the taxonomy, which has {known[0]!r}."
            f"{did_you_mean(unknown[0], names | groups)} Correct it, or name the file's own taxonomy: taxonomy=FILE."
        )
    if known:
        one, other = (next(name for name in given if name in some) for some in (groups, names - groups))
        raise BadInput(
            f"counts ({path}): {one!r} is a class and {other!r} a category, and a latent is in one of each. Give a "
            "file of classes or one of categories."
        )


def _count(cell: str, where: str, name: str) -> int:
    if not cell.isdecimal():
        raise BadInput(f"{where}: {cell!r} in row {name!r} is not a count. Write whole numbers of latents, not shares.")
    if len(cell.lstrip("0")) > len(str(MAX_LATENTS)):
        raise BadInput(f"{where}: {cell[:20]} latents in row {name!r} are more than {MAX_LATENTS}. {COUNT_LATENTS}")
    return int(cell)
