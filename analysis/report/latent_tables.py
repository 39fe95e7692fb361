"""The tables of latents: how many belong to whom, those on cards, and where there are none the nearest ones."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from analysis.report.cards import Card
from analysis.report.pairs import Pair
from analysis.tables import Table, Value, number, percent


def owner_table(pairs: list[Pair]) -> Table:
    """Latents by owner, one row for each owner in each pair, and how many of them are certain by nu's intervals."""
    rows = [
        (pair.name, owner, count, pair.num_latents, pair.certainty.get(owner))
        for pair in pairs
        for owner, count in pair.owners.items()
    ]
    names = ("certain", "crosses", "unknown", "within_reach")
    return Table(
        name="owners",
        caption="Latents of each crosscoder by owner; certain: both ν's whole intervals lie within the thresholds; "
        "crosses: a threshold lies within an interval; unknown: without an interval; within reach: candidates by "
        "decoder norms that are not the model's own, but whose intervals reach within the thresholds.",
        columns=["pair", "owner", "count", "total", *names],
        raw=[
            [pair, owner, count, total, *(getattr(sure, name, None) for name in names)]
            for pair, owner, count, total, sure in rows
        ],
        heading=["pair", "owner", "latents", "share", "certain", "crosses", "unknown", "within reach"],
        printed=[
            [pair, owner, f"{count:,}", percent(count / total)]
            + [f"{getattr(sure, name):,}" if sure else "" for name in names]
            for pair, owner, count, total, sure in rows
        ],
    )


# Columns of latents.csv, and what they hold.
PLAIN = ["pair", "latent", "owner", "outcome", "label", "pattern", "description", "confidence", "reason", "annotator"]
NUMBERS = ["delta_norm", "nu_error", "nu_reconstruction", "frequency", "num_documents", "max_activation", "dedicated"]
COLUMNS: dict[str, Callable[[Card], Value]] = {
    **{name: attrgetter(name) for name in PLAIN},
    "category": attrgetter("category"),
    "class": attrgetter("group"),
    **{name: attrgetter(name) for name in ("similarity", *NUMBERS, "certainty")},
    "nu_error_low": lambda card: card.nu_error_range and card.nu_error_range[0],
    "nu_error_high": lambda card: card.nu_error_range and card.nu_error_range[1],
    "nu_reconstruction_low": lambda card: card.nu_reconstruction_range and card.nu_reconstruction_range[0],
    "nu_reconstruction_high": lambda card: card.nu_reconstruction_range and card.nu_reconstruction_range[1],
    "near_duplicates": lambda card: " ".join(map(str, card.twins)),
    "label_by_hand": lambda card: card.human.label if card.human else None,
    "category_by_hand": lambda card: card.human.category if card.human else None,
}


def latent_table(pairs: list[Pair]) -> Table:
    """The model-specific latents that were chosen for cards."""
    cards = [card for pair in pairs for card in pair.cards]
    annotators = "; ".join(sorted({card.annotator for card in cards})) or "none"
    return Table(
        name="latents",
        caption=f"Model-specific latents; labels and categories by the annotator {annotators}.",
        columns=list(COLUMNS),
        raw=[[value(card) for value in COLUMNS.values()] for card in cards],
        heading=["label", "pair", "latent", "model", "category", "Δ-norm", "ν error", "ν reconstruction"],
        printed=[
            [card.label or f"({card.outcome})", card.pair, str(card.latent), card.owner, card.category]
            + [number(value) for value in (card.delta_norm, card.nu_error, card.nu_reconstruction)]
            for card in cards
        ],
    )


def nearest_table(pairs: list[Pair]) -> Table:
    """The latents that come closest to being a model's own, of the models that have none."""
    found = [(pair.name, near) for pair in pairs for nearest in pair.nearest.values() for near in nearest]
    columns = ["focus", "latent", "delta_norm", "nu_error", "nu_reconstruction", "obstacle"]
    return Table(
        name="nearest",
        caption="Latents that come closest to being the own latents of models that have none, and what keeps them from "
        "it.",
        columns=["pair", *columns],
        raw=[[pair, *(getattr(near, column) for column in columns)] for pair, near in found],
        heading=["pair", "model", "latent", "Δ-norm", "ν error", "ν reconstruction", "obstacle"],
        printed=[
            [pair, near.focus, str(near.latent)]
            + [number(value, 3) for value in (near.delta_norm, near.nu_error, near.nu_reconstruction)]
            + [near.obstacle]
            for pair, near in found
        ],
    )
