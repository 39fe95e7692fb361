"""What the report shows of single latents: their numbers, labels, and documents with the firing tokens marked."""

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from analysis.annotate import Annotation, read_annotations
from analysis.columns import delta_norm_of, models_of, nu_of, owners_in_order
from analysis.config import NOT_MODELS, OwnerConfig, ReportConfig
from analysis.examples import Example, read_examples
from analysis.taxonomy import Placed, read_categories
from analysis.wording import of_template

# The weakest mark that is still seen on paper.
MIN_OPACITY = 0.2
CONFIDENCE_ORDER = {"high": 0, "medium": 1, "low": 2}


@dataclass(frozen=True)
class Span:
    """A piece of a document. `kind` is "" for plain text, "template", "gap" or "fired" (with value and opacity)."""

    text: str
    kind: str = ""
    value: float = 0.0
    opacity: float = 0.0


@dataclass(frozen=True)
class Shown:
    """One document on a card."""

    doc_id: str
    source: str
    tags: str
    max_activation: float
    spans: list[Span]


@dataclass(frozen=True)
class Card:
    """One model-specific latent. `anchor` is its id in the page."""

    anchor: str
    latent: int
    owner: str
    label: str
    description: str
    confidence: str
    reason: str
    annotator: str
    category: str
    group: str
    similarity: float
    delta_norm: float
    nu_error: float
    nu_reconstruction: float
    frequency: float
    max_activation: float
    dedicated: bool
    documents: list[Shown]


@dataclass(frozen=True)
class Near:
    """A latent that is nobody's own but comes closest to `focus`, and what keeps it from being that."""

    latent: int
    focus: str
    delta_norm: float
    nu_error: float
    nu_reconstruction: float
    obstacle: str


def anchor_of(pair: str, latent: int) -> str:
    """The id of a latent's card in the page."""
    return f"{pair}-{latent}"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of `latents.parquet`."""
    return pq.read_table(folder / "latents.parquet").to_pylist()


def cards_of(folder: Path, config: ReportConfig, always: set[int]) -> list[Card]:
    """Cards of each owner's latents: the `latents_per_model` most exclusive, and those in `always`."""
    models = models_of(folder)
    annotations = {record.latent: record for record in read_annotations(folder)}
    placed = {row.latent: row for row in read_categories(folder)}
    rows = [row for row in read_rows(folder) if row["owner"] not in NOT_MODELS]
    chosen = []
    for owner in owners_in_order((row["owner"] for row in rows), models):
        own = sorted((row for row in rows if row["owner"] == owner), key=lambda row: exclusiveness(row, models))
        chosen += [row for rank, row in enumerate(own) if rank < config.latents_per_model or row["latent"] in always]
    with sqlite3.connect(f"file:{folder / 'examples.sqlite'}?mode=ro", uri=True) as database:
        return [
            _card(
                folder.name,
                row,
                models,
                annotations[row["latent"]],
                placed[row["latent"]],
                shown_of(database, row["latent"], config),
            )
            for row in chosen
        ]


def exclusiveness(row: dict[str, Any], models: list[str]) -> float:
    """|nu_error| + |nu_reconstruction| towards the other models: 0 for a latent that only its owner needs."""
    error, reconstruction = nu_of(row, models, row["owner"])
    return abs(error) + abs(reconstruction)


def _card(
    pair: str, row: dict[str, Any], models: list[str], annotation: Annotation, placed: Placed, documents: list[Shown]
) -> Card:
    error, reconstruction = nu_of(row, models, row["owner"])
    return Card(
        anchor=anchor_of(pair, row["latent"]),
        latent=row["latent"],
        owner=row["owner"],
        label=annotation.label,
        description=annotation.description,
        confidence=annotation.confidence,
        reason=annotation.reason,
        annotator=annotation.annotator,
        category=placed.category,
        group=placed.group,
        similarity=placed.similarity,
        delta_norm=delta_norm_of(row, models, row["owner"]),
        nu_error=error,
        nu_reconstruction=reconstruction,
        frequency=row["frequency"],
        max_activation=row["max_activation"],
        dedicated=bool(row["dedicated"]),
        documents=documents,
    )


def shown_of(database: sqlite3.Connection, latent: int, config: ReportConfig) -> list[Shown]:
    """The top documents of a latent, cut to the surroundings of their strongest activation."""
    examples = read_examples(database, latent, config.documents_per_latent)
    strongest = max((example.activations[example.peak] for example in examples), default=1.0)
    shown = []
    for example in examples:
        doc_id, source, tags = database.execute(
            "SELECT doc_id, source, tags FROM documents WHERE document = ?", (example.document,)
        ).fetchone()
        named = ", ".join(f"{name}: {value}" for name, value in (json.loads(tags or "{}") or {}).items())
        spans = spans_of(example, config.context_tokens, strongest)
        shown.append(Shown(doc_id, source, named, example.activations[example.peak], spans))
    return shown


def spans_of(example: Example, context_tokens: int, strongest: float) -> list[Span]:
    """A document around its strongest activation, in runs of equal kind.

    Opacity is the activation over the latent's strongest one. A token without text of its own (a part of a character
    that the next token completes) hands its activation on.
    """
    start, end = _window(example, context_tokens)
    spans = [Span("… ", "gap")] if start > 0 else []
    carried, hidden = 0.0, of_template(example.tokens)
    for position in range(start, end):
        token = example.tokens[position]
        value = max(carried, example.activations.get(position, 0.0))
        carried = value if not token else 0.0
        if token:
            spans = _append(spans, _span(token, value, strongest, hidden[position]))
    return spans + ([Span(" …", "gap")] if end < len(example.tokens) else [])


def _window(example: Example, context_tokens: int) -> tuple[int, int]:
    """Two thirds of the context before the strongest token, one third after it, shifted to stay within the document."""
    start = max(0, min(example.peak - 2 * context_tokens // 3, len(example.tokens) - context_tokens))
    return start, min(len(example.tokens), start + context_tokens)


def _span(token: str, value: float, strongest: float, is_template: bool) -> Span:
    text = visible(token, fired=value > 0)
    if value > 0:
        return Span(text, "fired", value, max(MIN_OPACITY, min(1.0, value / strongest)))
    return Span(text, "template" if is_template else "")


def visible(token: str, fired: bool) -> str:
    """Line breaks as arrows, which keeps documents compact; a firing blank as an open box, which shows its mark."""
    text = token.replace("\r\n", "\n").replace("\n", "↵ ").replace("\t", "→ ")
    return "␣" if fired and not text.strip() else text


def _append(spans: list[Span], span: Span) -> list[Span]:
    """Plain neighbours are merged: a page of thousands of documents would be mostly tags otherwise."""
    if spans and span.kind == spans[-1].kind != "fired":
        return [*spans[:-1], Span(spans[-1].text + span.text, span.kind)]
    return [*spans, span]


def nearest_to(
    focus: str, rows: list[dict[str, Any]], models: list[str], owner: OwnerConfig, count: int = 5
) -> list[Near]:
    """The latents that come closest to being `focus`'s own, for a crosscoder that has none."""
    alive = [
        row
        for row in rows
        if row["owner"] not in (*models, "dead")
        and all(abs(value) < float("inf") for value in nu_of(row, models, focus))
    ]
    near = sorted(alive, key=lambda row: _distance(row, models, focus, owner))
    return [
        Near(
            row["latent"],
            focus,
            delta_norm_of(row, models, focus),
            *nu_of(row, models, focus),
            _obstacle(row, models, focus, owner),
        )
        for row in near[:count]
    ]


def _distance(row: dict[str, Any], models: list[str], focus: str, owner: OwnerConfig) -> tuple[bool, float]:
    """Latents whose Delta-norm would do come first, by how far nu misses; then the others by Delta-norm."""
    if not _leans(row, models, focus, owner):
        return True, _delta_distance(row, models, focus)
    error, reconstruction = nu_of(row, models, focus)
    return False, max(abs(error) / owner.max_nu_error, abs(reconstruction) / _max_reconstruction(row, owner))


def _delta_distance(row: dict[str, Any], models: list[str], focus: str) -> float:
    """0 for a latent that only `focus` has a decoder row of, 1 for one that it has none of."""
    delta = delta_norm_of(row, models, focus)
    return delta if focus == models[0] else 1 - delta


def _leans(row: dict[str, Any], models: list[str], focus: str, owner: OwnerConfig) -> bool:
    limit = owner.delta_norm_low if focus == models[0] else 1 - owner.delta_norm_high
    return _delta_distance(row, models, focus) < limit


def _max_reconstruction(row: dict[str, Any], owner: OwnerConfig) -> float:
    return owner.max_nu_reconstruction_dedicated if row["dedicated"] else owner.max_nu_reconstruction


def _obstacle(row: dict[str, Any], models: list[str], focus: str, owner: OwnerConfig) -> str:
    error, reconstruction = nu_of(row, models, focus)
    reasons = [] if _leans(row, models, focus, owner) else ["Δ-norm within the thresholds"]
    reasons += [f"|ν error| ≥ {owner.max_nu_error}"] if abs(error) >= owner.max_nu_error else []
    limit = _max_reconstruction(row, owner)
    reasons += [f"|ν reconstruction| ≥ {limit}"] if abs(reconstruction) >= limit else []
    return ", ".join(reasons)
