"""Tables of other steps that the page shows as they are, where they exist, such as rules and nulls.

A file that is absent is a section less. Numbers are printed to three digits; the file holds them whole.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.tables import Table, number

WHOLE = re.compile(r"-?\d+")
# Of an analysis folder: file -> (heading in the page, what it says).
OF_PAIR = {
    "rules.csv": (
        "How many latents each rule selects",
        "Latents that each rule and threshold would give to a model. The rule of this report is in Methods.",
    ),
    "nulls.csv": (
        "What ν is without a difference",
        "ν of random directions of the same norm, with which the other model has nothing to do (near 0), and of "
        "latents that Δ-norm calls shared (near 1): thresholds are good where the first pass and the second do not.",
    ),
}


@dataclass(frozen=True)
class SideTable:
    """A table of another step under its `heading`; `source` is its file, relative to the page."""

    heading: str
    source: str
    table: Table


def of_pair(folder: Path) -> list[SideTable]:
    """Those tables of OF_PAIR that an analysis folder has."""
    found = []
    for name, (heading, caption) in OF_PAIR.items():
        if (folder / name).is_file():
            table = read_table(folder / name, caption)
            shown = side_by_side(table, "owner", "count") if "owner" in table.columns else table
            found.append(SideTable(heading, f"../analysis/{folder.name}/{name}", shown))
    return found


def side_by_side(table: Table, name: str, value: str) -> Table:
    """The values of the rows that differ in column `name` alone, printed in one row with a column for each name."""
    at, of = table.columns.index(name), table.columns.index(value)
    kept = [index for index in range(len(table.columns)) if index not in (at, of)]
    names = list(dict.fromkeys(str(row[at]) for row in table.raw))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for row in table.raw:
        rows.setdefault(tuple(str(row[index]) for index in kept), {})[str(row[at])] = cell(str(row[of]))
    heading = [*(table.columns[index].replace("_", " ") for index in kept), *names]
    printed = [[*map(plain, key), *(found.get(each, "") for each in names)] for key, found in rows.items()]
    return replace(table, heading=heading, printed=printed)


def plain(text: str) -> str:
    """A threshold as it is written, a rule's name with blanks."""
    return text.replace("_", " ").replace("-", "−")


def read_table(path: Path, caption: str) -> Table:
    """A CSV file with one line of names; a column without any value is left out of what is printed."""
    with path.open(encoding="utf-8", newline="") as file:
        columns, *rows = list(csv.reader(file)) or [[]]
    filled = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    return Table(
        name=path.stem,
        caption=caption,
        columns=columns,
        raw=[list(row) for row in rows],
        heading=[columns[index].replace("_", " ") for index in filled],
        printed=[[cell(row[index]) for index in filled] for row in rows],
    )


def cell(text: str) -> str:
    """A value in print: whole numbers with commas, other numbers to three digits, text as it is."""
    if WHOLE.fullmatch(text):
        return f"{int(text):,}".replace("-", "−")
    try:
        value = float(text)
    except ValueError:
        return text or "–"
    return number(value, 3) if math.isfinite(value) else "∞" if value == math.inf else "–"
