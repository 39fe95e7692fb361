"""Tables of other steps that the page shows as they are, where they exist, such as rules and nulls.

A file that is absent is a section less. Numbers are printed to three digits; the file holds them whole.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.report.optional_files import read_optional
from analysis.tables import Table, number, percent, write_table

WHOLE = re.compile(r"-?\d+")
# Of an analysis folder: file -> (heading in the page, what it says).
OF_PAIR = {
    "rules.csv": (
        "How many latents each rule selects",
        "Latents that each rule and threshold would give to a model. Configured: the rule of this report, which has a "
        "threshold of ν reconstruction of its own for dedicated latents and asks these for no Δ-norm, while the others "
        "ask the same of all latents.",
    ),
    "nulls.csv": (
        "What ν is without a difference",
        "ν of random directions of the same norm, with which the other model has nothing to do (near 0), and of "
        "latents that Δ-norm calls shared (near 1): thresholds tell them apart where most of the first are below them "
        "and few of the second. Quantiles of ν over the latents that were measured; below it: the share of them with "
        "|ν| below the threshold; both below: with both ν below theirs; dedicated: by the thresholds of dedicated "
        "latents.",
    ),
}

# Names of columns and values in print.
SPOKEN = {
    "random_direction": "random directions",
    "delta_norm": "Δ-norm",
    "nu": "ν",
    "nu_error": "ν error",
    "nu_reconstruction": "ν reconstruction",
    "delta_norm_and_nu": "Δ-norm and ν",
    "configured_dedicated": "configured, dedicated latents",
    "delta_norm_low": "Δ-norm below",
    "delta_norm_high": "or above",
    "max_nu_error": "|ν error| below",
    "max_nu_reconstruction": "|ν reconstruction| below",
    "q05": "quantile 5 %",
    "q25": "25 %",
    "q50": "50 %",
    "q75": "75 %",
    "q95": "95 %",
    "share_passing": "below it",
    "share_passing_both": "both below",
    "threshold_dedicated": "dedicated: threshold",
    "share_passing_dedicated": "below it",
    "share_passing_both_dedicated": "both below",
    "count": "latents",
    "num_latents": "latents",
    "krippendorff_alpha": "Krippendorff’s α",
    "cohen_kappa": "Cohen’s κ",
}


@dataclass(frozen=True)
class SideTable:
    """A table of another step under its `heading`; `source` is its file, relative to the page."""

    heading: str
    source: str
    table: Table


def of_pair(folder: Path, target: Path) -> list[SideTable]:
    """Those tables of OF_PAIR that an analysis folder has, published in the folder `target` as CSV and LaTeX."""
    found = []
    for name, (heading, caption) in OF_PAIR.items():
        if (folder / name).is_file():
            table = read_table(folder / name, caption)
            shown = side_by_side(table, "owner", "count") if "owner" in table.columns else table
            write_table(replace(shown, name=f"{table.name}_{folder.name}"), target)
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
    heading = [*(spoken(table.columns[index]) for index in kept), *names]
    printed = [
        [*(SPOKEN.get(text, text) for text in key), *(found.get(each, "") for each in names)]
        for key, found in rows.items()
    ]
    return replace(table, heading=heading, printed=printed)


def spoken(name: str) -> str:
    """A column's name in print."""
    return SPOKEN.get(name, name.replace("_", " "))


def read_table(path: Path, caption: str) -> Table:
    """A CSV file with one line of names; a column without any value is left out of what is printed."""
    columns, records = read_optional(path)
    rows = [[record[name] for name in columns] for record in records]
    filled = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    kinds = {index: _kind(columns[index], [row[index] for row in rows]) for index in filled}
    return Table(
        name=path.stem,
        caption=caption,
        columns=columns,
        raw=[list(row) for row in rows],
        heading=[spoken(columns[index]) for index in filled],
        printed=[[cell(row[index], kinds[index]) for index in filled] for row in rows],
    )


def _kind(name: str, texts: list[str]) -> str:
    """How a column is printed: shares as percent; where one number is not whole, all of them with three digits."""
    if name.startswith("share_"):
        return "share"
    return "whole" if all(WHOLE.fullmatch(text) for text in texts if _is_number(text)) else "measure"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def cell(text: str, kind: str = "whole") -> str:
    """A value in print: counts with commas, measures to three digits, shares in percent, text as it is."""
    try:
        value = float(text)
    except ValueError:
        return SPOKEN.get(text, text) or "–"
    if not math.isfinite(value):
        return "∞" if value == math.inf else "–"
    if kind == "share":
        return percent(value)
    return f"{int(text):,}".replace("-", "−") if kind == "whole" and WHOLE.fullmatch(text) else number(value, 3)
