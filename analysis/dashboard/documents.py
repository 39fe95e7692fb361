"""The documents of a latent with token heat: its strongest, or those drawn for it at random by kind."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dash import html
from dash.development.base_component import Component

from analysis.examples.database import Example, Sample, has_samples, read_examples, read_samples, reading
from analysis.examples.excerpts import Span, spans_of
from analysis.examples.samples import NEAR_MISS

MAX_DOCUMENTS = 100
TOP = "top"


def shown_documents(folder: Path, latent: int, kind: str, context: int) -> Component:
    """The documents of one kind ("top", "activating", "near_miss" or "silent"), `context` tokens of each."""
    with reading(folder) as opened:
        found = _top(opened, latent) if kind == TOP else _drawn(opened, latent, kind)
        strongest = max((max(example.activations.values()) for _, example in found), default=0.0)
        shown = [_document(opened, heading, example, context, strongest) for heading, example in found]
    nothing = html.P("No documents of this kind are stored for this latent.", className="quiet")
    return html.Div(shown or nothing)


def _top(opened: sqlite3.Connection, latent: int) -> list[tuple[str, Example]]:
    found = read_examples(opened, latent, MAX_DOCUMENTS)
    return [(f"{rank}. maximum {e.activations[e.peak]:.3g}", e) for rank, e in enumerate(found, 1)]


def _drawn(opened: sqlite3.Connection, latent: int, kind: str) -> list[tuple[str, Example]]:
    """Samples of one kind, the strongest first, those in which nothing fires around their best token or their start;
    none where the analysis is from before samples were stored.
    """
    if not has_samples(opened):
        return []
    samples = [sample for sample in read_samples(opened, latent) if sample.kind == kind]
    samples.sort(key=lambda sample: (-(sample.quantile or 0), -(sample.max_activation or 0.0)))
    return [(_heading(s), replace(s, activations=s.activations or {s.position or 0: 0.0})) for s in samples]


def _heading(sample: Sample) -> str:
    """What a document was drawn for; of a near miss also the token that comes nearest, which nothing marks."""
    if sample.kind == NEAR_MISS and sample.position is not None:
        return f"best value below the threshold {sample.max_activation:.3g}, at “{sample.tokens[sample.position]}”"
    return (
        "never fires" if sample.quantile is None else f"stratum {sample.quantile}, maximum {sample.max_activation:.3g}"
    )


def _document(opened: sqlite3.Connection, heading: str, example: Example, context: int, strongest: float) -> Component:
    doc_id, source, tags = opened.execute(
        "SELECT doc_id, source, tags FROM documents WHERE document = ?", (example.document,)
    ).fetchone()
    named = [f"{name}: {value}" for name, value in (json.loads(tags or "{}") or {}).items()]
    title = " · ".join([heading, f"{source} {doc_id}", *named])
    text = html.Div(_heat(spans_of(example, context), strongest), className="text")
    return html.Div([html.Div(title, className="source"), text], className="document")


def _heat(spans: Sequence[Span], strongest: float) -> list[Component | str]:
    """Spans as components; the stronger a token's activation beside the strongest shown, the deeper its colour."""
    shown: list[Component | str] = []
    for span in spans:
        if span.kind == "fired":
            depth = 0.15 + 0.75 * min(1.0, span.value / strongest)
            style = {"backgroundColor": f"rgba(230, 90, 20, {depth:.2f})"}
            shown.append(html.Span(span.text, className="fired", style=style, title=f"activation {span.value:.3g}"))
        else:
            shown.append(html.Span(span.text, className=span.kind) if span.kind else span.text)
    return shown
