"""`categories.csv`: which category every vote puts a latent into; `classes.csv`: how many of each class there are."""

import csv
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from analysis.annotate.annotations import Annotation
from analysis.csv_files import csv_bytes
from analysis.damage import readable
from extract.publish import publish

CATEGORIES, CLASSES = "categories.csv", "classes.csv"
OTHER = "other"
PLACED, NOT_DESCRIBED = "placed", "not described"
COLUMNS = ["latent", "owner", "vote", "outcome", "category", "class", "similarity", "annotator", "repeat", "reason"]


@dataclass(frozen=True)
class Category:
    """One category of a taxonomy."""

    name: str
    group: str
    description: str


@dataclass(frozen=True)
class Placed:
    """One line of `categories.csv`. `annotator` names who described the latent and what found its category.

    `category` and `group` are empty unless `outcome` is "placed" (`other` is a place too); the other outcomes are
    "not described", refused, truncated, invalid and failed. `similarity` is NaN where a language model chose.
    """

    latent: int
    owner: str
    category: str
    group: str
    similarity: float
    annotator: str
    vote: int = 0
    outcome: str = PLACED
    repeat: int = 0
    reason: str = ""


def not_described(annotation: Annotation) -> Placed:
    """The line of a vote that has no description."""
    named = (annotation.latent, annotation.owner, "", "", math.nan, annotation.annotator, annotation.vote)
    return Placed(*named, NOT_DESCRIBED, annotation.repeat, annotation.outcome)


def write_categories(folder: Path, placed: list[Placed], groups: list[str]) -> None:
    """Publishes `categories.csv`, and `classes.csv` of placed primary votes: a row for each of `groups`."""
    publish(folder / CATEGORIES, csv_bytes([COLUMNS, *map(_cells, placed)]))
    primary = [row for row in placed if row.vote == 0 and row.outcome == PLACED]
    counts, owners = Counter((row.owner, row.group) for row in primary), Counter(row.owner for row in primary)
    publish(
        folder / CLASSES,
        csv_bytes(
            [
                ("owner", "class", "count", "total", "annotator"),
                *(
                    (owner, group, counts[owner, group], owners[owner], primary[0].annotator)
                    for owner in owners
                    for group in groups
                ),
            ]
        ),
    )


def read_categories(folder: Path, votes: bool = False) -> list[Placed]:
    """The lines of `categories.csv`: primary votes that are placed; all lines if `votes`."""
    path, placed = folder / CATEGORIES, []
    with readable(path), path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            with readable(path, reader.line_num):
                placed.append(_placed(row))
    return [row for row in placed if votes or (row.vote == 0 and row.outcome == PLACED)]


def _cells(row: Placed) -> list[object]:
    similarity = "" if math.isnan(row.similarity) else f"{row.similarity:.4f}"
    place = (row.outcome, row.category, row.group, similarity)
    return [row.latent, row.owner, row.vote, *place, row.annotator, row.repeat, row.reason]


def _placed(row: dict[str, str]) -> Placed:
    if None in row.values():
        raise ValueError("cells are missing")
    similarity = float(row["similarity"] or "nan")
    named = (int(row["latent"]), row["owner"], row["category"], row["class"], similarity, row["annotator"])
    # Folders of earlier versions hold one vote, always placed.
    vote, repeat = int(row.get("vote", 0)), int(row.get("repeat", 0))
    return Placed(*named, vote, row.get("outcome", PLACED), repeat, row.get("reason", ""))
