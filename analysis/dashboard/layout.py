"""The parts of the page and their names; what they hold comes from `analysis.dashboard.app`."""

from __future__ import annotations

from dash import dcc, html
from dash.development.base_component import Component

from analysis.dashboard.documents import TOP
from analysis.dashboard.filters import ORDERS
from analysis.examples.samples import ACTIVATING, NEAR_MISS, SILENT

KINDS = {TOP: "top", ACTIVATING: "by strength", NEAR_MISS: "near misses", SILENT: "silent"}
CONTEXTS = {64: "64 tokens", 256: "256 tokens", 1_000_000: "whole documents"}


def page(study: str, pairs: list[str], categories: list[str]) -> Component:
    """The whole page; both views are there, and the address decides which one shows."""
    return html.Div(
        [
            dcc.Location(id="url"),
            dcc.Store(id="page", data=0),
            dcc.Store(id="saved", data=0),
            dcc.Store(id="shown", data=[]),
            html.Header(
                [html.H1(study), dcc.Link("Latents", href="/"), dcc.Link("Compare", href="/compare", id="to-compare")]
            ),
            html.Div(id="problem", role="alert"),
            html.Main([_filters(pairs), _table(), _latent(categories)], id="browse"),
            html.Main(_comparison(pairs), id="compare"),
        ]
    )


def _filters(pairs: list[str]) -> Component:
    bounds = [
        _field(f"|{name}| from … to", html.Div([_number(f"{key}-low"), _number(f"{key}-high")], className="range"))
        for key, name in (("error", "ν error"), ("reconstruction", "ν reconstruction"))
    ]
    return html.Aside(
        [
            _field("crosscoder", _choice("pair", pairs, pairs[0])),
            _field("owner", dcc.Dropdown(id="owners", multi=True, placeholder="any")),
            _field("category", dcc.Dropdown(id="categories", multi=True, placeholder="any")),
            _field("text", dcc.Input(id="search", type="search", placeholder="label, description", debounce=0.3)),
            *bounds,
            dcc.Checklist(id="by-hand", options=[{"label": " labelled by hand", "value": "yes"}], value=[]),
            _field("order", _choice("order", list(ORDERS), next(iter(ORDERS)))),
        ],
        className="filters",
    )


def _table() -> Component:
    turning = [
        html.Button("‹", id="previous", title="previous page"),
        html.Span(id="where"),
        html.Button("›", id="next", title="next page"),
    ]
    return html.Section([html.Div(turning, className="turning"), html.Div(id="table")], className="list")


def _latent(categories: list[str]) -> Component:
    return html.Section(
        [
            html.Div(id="facts"),
            _form(categories),
            html.Div(
                [
                    dcc.RadioItems(KINDS, TOP, id="kind", inline=True),
                    _choice("context", [{"label": name, "value": size} for size, name in CONTEXTS.items()], 64),
                ],
                className="shown",
            ),
            html.Div(id="documents"),
        ],
        className="latent",
        id="latent",
    )


def _form(categories: list[str]) -> Component:
    return html.Div(
        [
            _field("your label", dcc.Input(id="hand-label", type="text", maxLength=200)),
            _field("your category", dcc.Dropdown(categories, id="hand-category", placeholder="none")),
            _field("note", dcc.Input(id="hand-note", type="text", maxLength=2000)),
            _field("your name", dcc.Input(id="who", type="text", maxLength=80, persistence=True)),
            html.Div([html.Button("Save", id="save"), html.Span(id="message", role="status")]),
        ],
        className="form",
    )


def _comparison(pairs: list[str]) -> list[Component]:
    first, second = pairs[0], pairs[min(1, len(pairs) - 1)]
    choices = [
        _field(f"crosscoder {side}", _choice(f"pair-{side}", pairs, pair))
        for side, pair in (("a", first), ("b", second))
    ]
    owners = [_field(f"owner in {side}", dcc.Dropdown(id=f"owner-{side}", clearable=False)) for side in "ab"]
    listed = _field("latents of the category", dcc.Dropdown(id="listed", placeholder="all"))
    return [
        html.Div([*choices, *owners, listed], className="choices"),
        html.P(
            "Shares with 95 % Wilson intervals, near-duplicates counted one by one. Shares of so few latents differ by "
            "chance, and people judge unlike annotators: what may be claimed stands in the report and in "
            "`python -m analysis.compare`.",
            className="quiet",
        ),
        html.Div(id="compared"),
        html.Div(id="side-by-side", className="sides"),
    ]


def _field(name: str, content: Component) -> Component:
    return html.Label([html.Span(name), content], className="field")


def _choice(identity: str, options: list, value: str | int) -> Component:
    return dcc.Dropdown(options, value, id=identity, clearable=False)


def _number(identity: str) -> Component:
    return dcc.Input(id=identity, type="number", min=0, step="any", debounce=0.3)
