"""The figures of the local page, as dictionaries that plotly.js draws: a list of traces and a layout.

Of a trace, `run` is the number of its run, which has a colour, and `part` the model, pair or owner that it is of, which
has a dash or a symbol. Names are escaped: plotly takes them for HTML.
"""

from __future__ import annotations

import csv
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from train.dashboard_curves import Bins, Curve, RunLog
from train.dashboard_panels import Panel, Relation, part_of
from train.metric_table import HISTOGRAM, Metric

LOGARITHMIC = {"type": "log", "dtick": "D2", "tickformat": "~g"}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "diamond-open", "square", "x", "cross")

T = TypeVar("T")
Trace = dict[str, Any]
Figure = dict[str, Any]


def panel_figure(panel: Panel, logs: Sequence[RunLog]) -> Figure:
    """A metric of several runs: curves, or the last histogram of each."""
    metric = panel.metric
    if metric.kind == HISTOGRAM:
        traces = [_bins(run, i, *own) for i, run in enumerate(logs) for own in _of(metric, run.histograms)]
        return _figure(f"{panel.title}, last", metric.about, traces, metric.unit, "latents")
    traces = [_curve(run, i, *own) for i, run in enumerate(logs) for own in _of(metric, run.curves)]
    figure = _figure(panel.title, metric.about, traces, panel.x_title, panel.y_title)
    if panel.is_logarithmic:
        figure["layout"]["yaxis"] |= LOGARITHMIC
    return figure | {"smooth": True}


def _of(metric: Metric, logged: Mapping[str, T]) -> Iterator[tuple[str, T]]:
    """What was logged of a metric, by the parts that it is of."""
    for name, value in logged.items():
        part = part_of(name, metric.name)
        if part is not None:
            yield part, value


def _curve(run: RunLog, number: int, part: str, curve: Curve) -> Trace:
    style = {"mode": "lines" if len(curve.steps) > 1 else "markers", "line": {"width": 1.5}}
    return _trace(run, number, part, curve.steps, curve.values, style)


def _bins(run: RunLog, number: int, part: str, bins: Bins) -> Trace:
    style = {"line": {"shape": "hv", "width": 1.5}}
    return _trace(run, number, part, bins.edges, [*bins.counts, 0], style, f"step {bins.step:.0f}")


def relation_figure(relation: Relation, runs: Sequence[RunLog]) -> Figure:
    """A point for a run, and for each model where the metric is of one; no trace where all runs have the same `x`."""
    traces = []
    for i, run in enumerate(runs):
        x = run.best(relation.x) if "/" in relation.x else run.setting(relation.x)
        for name in run.curves if x is not None else ():
            part, y = part_of(name, relation.y), run.best(name)
            if part is not None and y is not None:
                traces.append(_trace(run, i, part, [x], [y], {"mode": "markers", "marker": {"size": 9}}))
    varies = len({trace["x"][0] for trace in traces}) > 1
    return _figure(relation.title, "", traces if varies else [], relation.x_title, relation.unit)


def owners_figure(table: Path) -> Figure:
    """Latents by owner of every analysed run, from the report's table with columns pair, owner, count."""
    rows = list[dict[str, str]]()
    if table.is_file():
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    owners = dict.fromkeys(row["owner"] for row in rows)
    traces: list[Trace] = [
        {
            "type": "bar",
            "name": _text(owner),
            "x": [_text(row["pair"]) for row in rows if row["owner"] == owner],
            "y": [int(row["count"]) for row in rows if row["owner"] == owner],
            "showlegend": True,
        }
        for owner in owners
    ]
    figure = _figure("latents by owner", "As the report has them.", traces, "", "latents")
    figure["layout"]["yaxis"] |= LOGARITHMIC  # a few against thousands that are shared
    return figure | {"wide": True}


def _trace(
    run: RunLog, number: int, part: str, x: Sequence[object], y: Sequence[object], style: Trace, note: str = ""
) -> Trace:
    name = _text(*filter(None, (run.name, part, note)))
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": name, "run": number, "part": part} | style


def _figure(title: str, about: str, traces: list[Trace], x_title: str, y_title: str) -> Figure:
    """Several parts get a legend, of grey traces that belong to no run; runs have theirs beside the figures. Its traces
    are smoothed if `smooth`, and shown whatever runs are chosen if `always`; it is as wide as the page if `wide`.
    """
    parts = list(dict.fromkeys(trace["part"] for trace in traces if trace.get("part")))
    marked = [_marked(trace, parts.index(trace["part"])) if trace.get("part") else trace for trace in traces]
    legend = [_legend_entry(part, number, traces[0]) for number, part in enumerate(parts)] if len(parts) > 1 else []
    layout = {"xaxis": {"title": {"text": x_title}}, "yaxis": {"title": {"text": y_title}}}
    return {
        "title": title,
        "about": about,
        "data": [*legend, *marked],
        "layout": layout,
        "smooth": False,
        "always": False,
        "wide": False,
    }


def _marked(trace: Trace, number: int) -> Trace:
    """A trace with the dash and the symbol of its part."""
    line, marker = trace.get("line", {}), trace.get("marker", {})
    return {
        **trace,
        "line": {**line, "dash": DASHES[number % len(DASHES)]},
        "marker": {**marker, "symbol": SYMBOLS[number % len(SYMBOLS)]},
    }


def _legend_entry(part: str, number: int, like: Trace) -> Trace:
    grey = {"color": "#777777"}
    entry = {"x": [None], "y": [None], "name": _text(part), "showlegend": True, "line": grey, "marker": grey}
    return _marked({"type": "scatter", "mode": like["mode"], **entry}, number)


def _text(*parts: str) -> str:
    return html.escape(" · ".join(parts), quote=False)
