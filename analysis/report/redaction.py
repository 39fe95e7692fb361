"""A report for sharing: what quotes documents is withheld.

"documents" withholds the text of documents, all words of the offline annotator (they are words of documents), and of
what a language model or a person wrote the passages that quote, as `quotations` finds them in documents of the latent.
A shorter run, a name say, may remain: "all" withholds every free text and leaves numbers, owners, categories of the
taxonomy and outcomes. Who labelled a latent is withheld by both.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from analysis.annotate.annotations import ANNOTATOR
from analysis.human import HumanLabel
from analysis.report.cards import Card
from analysis.report.quotations import Quotable, quotable, without_quotes

FREE_TEXTS = ("label", "pattern", "description", "reason")


def redacted(cards: list[Card], level: str, database: sqlite3.Connection, categories: Collection[str]) -> list[Card]:
    """The cards as `level` (a value of `analysis.report.redact`) allows them to be shared; `categories` are known."""
    if level == "none":
        return cards
    known = [replace(card, human=card.human and _of_taxonomy(card.human, categories)) for card in cards]
    if level == "all":
        return [_without_text(card) for card in known]
    return [_without_quotes(card, database) for card in known]


def _of_taxonomy(human: HumanLabel, categories: Collection[str]) -> HumanLabel:
    return replace(human, who="", category=human.category if human.category in categories else "")


def _without_text(card: Card) -> Card:
    human = card.human and replace(card.human, label="", note="")
    texts: dict[str, Any] = dict.fromkeys(FREE_TEXTS, "")
    return replace(card, **texts, documents=[], human=human)


def _without_quotes(card: Card, database: sqlite3.Connection) -> Card:
    if card.annotator == ANNOTATOR and not card.human:
        return _without_text(card)
    documents = quotable(texts_of(database, card.latent))
    texts: dict[str, Any] = {name: _said(card, name, documents) for name in FREE_TEXTS}
    human = card.human and replace(
        card.human,
        label=without_quotes(card.human.label, documents),
        note=without_quotes(card.human.note, documents),
    )
    return replace(card, **texts, documents=[], human=human)


def _said(card: Card, name: str, documents: Quotable) -> str:
    """A text of the annotator's; all words of the offline one are of documents."""
    return "" if card.annotator == ANNOTATOR else without_quotes(getattr(card, name), documents)


def texts_of(database: sqlite3.Connection, latent: int) -> list[str]:
    """Every stored document of a latent, as whoever described it may have read it."""
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return [
        "".join(json.loads(tokens))
        for table in ("examples", "samples")
        if table in tables
        for (tokens,) in database.execute(
            f"SELECT text_tokens FROM {table} JOIN documents USING (document) WHERE latent = ?", (latent,)
        )
    ]
