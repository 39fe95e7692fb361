"""Two crosscoders side by side: latents by owner, shares of categories and classes, the latents of one category."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dash import dcc, html
from dash.development.base_component import Component

from analysis.compare.statistics import wilson
from analysis.config import NOT_MODELS
from analysis.dashboard.crosscoders import Crosscoder
from analysis.dashboard.views import path_of

# Latents listed on either side.
LISTED = 200


@dataclass(frozen=True)
class Side:
    """The latents of one owner in one crosscoder."""

    crosscoder: Crosscoder
    owner: str

    @property
    def title(self) -> str:
        return f"{self.owner} in {self.crosscoder.name}"

    @property
    def counted(self) -> str:
        """How many latents have a category, and how many of these have it from people."""
        latents, human = self.latents(), self.crosscoder.human
        by_hand = sum(latent in human and bool(human[latent].category) for latent in latents)
        return f"({len(latents)}, {by_hand} of them by hand)" if by_hand else f"({len(latents)})"

    def latents(self) -> list[int]:
        """Those that have a category, by number."""
        numbers = sorted(set(self.crosscoder.placed) | set(self.crosscoder.human))
        owners = self.crosscoder.columns["owner"]
        return [i for i in numbers if owners[i] == self.owner and self.crosscoder.category(i)]

    def counts(self, group_of: Mapping[str, str] | None = None) -> Counter[str]:
        """Latents by category, or by class."""
        names = [self.crosscoder.category(latent) for latent in self.latents()]
        return Counter(names if group_of is None else [group_of.get(name, name) for name in names])


def owner_table(a: Crosscoder, b: Crosscoder) -> Component:
    """How many latents each owner has in either crosscoder."""
    counts_a, counts_b = a.owners(), b.owners()
    total_a, total_b = sum(counts_a.values()), sum(counts_b.values())
    rows = [
        html.Tr([html.Td(owner), *_of(counts_a.get(owner, 0), total_a), *_of(counts_b.get(owner, 0), total_b)])
        for owner in sorted(counts_a | counts_b, key=lambda owner: owner in NOT_MODELS)
    ]
    return html.Table([_heading("owner", a.name, b.name), html.Tbody(rows)], className="compared", id="owner-counts")


def _of(count: int, total: int) -> list[Component]:
    return [html.Td(f"{count}", className="n"), html.Td(f"{count / max(total, 1):.1%}", className="n")]


def _heading(what: str, a: str, b: str) -> Component:
    return html.Thead(
        html.Tr([html.Th(what), html.Th(a, colSpan=2, className="side"), html.Th(b, colSpan=2, className="side")])
    )


def share_table(a: Side, b: Side, what: str, count_of: Callable[[Side], Counter[str]]) -> Component:
    """Shares of the categorised latents with 95 % Wilson intervals; the largest differences first."""
    counts_a, counts_b = count_of(a), count_of(b)
    total_a, total_b = counts_a.total(), counts_b.total()
    names = sorted(
        counts_a | counts_b,
        key=lambda name: (-abs(counts_a[name] / max(total_a, 1) - counts_b[name] / max(total_b, 1)), name),
    )
    rows = [
        html.Tr([html.Td(name), *_share(counts_a[name], total_a), *_share(counts_b[name], total_b)]) for name in names
    ]
    head = _heading(what, f"{a.title} {a.counted}", f"{b.title} {b.counted}")
    return html.Table([head, html.Tbody(rows)], className="compared", id=f"shares-{what}")


def _share(count: int, total: int) -> list[Component]:
    low, high = wilson(count, total)
    share = count / max(total, 1)
    bar = html.Div(className="bar", style={"width": f"{100 * share:.1f}%"})
    return [
        html.Td(f"{count}", className="n"),
        html.Td([bar, html.Span(f"{share:.1%} ({low:.1%} to {high:.1%})")], className="share"),
    ]


def latents_of(side: Side, category: str | None) -> Component:
    """The latents of one side that are in a category (all without one), as links."""
    found = [i for i in side.latents() if not category or side.crosscoder.category(i) == category]
    items = [
        html.Li([dcc.Link(str(i), href=path_of(side.crosscoder.name, i)), f" {side.crosscoder.label(i)}"])
        for i in found[:LISTED]
    ]
    shown = f"{len(found)} latents" + (f", the first {LISTED}:" if len(found) > LISTED else "")
    return html.Div([html.H3(side.title), html.P(shown, className="quiet"), html.Ul(items)])
