"""An external leaderboard: Elo of models by category, read from a CSV and validated.

    category,model,elo[,elo_low,elo_high][,style_control][,taxonomy]
    coding,simpo,1251,1243,1259,no,Code Generation & Analysis

`style_control` says whether style was controlled for (yes, no; empty is no): a category can have both. `taxonomy` names
the category or class of the taxonomy that a leaderboard category is set beside; the setting
`analysis.compare.leaderboard_map` {category: name} goes before it, and equal names need neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from analysis.csv_files import Line, read_csv
from analysis.spelling import did_you_mean
from extract.errors import BadInput

NEEDED, OPTIONAL = ("category", "model", "elo"), ("elo_low", "elo_high", "style_control", "taxonomy")
YES_NO = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False, "": False}


@dataclass(frozen=True)
class Elo:
    """One rating with the ends of its interval, NaN where the leaderboard gives none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Leaderboard:
    """`ratings` by (category, style control) and model; `name_of` a category is its name in the taxonomy."""

    path: Path
    ratings: dict[tuple[str, bool], dict[str, Elo]]
    name_of: dict[str, str]

    @property
    def models(self) -> list[str]:
        """Every model with a rating."""
        return list(dict.fromkeys(model for rated in self.ratings.values() for model in rated))

    @property
    def categories(self) -> list[str]:
        """The leaderboard's categories in its order."""
        return list(dict.fromkeys(category for category, _ in self.ratings))


def read_leaderboard(path: Path, mapping: dict[str, str], names: list[str]) -> Leaderboard:
    """The CSV at `path`; `names` are the categories and classes that its categories can stand beside."""
    ratings: dict[tuple[str, bool], dict[str, Elo]] = {}
    name_of: dict[str, str] = {}
    for number, row in _rows(path):
        where = f"leaderboard ({path}), line {number}"
        category, model = row["category"], row["model"]
        style = row.get("style_control", "").lower()
        if not category or not model or style not in YES_NO:
            raise BadInput(f"{where}: category and model must be named, and style_control ({style}) be yes or no.")
        rated = ratings.setdefault((category, YES_NO[style]), {})
        if model in rated:
            raise BadInput(f"{where}: {model} has a second rating in {category!r} of the same style_control. Keep one.")
        rated[model] = _elo(row, where)
        taxonomy = row.get("taxonomy") or name_of.get(category, "")
        if taxonomy and name_of.setdefault(category, taxonomy) != taxonomy:
            raise BadInput(f"{where}: {category!r} is {name_of[category]!r} above and {taxonomy!r} here. Name one.")
    if not ratings:
        raise BadInput(f"leaderboard ({path}) has no ratings. Write a line for each category and model.")
    board = Leaderboard(path, ratings, name_of | mapping)
    return Leaderboard(path, ratings, _checked_names(board, mapping, names))


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows by the names of the first line, each with its line number; missing cells at its end are empty."""
    (_, header), *lines = read_csv(path, "leaderboard", f"Give a CSV: {','.join(NEEDED + OPTIONAL)}.") or [Line(1, [])]
    unknown = [name for name in header if name not in NEEDED + OPTIONAL]
    if unknown or not set(NEEDED) <= set(header) or len(set(header)) < len(header):
        raise BadInput(
            f"leaderboard ({path}): the first line is {','.join(header) or 'empty'}. It must name {', '.join(NEEDED)} "
            f"and may name {', '.join(OPTIONAL)}, each once."
        )
    for number, cells in lines:
        if len(cells) > len(header):
            raise BadInput(f"leaderboard ({path}), line {number} has more than {len(header)} cells. Quote its commas.")
    return [(number, dict(zip_longest(header, cells, fillvalue=""))) for number, cells in lines]


def _elo(row: dict[str, str], where: str) -> Elo:
    try:
        elo, low, high = (float(row.get(name) or "nan") for name in ("elo", "elo_low", "elo_high"))
    except ValueError as error:
        raise BadInput(f"{where}: {error}. Write ratings as numbers.") from error
    if not math.isfinite(elo):
        raise BadInput(f"{where}: elo ({row['elo']}) must be a number.")
    if math.isnan(low) != math.isnan(high) or math.isinf(low) or math.isinf(high) or low > elo or high < elo:
        raise BadInput(f"{where}: elo_low ({low:g}) and elo_high ({high:g}) must enclose elo ({elo:g}), or be empty.")
    return Elo(elo, low, high)


def _checked_names(board: Leaderboard, mapping: dict[str, str], names: list[str]) -> dict[str, str]:
    """The taxonomy's name of every category that has one. BadInput for names that do not exist."""
    for category in mapping:
        if category not in board.categories:
            raise BadInput(
                f"leaderboard_map.{category}: {board.path} has no such category. It has {', '.join(board.categories)}."
            )
    for category, name in board.name_of.items():
        if name not in names:
            hint = did_you_mean(name, names, " Name a category or class of it.")
            raise BadInput(
                f"leaderboard ({board.path}): {category!r} is set beside {name!r}, which the taxonomy lacks.{hint}"
            )
    same = {name.casefold(): name for name in names}
    equal = {c: same[c.casefold()] for c in board.categories if c.casefold() in same}
    return equal | board.name_of
