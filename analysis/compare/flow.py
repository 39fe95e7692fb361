"""The way of the latents, selected -> annotated -> categorised, with what was lost at each step and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import pyarrow.parquet as pq

from analysis.annotate.annotations import DESCRIBED, read_annotations
from analysis.compare.selected import BY_PEOPLE, MISSING, Selected, read_selected
from analysis.latents.columns import models_of, owners_in_order
from analysis.tables import Table, percent
from analysis.taxonomy.categories import OTHER, PLACED, Category

STAGES = (SELECTED, ANNOTATED, CATEGORISED) = ("selected", "annotated", "categorised")
# Outcomes that keep a latent; any other is a loss. `other` is placed, and counts in the totals alone.
KEPT = (SELECTED, DESCRIBED, PLACED, OTHER, BY_PEOPLE)


@dataclass(frozen=True)
class FlowRow:
    """How many of one owner's latents had that outcome at that stage, by their primary votes.

    The rows of a stage sum to what the stage before kept; people can place latents that were not described.
    """

    pair: str
    model: str
    stage: str
    outcome: str
    count: int


def flow_of(folder: Path, categories: list[Category], human_labels: bool = False) -> list[FlowRow]:
    """The flow of every owner of an analysis folder: each model, base first, then sets of several."""
    models = models_of(folder)
    owners = pq.read_table(folder / "latents.parquet", columns=["owner"])["owner"].unique().to_pylist()
    described = {annotation.latent: annotation.outcome for annotation in read_annotations(folder)}
    return [
        row
        for owner in dict.fromkeys([*models, *owners_in_order(owners, models)])
        for row in _of_owner(folder.name, owner, read_selected(folder, owner, categories, human_labels), described)
    ]


def _of_owner(pair: str, owner: str, selected: list[Selected], described: dict[int, str]) -> list[FlowRow]:
    outcome_of = {row.latent: described.get(row.latent, MISSING) for row in selected}
    reached = [row for row in selected if outcome_of[row.latent] == DESCRIBED or row.outcome == BY_PEOPLE]
    placed = [OTHER if row.outcome == PLACED and row.votes[0] == OTHER else row.outcome for row in reached]
    stages = {
        SELECTED: Counter({SELECTED: len(selected)}),
        ANNOTATED: Counter(outcome_of.values()),
        CATEGORISED: Counter(placed),
    }
    return [
        FlowRow(pair, owner, stage, outcome, count)
        for stage, counter in stages.items()
        for outcome, count in counter.most_common()
    ]


def flow_table(rows: list[FlowRow]) -> Table:
    """One raw row for each outcome, one printed row for each owner of each pair."""
    groups = list(dict.fromkeys((row.pair, row.model) for row in rows))
    return Table(
        name="flow",
        caption="Latents of each model from selection to category; `other` is placed and counts in the totals alone.",
        columns=[field.name for field in fields(FlowRow)],
        raw=[list(astuple(row)) for row in rows],
        heading=["pair", "latents of", SELECTED, DESCRIBED, CATEGORISED, "of these other", "lost"],
        printed=[_printed(group, [row for row in rows if (row.pair, row.model) == group]) for group in groups],
    )


def _printed(group: tuple[str, str], rows: list[FlowRow]) -> list[str]:
    count = {(row.stage, row.outcome): row.count for row in rows}
    selected, described = count.get((SELECTED, SELECTED), 0), count.get((ANNOTATED, DESCRIBED), 0)
    placed = sum(count.get((CATEGORISED, outcome), 0) for outcome in (PLACED, OTHER, BY_PEOPLE))
    other = count.get((CATEGORISED, OTHER), 0)
    losses = Counter[str]()
    for row in rows:
        if row.outcome not in KEPT:
            losses[row.outcome] += row.count
    lost = ", ".join(f"{number} {outcome}" for outcome, number in losses.most_common()) or "none"
    share = f" ({percent(placed / selected, 0)})" if selected else ""
    return [*group, f"{selected}", f"{described}", f"{placed}{share}", f"{other}", lost]
