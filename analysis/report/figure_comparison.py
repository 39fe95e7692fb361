"""The forest plot of a comparison: shares of two models, their difference and their ratio, with intervals."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.compare.changes import Change, Comparison
from analysis.report.figures import GREY, INK, STYLE, WIDTH, brief
from analysis.tables import percent

# Ratios beyond this, or its inverse, are arrows: of small counts some are infinite.
MAX_RATIO = 16.0


def forest(comparison: Comparison, colours: dict[str, str]) -> Figure:
    """Shares with Wilson intervals, differences with Newcombe's and ratios of the shares with Katz's, by category.

    Categories without a latent in either model are left out; a star marks those that may be claimed. What goes on
    beyond the axis of the ratios ends in an arrow.
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
        shares.set_yticks(rows, list(map(_name, changes)))
        shares.set_ylim(-0.6, max(len(changes), 2) - 0.4)
        by = f"; annotator: {comparison.annotator}" if comparison.annotator else ""
        said = f"{brief(comparison.model_b, 30)} against {brief(comparison.model_a, 30)}{by}"
        figure.supxlabel(brief(said, 130), fontsize=7, color=GREY)
        figure.legend(loc="outside upper center", ncols=2, handletextpad=0.1)
        for axes in (shares, differences, ratios):
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        return figure


def _name(change: Change) -> str:
    """A category with its counts, and a star if its difference may be claimed."""
    return f"{brief(change.name, 40)}  {change.count_a} | {change.count_b}{' *' if change.may_be_claimed else ''}"


def forest_caption(comparison: Comparison) -> str:
    """What the forest plot shows and what it does not."""
    a, b, level = comparison.model_a, comparison.model_b, percent(comparison.config.confidence, 0)
    claimed = sum(change.may_be_claimed for change in comparison.changes)
    return (
        f"Own latents of {a} and {b} by {comparison.level}, with the counts {a} | {b}. Left, shares with {level} "
        f"Wilson intervals. Middle, difference of the shares ({b} - {a}) with Newcombe's. Right, ratio of the shares "
        f"({b} / {a}, log scale) with Katz's; an arrow: the interval goes on beyond the axis; hollow: a ratio that "
        "does so itself, as where one of the counts is 0. Each interval is of its row alone and not corrected for the "
        "number of rows, so one that excludes no difference is no test. The test is Fisher's with Benjamini-Hochberg's "
        "correction over all rows, repeated over near-duplicates and votes; a star marks what may be claimed: "
        f"{claimed or 'none'} of {len(comparison.changes)}."
    )


def _shares(
    axes: Axes, comparison: Comparison, changes: list[Change], rows: np.ndarray, colours: dict[str, str]
) -> None:
    for side, model, shift in (("a", comparison.model_a, 0.16), ("b", comparison.model_b, -0.16)):
        colour = colours.get(model, INK)
        _interval_rows(axes, *_percent(changes, f"share_{side}"), rows + shift, colour, brief(model, 40))
    axes.set(xlabel="share of own latents (%)")
    axes.set_xlim(left=-0.03 * axes.get_xlim()[1])  # points at 0 % keep off the names


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
    """Ratios of the shares; what lies beyond the axis is an arrow at its end, hollow if it is the ratio itself."""
    axes.axvline(1, color=GREY, linewidth=0.6, zorder=0)
    for row, change in zip(rows, changes, strict=True):
        centre, low, high = (1 + value for value in (change.change, change.change_low, change.change_high))
        if math.isnan(centre):  # a model without latents
            continue
        if low < high:
            shown = np.clip([low, high], 1 / MAX_RATIO, MAX_RATIO)
            axes.hlines(row, *shown, color=INK, linewidth=1)
        for end, marker, beyond, is_centre in (
            (1 / MAX_RATIO, "<", low < 1 / MAX_RATIO, centre < 1 / MAX_RATIO),
            (MAX_RATIO, ">", high > MAX_RATIO, centre > MAX_RATIO),
        ):
            if beyond or is_centre:
                fill = "white" if is_centre else INK
                axes.plot(end, row, marker, color=INK, markersize=4, markerfacecolor=fill, clip_on=False)
        if 1 / MAX_RATIO <= centre <= MAX_RATIO:
            axes.plot(centre, row, "o", color=INK, markersize=3.2)
    axes.set_xscale("log", base=2)
    axes.set(xlim=(0.8 / MAX_RATIO, MAX_RATIO / 0.8), xlabel="ratio (log scale)")
    axes.set_xticks([1 / 8, 1, 8], ["1/8", "1", "8"])
    axes.minorticks_off()
