"""An external leaderboard: Elo of models by category, read from a CSV and validated.

    category,model,elo[,elo_low,elo_high][,style_control][,taxonomy]
    coding,simpo,1251,1243,1259,no,Code Generation & Analysis

`style_control` says whether style was controlled for (yes, no; empty is no): a category can have both. `taxonomy` names
the category or class of the taxonomy that a leaderboard category is set beside; the setting
`analysis.compare.leaderboard_map` {category: name} goes before it, and equal names need neither.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
from dataclasses import dataclass
from pathlib import Path

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
    for number, row in enumerate(_rows(path), 2):
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


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise BadInput(f"leaderboard ({path}) is not a file. Give a CSV: {','.join(NEEDED + OPTIONAL)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"leaderboard ({path}) is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    reader = csv.DictReader(io.StringIO(text), restval="")
    header = [name.strip() for name in reader.fieldnames or []]
    unknown = [name for name in header if name not in NEEDED + OPTIONAL]
    if unknown or not set(NEEDED) <= set(header) or len(set(header)) < len(header):
        raise BadInput(
            f"leaderboard ({path}): the first line is {','.join(header) or 'empty'}. It must name {', '.join(NEEDED)} "
            f"and may name {', '.join(OPTIONAL)}, each once."
        )
    reader.fieldnames = header
    rows = list(reader)
    for number, row in enumerate(rows, 2):
        if None in row:
            raise BadInput(f"leaderboard ({path}), line {number} has more than {len(header)} cells. Quote its commas.")
    return [{name: cell.strip() for name, cell in row.items()} for row in rows if any(row.values())]


def _elo(row: dict[str, str], where: str) -> Elo:
    try:
        elo, low, high = (float(row.get(name) or "nan") for name in ("elo", "elo_low", "elo_high"))
    except ValueError as error:
        raise BadInput(f"{where}: {error}. Write ratings as numbers.") from error
    if not math.isfinite(elo):
        raise BadInput(f"{where}: elo ({row['elo']}) must be a number.")
    if math.isnan(low) != math.isnan(high) or low > elo or high < elo:
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
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Name a category or class of it."
            raise BadInput(
                f"leaderboard ({board.path}): {category!r} is set beside {name!r}, which the taxonomy lacks. {hint}"
            )
    same = {name.casefold(): name for name in names}
    equal = {c: same[c.casefold()] for c in board.categories if c.casefold() in same}
    return equal | board.name_of
