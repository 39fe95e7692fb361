"""A report for sharing: what quotes documents is withheld.

"documents" withholds the text of documents, all words of the offline annotator (they are words of documents), and of
what a language model or a person wrote the passages that quote: those between quotation marks, and every run of
RUN or more words that also stands in a document of the latent. A shorter run, a name say, may remain: "all" withholds
every free text and leaves numbers, owners, categories and outcomes.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from analysis.annotations import ANNOTATOR
from analysis.cards import Card

WITHHELD = "[…]"
RUN = 4
FREE_TEXTS = ("label", "pattern", "description", "reason")
QUOTED = re.compile(r"“[^”]*”|\"[^\"]*\"|«[^»]*»|„[^“”]*[“”]|`[^`]*`|‘[^’]*’(?!\w)|(?<!\w)'[^']*'(?!\w)")
WORD = re.compile(r"\w+(?:['’]\w+)*")

Runs = set[tuple[str, ...]]


def redacted(cards: list[Card], level: str, database: sqlite3.Connection) -> list[Card]:
    """The cards as `level` (a value of `analysis.report.redact`) allows them to be shared."""
    if level == "none":
        return cards
    if level == "all":
        return [_without_text(card) for card in cards]
    return [_without_quotes(card, database) for card in cards]


def _without_text(card: Card) -> Card:
    human = replace(card.human, label="", note="", who="") if card.human else None
    texts: dict[str, Any] = dict.fromkeys(FREE_TEXTS, "")
    return replace(card, **texts, documents=[], human=human)


def _without_quotes(card: Card, database: sqlite3.Connection) -> Card:
    if card.annotator == ANNOTATOR and not card.human:
        return _without_text(card)
    runs = runs_of(texts_of(database, card.latent))
    is_offline = card.annotator == ANNOTATOR
    texts: dict[str, Any] = {
        name: "" if is_offline else without_quotes(getattr(card, name), runs) for name in FREE_TEXTS
    }
    human = card.human and replace(
        card.human, label=without_quotes(card.human.label, runs), note=without_quotes(card.human.note, runs)
    )
    return replace(card, **texts, documents=[], human=human)


def without_quotes(text: str, runs: Runs) -> str:
    """`text` with WITHHELD in place of passages in quotation marks and of runs of RUN words in `runs`."""
    text = QUOTED.sub(WITHHELD, text)
    words = list(WORD.finditer(text))
    found = [word.group().lower() for word in words]
    hidden = {
        index
        for start in range(len(words) - RUN + 1)
        if tuple(found[start : start + RUN]) in runs
        for index in range(start, start + RUN)
    }
    parts, end = [], 0
    for index in sorted(hidden):
        first, last = index - 1 not in hidden, index + 1 not in hidden
        parts += [text[end : words[index].start()], WITHHELD] if first else []
        end = words[index].end() if last else end
    return "".join([*parts, text[end:]])


def runs_of(texts: Iterable[str]) -> Runs:
    """All runs of RUN words of the texts, in lower case."""
    runs: Runs = set()
    for text in texts:
        words = [word.lower() for word in WORD.findall(text)]
        runs |= {tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)}
    return runs


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
