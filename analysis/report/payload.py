"""The cards as the page carries them: JSON that is inert in HTML, cut to a number of bytes.

Documents are anybody's text. In the page they are data of a script that never runs (type application/json), without a
character that could end it, and the page's own script shows them as text only.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from analysis.examples.excerpts import Shown, Span
from analysis.report.cards import Card

# What could end a script or start a comment, and halves of surrogate pairs, which no UTF-8 can hold.
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Payload:
    """`text` is the JSON of the page; how many cards it lacks, and how many have fewer documents than are stored."""

    text: str
    num_cards: int
    num_left_out: int
    num_shortened: int


def payload_of(cards: list[Card], first: set[str], colour_of: Callable[[str], str], budget: int) -> Payload:
    """The cards within `budget` bytes.

    Those in `first` (anchors) and the most exclusive of every owner come first: all cards that fit, then a first
    document for each, a second one, and so on, so what is missing is missing on the least exclusive cards.
    """
    owners = list(dict.fromkeys((card.owner, card.pair) for card in cards))
    header = [{"owner": owner, "pair": pair, "rgb": colour_of(owner)} for owner, pair in owners]
    known = [{"of": owners.index((card.owner, card.pair)), **packed(card)} for card in cards]
    columns = [*(known[0] if known else ()), "documents"]
    kept, left = _kept([list(row.values()) for row in known], _by_priority(cards, first), budget - _size(header) - 1000)
    documents = _within(left, {index: list(map(packed_document, cards[index].documents)) for index in kept})
    shortened = sum(len(documents[index]) < len(cards[index].documents) for index in kept)
    whole = [[*known[index].values(), documents[index]] for index in sorted(kept)]
    text = safe_json({"owners": header, "columns": columns, "cards": whole})
    return Payload(text, len(kept), len(cards) - len(kept), shortened)


def _kept(rows: list[list[Any]], order: list[int], budget: int) -> tuple[list[int], int]:
    """The first rows in that order which fit together without documents, and how many bytes are left."""
    kept = []
    for index in order:
        size = _size(rows[index]) + len(",[],")
        if size > budget:
            break
        budget -= size
        kept.append(index)
    return kept, budget


def _by_priority(cards: list[Card], first: set[str]) -> list[int]:
    """Indices of the cards, which stand by exclusiveness within an owner: named ones, then owners in turn."""
    met: Counter[tuple[str, str]] = Counter()
    keys = []
    for index, card in enumerate(cards):
        met[card.pair, card.owner] += 1
        keys.append((card.anchor not in first, met[card.pair, card.owner], index))
    return [index for *_, index in sorted(keys)]


def _within(budget: int, documents: dict[int, list[Any]]) -> dict[int, list[Any]]:
    """The first documents of each card that fit together; a round ends where one does not fit."""
    found: dict[int, list[Any]] = {index: [] for index in documents}
    for turn in range(max(map(len, documents.values()), default=0)):
        for index, stored in documents.items():
            if turn < len(stored):
                budget -= _size(stored[turn]) + 1
                if budget < 0:
                    return found
                found[index].append(stored[turn])
    return found


def packed(card: Card) -> dict[str, Any]:
    """What the page's script knows of a card, besides whose it is and its documents."""
    human = card.human and {name: getattr(card.human, name) for name in ("label", "category", "note", "who")}
    return {
        "latent": card.latent,
        "outcome": card.outcome,
        "label": card.label,
        "pattern": card.pattern,
        "description": card.description,
        "confidence": card.confidence,
        "reason": card.reason,
        "annotator": card.annotator,
        "category": card.category,
        "class": card.group,
        "similarity": short(card.similarity),
        "delta": short(card.delta_norm),
        "error": short(card.nu_error),
        "reconstruction": short(card.nu_reconstruction),
        "errorRange": card.nu_error_range and list(map(short, card.nu_error_range)),
        "reconstructionRange": card.nu_reconstruction_range and list(map(short, card.nu_reconstruction_range)),
        "frequency": short(card.frequency),
        "numDocuments": card.num_documents,
        "max": short(card.max_activation),
        "dedicated": card.dedicated,
        "certainty": card.certainty,
        "histogram": card.histogram and [short(card.histogram.lowest), card.histogram.counts],
        "shares": [[name, short(share, 2)] for name, share in card.shares.items()],
        "twins": card.twins,
        "scores": [
            [score.kind, *map(short, (score.balanced_accuracy, score.low, score.high))] for score in card.scores
        ],
        "human": human,
    }


def packed_document(shown: Shown) -> list[Any]:
    """[source, tags, strongest activation, pieces]; a piece is plain text, [marked text, activation] or [pale text]."""
    return [shown.source, shown.tags, short(shown.max_activation), list(map(_packed_span, shown.spans))]


def _packed_span(span: Span) -> str | list[Any]:
    if span.kind == "fired":
        return [span.text, short(span.value, 3)]
    return [span.text] if span.kind else span.text


def short(value: float | None, digits: int = 4) -> float | None:
    """A number to `digits` significant digits; None (JSON's null) for what is not finite."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


def safe_json(value: object) -> str:
    """Compact JSON that cannot leave the script that it stands in, and that every file can hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return UNSAFE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def _size(value: object) -> int:
    return len(safe_json(value).encode())
