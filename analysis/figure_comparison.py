"""The forest plot of a comparison: shares of two models, their difference and their ratio, with intervals."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.changes import Change, Comparison
from analysis.figures import GREY, INK, STYLE, WIDTH, brief

# Ratios beyond this, or its inverse, are arrows: of small counts some are infinite.
MAX_RATIO = 16.0


def forest(comparison: Comparison, colours: dict[str, str]) -> Figure:
    """Shares with Wilson intervals, differences with Newcombe's and changes with Katz's, by category.

    Categories without a latent in either model are left out. A change is drawn as a ratio on a log scale; an interval
    that goes on beyond the axis ends in an arrow.
    """
    changes = [change for change in comparison.changes if change.count_a + change.count_b][::-1]
    rows = np.arange(len(changes))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.95 + 0.22 * max(len(changes), 2)), layout="constrained")
        shares, differences, ratios = figure.subplots(1, 3, sharey=True, width_ratios=[1.2, 1, 1])
        _shares(shares, comparison, changes, rows, colours)
        _interval_rows(differences, *_percent(changes, "difference"), rows, INK)
        differences.axvline(0, color=GREY, linewidth=0.6, zorder=0)
        differences.set(xlabel="difference (points)")
        _ratios(ratios, changes, rows)
        ratios.set(xlabel="change")
        shares.set_yticks(
            rows, [f"{brief(change.name, 40)}  {change.count_a} | {change.count_b}" for change in changes]
        )
        shares.set_ylim(-0.6, max(len(changes), 2) - 0.4)
        by = f"; annotator: {comparison.annotator}" if comparison.annotator else ""
        said = f"{brief(comparison.model_b, 30)} against {brief(comparison.model_a, 30)}{by}"
        figure.supxlabel(brief(said, 130), fontsize=7, color=GREY)
        figure.legend(loc="outside upper center", ncols=2, handletextpad=0.1)
        for axes in (shares, differences, ratios):
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        return figure


def _shares(
    axes: Axes, comparison: Comparison, changes: list[Change], rows: np.ndarray, colours: dict[str, str]
) -> None:
    for side, model, shift in (("a", comparison.model_a, 0.16), ("b", comparison.model_b, -0.16)):
        colour = colours.get(model, INK)
        _interval_rows(axes, *_percent(changes, f"share_{side}"), rows + shift, colour, brief(model, 40))
    axes.set(xlabel="share of own latents (%)")
    axes.set_xlim(left=0)


def _percent(changes: list[Change], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre, low and high end of a share or difference in percent."""
    centre, low, high = (
        np.array([100 * getattr(change, f"{name}{end}") for change in changes]) for end in ("", "_low", "_high")
    )
    return centre, low, high


def _interval_rows(
    axes: Axes, centre: np.ndarray, low: np.ndarray, high: np.ndarray, rows: np.ndarray, colour: str, label: str = ""
) -> None:
    """Points with horizontal intervals."""
    axes.hlines(rows, low, high, color=colour, linewidth=1)
    axes.plot(centre, rows, "o", color=colour, markersize=3.2, label=label or None, clip_on=False)


def _ratios(axes: Axes, changes: list[Change], rows: np.ndarray) -> None:
    """Changes as ratios of the shares; what lies beyond the axis is an arrow at its end."""
    axes.axvline(1, color=GREY, linewidth=0.6, zorder=0)
    for row, change in zip(rows, changes, strict=True):
        centre, low, high = (1 + value for value in (change.change, change.change_low, change.change_high))
        if not low < high:  # NaN: a model without latents
            continue
        shown = np.clip([low, high], 1 / MAX_RATIO, MAX_RATIO)
        axes.hlines(row, *shown, color=INK, linewidth=1)
        for end, beyond, marker in ((0, low < 1 / MAX_RATIO, "<"), (1, high > MAX_RATIO, ">")):
            if beyond:
                axes.plot(shown[end], row, marker, color=INK, markersize=3, clip_on=False)
        if 1 / MAX_RATIO <= centre <= MAX_RATIO:
            axes.plot(centre, row, "o", color=INK, markersize=3.2)
    axes.set_xscale("log", base=2)
    axes.set(xlim=(1 / MAX_RATIO, MAX_RATIO), xticks=[1 / 8, 1, 8])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: percent_change(ratio)))


def percent_change(ratio: float) -> str:
    """2.0 -> "+100 %", 0.5 -> "−50 %", 1.0 -> "0"."""
    return "0" if ratio == 1 else f"{100 * (ratio - 1):+.0f}\u2009%".replace("-", "−")
