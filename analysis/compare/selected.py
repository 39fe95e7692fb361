"""The latents that the analysis selected as one model's own, with what every vote put them into and their duplicates.

A *vote* is one reading of a latent by one annotator; the first, or a person's where these are to count, is the primary
one, which the counts are made of. Latents of one *group* are near-duplicates of each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from analysis.compare.bootstrap import IN_NONE, LOST, Units
from analysis.human import HUMAN, read_labels
from analysis.spelling import did_you_mean
from analysis.taxonomy.categories import OTHER, Category, Placed, read_categories
from extract.errors import BadInput

# Outcomes that categories.csv does not know: a person said it, or there is no line at all.
BY_PEOPLE, MISSING = "placed by people", "missing"
# What a person is called as an annotator, before the name.
PEOPLE = "people ("


@dataclass(frozen=True)
class Selected:
    """One selected latent. `votes` are categories, "" where a vote was not placed; `outcome` is the primary vote's."""

    latent: int
    owner: str
    group: int
    votes: tuple[str, ...]
    outcome: str
    annotator: str

    @property
    def is_placed(self) -> bool:
        return bool(self.votes[0])


@dataclass(frozen=True)
class Side:
    """What is known of the latents of one compared model beside their counts. People are annotators too."""

    num_selected: int
    num_by_people: int
    annotators: frozenset[str]


def spoken(annotators: Iterable[str]) -> list[str]:
    """Annotators in print: people without their names, which serve to tell whether the same ones named both sides."""
    return sorted({"people" if name.startswith(PEOPLE) else name for name in annotators})


def read_selected(folder: Path, owner: str, categories: list[Category], human_labels: bool) -> list[Selected]:
    """The latents of an analysis folder with that owner. With `human_labels` a person's category is the only vote."""
    columns = ["latent", "owner"] + ["group"] * ("group" in pq.read_schema(folder / "latents.parquet").names)
    table = pq.read_table(folder / "latents.parquet", columns=columns, filters=[("owner", "=", owner)])
    people = _by_people(folder, categories) if human_labels else {}
    votes = _votes(folder)
    return [
        _selected(row["latent"], owner, row.get("group", row["latent"]), votes[row["latent"]], people)
        for row in table.to_pylist()
    ]


def _votes(folder: Path) -> dict[int, list[Placed]]:
    """The votes of `categories.csv` by latent, the primary one first."""
    votes: dict[int, list[Placed]] = defaultdict(list)
    for row in sorted(read_categories(folder, votes=True), key=lambda row: row.vote):
        votes[row.latent].append(row)
    return votes


def _selected(latent: int, owner: str, group: int, votes: list[Placed], people: dict[int, tuple[str, str]]) -> Selected:
    if latent in people:
        category, who = people[latent]
        return Selected(latent, owner, group, (category,), BY_PEOPLE, f"{PEOPLE}{who})")
    if not votes:
        return Selected(latent, owner, group, ("",), MISSING, "")
    categories = tuple(vote.category for vote in votes)
    return Selected(latent, owner, group, categories, votes[0].outcome, votes[0].annotator)


def _by_people(folder: Path, categories: list[Category]) -> dict[int, tuple[str, str]]:
    """Category and person of the latents that people put into one. BadInput for a category that does not exist."""
    known = [category.name for category in categories] + [OTHER]
    found = {latent: (label.category, label.who) for latent, label in read_labels(folder).items() if label.category}
    for latent, (category, _) in found.items():
        if category not in known:
            raise BadInput(
                f"{folder / HUMAN}: latent {latent} is in {category!r}, which the taxonomy does not have."
                f"{did_you_mean(category, known)} Correct it, or compare without "
                "(analysis.compare.human_labels=false)."
            )
    return found


def side_of(selected: list[Selected]) -> Side:
    """The sums over one model's latents."""
    annotators = {row.annotator for row in selected if row.is_placed}
    return Side(len(selected), sum(row.outcome == BY_PEOPLE for row in selected), frozenset(annotators))


def units_of(selected: list[Selected], number_of: dict[str, int]) -> Units:
    """The latents as they are resampled; `number_of` a category is what its name (or class) is numbered."""
    _, cluster_n = np.unique([row.group for row in selected], return_inverse=True)
    num_votes_n = np.array([len(row.votes) for row in selected], dtype=int)
    votes_nV = np.full((len(selected), max(num_votes_n, default=1)), LOST)
    for row, latent in zip(votes_nV, selected, strict=True):
        row[: len(latent.votes)] = [number_of.get(vote, IN_NONE) if vote else LOST for vote in latent.votes]
    return Units(cluster_n, votes_nV, num_votes_n)
