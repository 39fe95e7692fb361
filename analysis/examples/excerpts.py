"""Documents as a card shows them: the surroundings of the strongest activation, cut into runs of one kind."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass

from analysis.config import ReportConfig
from analysis.examples.database import Example, read_examples
from analysis.examples.wording import of_template


@dataclass(frozen=True)
class Span:
    """A piece of a document. `kind` is "" for plain text, "template", "gap" or "fired" (then with its activation)."""

    text: str
    kind: str = ""
    value: float = 0.0


@dataclass(frozen=True)
class Shown:
    """One document on a card."""

    source: str
    tags: str
    max_activation: float
    spans: list[Span]


def shown_of(database: sqlite3.Connection, latent: int, config: ReportConfig) -> list[Shown]:
    """The top documents of a latent, cut to the surroundings of their strongest activation."""
    shown = []
    for example in read_examples(database, latent, config.documents_per_latent):
        source, tags = database.execute(
            "SELECT source, tags FROM documents WHERE document = ?", (example.document,)
        ).fetchone()
        named = ", ".join(f"{name}: {value}" for name, value in (json.loads(tags or "{}") or {}).items())
        spans = spans_of(example, config.context_tokens)
        shown.append(Shown(source, named, example.activations[example.peak], spans))
    return shown


def spans_of(example: Example, context_tokens: int) -> list[Span]:
    """A document around its strongest activation, in runs of equal kind.

    A token without text of its own (a part of a character that the next token completes) hands its activation on.
    """
    start, end = _window(example, context_tokens)
    spans = [Span("… ", "gap")] if start > 0 else []
    carried, hidden = 0.0, of_template(example.tokens)
    for position in range(start, end):
        token = example.tokens[position]
        value = max(carried, example.activations.get(position, 0.0))
        carried = value if not token else 0.0
        if token:
            _append(spans, _span(token, value, hidden[position]))
    return spans + ([Span(" …", "gap")] if end < len(example.tokens) else [])


def _window(example: Example, context_tokens: int) -> tuple[int, int]:
    """Two thirds of the context before the strongest token, one third after it, shifted to stay within the document."""
    start = max(0, min(example.peak - 2 * context_tokens // 3, len(example.tokens) - context_tokens))
    return start, min(len(example.tokens), start + context_tokens)


def _span(token: str, value: float, is_template: bool) -> Span:
    text = visible(token, fired=value > 0)
    if value > 0:
        return Span(text, "fired", value)
    return Span(text, "template" if is_template else "")


def visible(token: str, fired: bool) -> str:
    """Line breaks as arrows, which keeps documents compact; a firing blank as an open box, which shows its mark."""
    text = token.replace("\r\n", "\n").replace("\n", "↵ ").replace("\t", "→ ")
    return "␣" if fired and not text.strip() else text


def _append(spans: list[Span], span: Span) -> None:
    """Plain neighbours are merged: a page of thousands of documents would be mostly marks otherwise."""
    if spans and span.kind == spans[-1].kind != "fired":
        spans[-1] = Span(spans[-1].text + span.text, span.kind)
    else:
        spans.append(span)
