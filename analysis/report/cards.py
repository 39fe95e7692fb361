"""What the report shows of single latents: their numbers, label, category, and top documents."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.annotate.annotations import DESCRIBED, Annotation, read_annotations
from analysis.compare.selected import BY_PEOPLE
from analysis.config import NOT_MODELS, OwnerConfig, ReportConfig
from analysis.examples.database import reading
from analysis.examples.excerpts import Shown, shown_of
from analysis.human import HumanLabel, read_labels
from analysis.latents.certainty import UNKNOWN, certainty_of
from analysis.latents.columns import delta_norm_of, members_of, models_of, nu_column, nu_of, owners_in_order
from analysis.report.optional_files import read_optional
from analysis.taxonomy.categories import PLACED, Placed, read_categories

Row = dict[str, Any]
# What is read of all latents, owned or not; a histogram of each would be most of the memory.
HISTOGRAM, SHARE = "histogram", "share_"
SCORES = "scores.csv"


@dataclass(frozen=True)
class Score:
    """How well a description foretells where the latent fires: balanced accuracy with its interval."""

    kind: str
    balanced_accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Histogram:
    """Activations in bins that double: `counts` from the first bin to the last that is not empty, from `lowest` on."""

    lowest: float
    counts: list[int]


@dataclass(frozen=True)
class Card:
    """One model-specific latent.

    `anchor` is its id in the page. `outcome` says what became of its description; `category` and `group` (its class)
    are empty if it has none. `shares` are parts of its firing tokens: of templates, of a role, of a source. `twins` are
    its near-duplicates. `num_documents` is in how many it fires, None if that was not counted. `certainty` says whether
    a threshold of nu lies within an interval.
    """

    anchor: str
    pair: str
    latent: int
    owner: str
    outcome: str
    label: str
    pattern: str
    description: str
    confidence: str
    reason: str
    annotator: str
    category: str
    group: str
    similarity: float | None
    delta_norm: float
    nu_error: float
    nu_reconstruction: float
    nu_error_range: tuple[float, float] | None
    nu_reconstruction_range: tuple[float, float] | None
    frequency: float
    num_documents: int | None
    max_activation: float
    dedicated: bool
    histogram: Histogram | None
    shares: dict[str, float]
    twins: list[int]
    scores: list[Score]
    human: HumanLabel | None
    documents: list[Shown]
    certainty: str = UNKNOWN


def anchor_of(pair: str, latent: int) -> str:
    """The id of a latent's card in the page."""
    return f"{pair}-{latent}"


def read_rows(folder: Path) -> list[Row]:
    """The rows of `latents.parquet`, without histograms."""
    names = [name for name in pq.read_schema(folder / "latents.parquet").names if name != HISTOGRAM]
    return pq.read_table(folder / "latents.parquet", columns=names).to_pylist()


def read_owned(folder: Path) -> list[Row]:
    """The rows of latents that belong to some models but not to all, whole."""
    table = pq.read_table(folder / "latents.parquet")
    return table.filter(pc.invert(pc.is_in(table["owner"], pa.array(NOT_MODELS)))).to_pylist()


def cards_of(folder: Path, config: ReportConfig, always: set[int], thresholds: OwnerConfig) -> list[Card]:
    """Cards of each owner's latents: the `latents_per_model` most exclusive, and those in `always`.

    Documents are read where they may be shown; `redaction.redacted` withholds what else must be.
    """
    models, rows = models_of(folder), read_owned(folder)
    beside = _Beside.read(folder, rows)
    chosen = []
    for owner in owners_in_order((row["owner"] for row in rows), models):
        own = sorted((row for row in rows if row["owner"] == owner), key=lambda row: exclusiveness(row, models))
        chosen += [row for rank, row in enumerate(own) if rank < config.latents_per_model or row["latent"] in always]
    with reading(folder) as database:
        documents = [[] if config.redact != "none" else shown_of(database, row["latent"], config) for row in chosen]
    certain = [certainty_of(row, models, thresholds) for row in chosen]
    cards = [_card(folder.name, row, models, beside, shown) for row, shown in zip(chosen, documents, strict=True)]
    return [replace(card, certainty=said) for card, said in zip(cards, certain, strict=True)]


def exclusiveness(row: Row, models: list[str]) -> float:
    """|nu_error| + |nu_reconstruction| towards the other models: 0 for a latent that only its owner needs."""
    error, reconstruction = nu_of(row, models, row["owner"])
    return abs(error) + abs(reconstruction)


@dataclass(frozen=True)
class _Beside:
    """What other files of the folder say of latents; people's labels and scores may be missing."""

    annotations: Mapping[int, Annotation]
    placed: Mapping[int, Placed]
    human: Mapping[int, HumanLabel]
    scores: Mapping[int, list[Score]]
    groups: Mapping[tuple[str, int], list[int]]
    edges: list[float]

    @classmethod
    def read(cls, folder: Path, rows: list[Row]) -> _Beside:
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        for row in rows:
            groups[_group(row)].append(row["latent"])
        return cls(
            {record.latent: record for record in read_annotations(folder)},
            {row.latent: row for row in read_categories(folder, votes=True) if row.vote == 0},
            read_labels(folder),
            read_scores(folder),
            groups,
            json.loads((pq.read_schema(folder / "latents.parquet").metadata or {}).get(b"histogram_edges", b"[]")),
        )


def _group(row: Row) -> tuple[str, int]:
    """Latents of one owner that are near-duplicates; each for itself in an analysis that did not look for them."""
    return row["owner"], int(row["latent"] if row.get("group") is None else row["group"])


def read_scores(folder: Path) -> dict[int, list[Score]]:
    """The scores of descriptions, without the controls; none if nothing was scored."""
    found: dict[int, list[Score]] = defaultdict(list)
    for row in read_optional(folder / SCORES)[1] if (folder / SCORES).is_file() else ():
        if row["control"] in ("", "none") and row["balanced_accuracy"]:
            numbers = (float(row[name] or "nan") for name in ("balanced_accuracy", "low", "high"))
            found[int(row["latent"])].append(Score(row["kind"], *numbers))
    return found


def _card(pair: str, row: Row, models: list[str], beside: _Beside, documents: list[Shown]) -> Card:
    latent, owner = row["latent"], row["owner"]
    error, reconstruction = nu_of(row, models, owner)
    annotation, placed = beside.annotations[latent], beside.placed[latent]
    return Card(
        anchor=anchor_of(pair, latent),
        pair=pair,
        latent=latent,
        owner=owner,
        outcome=outcome_of(annotation, placed),
        label=annotation.label,
        pattern=annotation.pattern,
        description=annotation.description,
        confidence=annotation.confidence,
        reason=annotation.reason,
        annotator=annotation.annotator,
        category=placed.category,
        group=placed.group,
        similarity=placed.similarity,
        delta_norm=delta_norm_of(row, models, owner),
        nu_error=error,
        nu_reconstruction=reconstruction,
        nu_error_range=nu_range("nu_error", row, models),
        nu_reconstruction_range=nu_range("nu_reconstruction", row, models),
        frequency=row["frequency"],
        num_documents=row.get("num_documents"),
        max_activation=row["max_activation"],
        dedicated=bool(row["dedicated"]),
        histogram=histogram_of(row.get(HISTOGRAM), beside.edges),
        shares=shares_of(row),
        twins=[other for other in beside.groups[_group(row)] if other != latent],
        scores=beside.scores.get(latent, []),
        human=beside.human.get(latent),
        documents=documents,
    )


def placed_by_hand(card: Card, groups: Mapping[str, str]) -> Card:
    """The card with the category that a person gave in place of the annotator's; `groups` are classes of categories."""
    if card.human is None or not card.human.category:
        return card
    category = card.human.category
    return replace(card, category=category, group=groups.get(category, ""), similarity=None, outcome=BY_PEOPLE)


def outcome_of(annotation: Annotation, placed: Placed) -> str:
    """What became of a latent: "placed", or at which step it was lost and how."""
    if annotation.outcome != DESCRIBED:
        return f"description {annotation.outcome}"
    return PLACED if placed.outcome == PLACED else f"category {placed.outcome}"


def histogram_of(counts: list[int] | None, edges: list[float]) -> Histogram | None:
    """The bins between the outer empty ones; None without any."""
    filled = [index for index, count in enumerate(counts or []) if count]
    if counts is None or not filled:
        return None
    return Histogram(edges[filled[0]], counts[filled[0] : filled[-1] + 1])


def shares_of(row: Row) -> dict[str, float]:
    """The shares of a latent's firing tokens that are not zero, without what their columns have in common."""
    found = {name.removeprefix(SHARE): value for name, value in row.items() if name.startswith(SHARE) and value}
    return {name.replace("_", " ", 1): value for name, value in found.items()}


def nu_range(name: str, row: Row, models: list[str]) -> tuple[float, float] | None:
    """The interval of the nu that `columns.nu_of` takes; None for an analysis without intervals."""
    members = members_of(row["owner"], models)
    columns = [nu_column(name, models, member, other) for member in members for other in models if other not in members]
    worst = max(columns, key=lambda column: abs(row[column]))
    if f"{worst}_low" not in row or row[f"{worst}_low"] is None:
        return None
    return row[f"{worst}_low"], row[f"{worst}_high"]
