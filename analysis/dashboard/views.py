"""What the dashboard shows of latents: rows of the table, and what is known about one.

Everything is built of components whose text React sets as text: what documents and descriptions contain is never HTML.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from urllib.parse import quote, unquote

import numpy as np
from dash import dcc, html
from dash.development.base_component import Component

from analysis.dashboard.crosscoders import Crosscoder
from analysis.latents.columns import Columns, nu_column, pair_column
from analysis.scoring.scores import NONE, Score

HEADING = ("latent", "owner", "label", "category", "confidence")
NUMBERS = ("ν error", "ν recon.", "frequency", "max")
# Columns that are facts about a latent, as they are called in print.
FACTS = {
    "owner": "owner",
    "dedicated": "dedicated",
    "frequency": "frequency",
    "num_active_tokens": "active tokens",
    "mean_activation": "mean activation",
    "max_activation": "largest activation",
}
NU_FACTS = {"nu_error": "ν error", "nu_reconstruction": "ν reconstruction"}
BY_HAND = "✎ "
LATENT_PATH = "/latent/"


def path_of(pair: str, latent: int) -> str:
    """The address of a latent."""
    return f"{LATENT_PATH}{quote(pair, safe='')}/{latent}"


def parse_path(path: str | None) -> tuple[str, int] | None:
    """The pair and the number of the latent that an address names."""
    parts = (path or "").removeprefix(LATENT_PATH).split("/")
    if not (path or "").startswith(LATENT_PATH) or len(parts) != 2 or not parts[1].isdecimal():
        return None
    return unquote(parts[0]), int(parts[1])


def table(crosscoder: Crosscoder, latents: Sequence[int], selected: int | None) -> Component:
    """A row for each latent."""
    names = [*(html.Th(name) for name in HEADING), *(html.Th(name, className="n") for name in NUMBERS)]
    head = html.Thead(html.Tr(names))
    rows = [html.Tr(_cells(crosscoder, i), className="selected" if i == selected else "") for i in latents]
    return html.Table([head, html.Tbody(rows)], className="latents")


def _cells(crosscoder: Crosscoder, latent: int) -> list[Component]:
    human, annotation = crosscoder.human.get(latent), crosscoder.annotations.get(latent)
    label = (BY_HAND if human and human.label else "") + crosscoder.label(latent)
    category = (BY_HAND if human and human.category else "") + crosscoder.category(latent)
    numbers = [crosscoder.nu[name][latent] for name in crosscoder.nu]
    numbers += [crosscoder.columns[name][latent] for name in ("frequency", "max_activation")]
    texts = [str(crosscoder.columns["owner"][latent]), label, category, annotation.confidence if annotation else ""]
    link = dcc.Link(str(latent), href=path_of(crosscoder.name, latent))
    return [html.Td(link), *(html.Td(text) for text in texts), *(html.Td(number(n), className="n") for n in numbers)]


def number(value: float) -> str:
    """Three digits, or a dash where there is no value."""
    value = float(value)
    return f"{value:.3g}" if math.isfinite(value) else "–"


def facts(crosscoder: Crosscoder, latent: int) -> Component:
    """Everything that is known about a latent beside its documents."""
    annotation, placed = crosscoder.annotations.get(latent), crosscoder.placed.get(latent)
    human = crosscoder.human.get(latent)
    parts: list[Component] = [
        html.H2(f"{crosscoder.name} / {latent}: {crosscoder.label(latent) or 'not annotated'}", id="latent-title")
    ]
    if annotation:
        parts.append(html.P(annotation.description or "No description.", id="description"))
        parts.append(html.P(f"Confidence {annotation.confidence}: {annotation.reason}", className="quiet"))
        parts.append(html.P(f"{annotation.label} – by {annotation.annotator}", className="quiet"))
    if placed:
        parts.append(html.P(f"Category: {placed.category} ({placed.group}) – {placed.annotator}", className="quiet"))
    if scores := [score for score in crosscoder.scores if score.latent == latent]:
        parts.append(html.P("Held-out balanced accuracy: " + ", ".join(map(_score, scores)), className="quiet"))
    if human:
        given = f"{human.label or 'no label'} – {human.category or 'no category'}"
        said = f"{BY_HAND}{given} – {human.who}, {human.at}. {human.note}"
        parts.append(html.P(said, id="said", className="said"))
    return html.Div([*parts, _duplicates(crosscoder, latent), _numbers(crosscoder, latent)])


def _score(score: Score) -> str:
    judged_by = " by another's description" if score.control != NONE else ""
    return f"{score.kind}{judged_by} {score.balanced_accuracy:.2f} ({score.low:.2f} to {score.high:.2f})"


def _numbers(crosscoder: Crosscoder, latent: int) -> Component:
    columns, models = crosscoder.columns, crosscoder.models
    names = FACTS | {f"norm_{model}": f"decoder norm in {model}" for model in models}
    for a, b in permutations(models, 2):
        against, towards = (f" of {b} against {a}", f" towards {b}") if len(models) > 2 else ("", "")
        if a == models[0]:
            names[pair_column("delta_norm", models, a, b)] = f"Δ-norm{against}"
        names |= {nu_column(name, models, a, b): f"{said} of {a}{towards}" for name, said in NU_FACTS.items()}
    shown = {name: said for name, said in names.items() if name in columns}
    cells = [html.Div([html.Dt(said), html.Dd(_value(columns, name, latent))]) for name, said in shown.items()]
    return html.Dl(cells, className="numbers")


def _duplicates(crosscoder: Crosscoder, latent: int) -> Component:
    """Links to the near-duplicates of a latent; empty where it has none."""
    group_L = crosscoder.columns.get("group", np.arange(latent + 1))
    others = [int(other) for other in np.flatnonzero(group_L == group_L[latent]) if other != latent]
    links = [part for other in others for part in (" ", dcc.Link(str(other), href=path_of(crosscoder.name, other)))]
    return html.P(["Near-duplicates:", *links] if others else [], id="duplicates", className="quiet")


def _value(columns: Columns, name: str, latent: int) -> str:
    """With its interval where it has one."""
    value = columns[name][latent]
    if not isinstance(value, float):
        return str(value)
    low, high = (
        columns[f"{name}_{end}"][latent] if f"{name}_{end}" in columns else math.nan for end in ("low", "high")
    )
    return f"{number(value)} ({number(low)} to {number(high)})" if math.isfinite(low) else number(value)
