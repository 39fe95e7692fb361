"""Figure 1 of arXiv 2509.18792: how the latents of one model are found, (a) by decoder norms, (b) by latent scaling,
(c) how many remain. As one figure, as single panels, and (b) for each model on its own.

`latents` are always the columns of two models, base first, as `columns.of_two_models` gives them. Dead latents are
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from analysis.config import OwnerConfig
from analysis.latents.columns import Columns
from analysis.report.figures import COLUMN, GREY, INK, STYLE, WIDTH, brief
from analysis.report.null_ranges import NullRange

# The part of both nu that is drawn; latents outside are counted in the title.
NU_LOW, NU_HIGH = -0.8, 1.5
DOTS: Any = {"s": 3.0, "linewidths": 0.0, "rasterized": True}
# More marks than this are an image within the figure: thousands of outlines are megabytes that look the same.
MAX_VECTOR_MARKS = 300
MARKS: Any = {"s": 11.0, "linewidths": 0.3, "edgecolors": "white"}

SHARED = "#b0b0b0"
RANDOM = "random_direction"
NULL_COLOURS = {RANDOM: INK, "shared": "#7b3294"}

Colours = dict[str, str]


NU_CAPTION = (
    "ν error against ν reconstruction of all living latents, one panel for each model as focus: the model's own "
    "latents in its colour (circles free, diamonds dedicated), all others grey. Solid box: thresholds of free "
    "latents, dotted: of dedicated ones. Crosses: median and 5 to 95 % quantiles of random directions and of latents "
    "that Δ-norm calls shared."
)


def caption_of(owner: OwnerConfig) -> str:
    """What Figure 1 shows, with its thresholds."""
    return (
        "How latents of one model are found. a, Δ-norm of all living latents by owner; the outlines overlap, each "
        f"starts at 0 (log scale); thresholds {owner.delta_norm_low} and {owner.delta_norm_high} dashed. b, ν error "
        "and ν reconstruction of the candidates by Δ-norm with their own model as focus: those that pass strong, the "
        "others faint, shared latents grey (the tuned model as focus); cross: median and 5 to 95 % quantiles of "
        f"random directions. Solid box: |ν error| < {owner.max_nu_error} and |ν reconstruction| < "
        f"{owner.max_nu_reconstruction}; dotted: < {owner.max_nu_reconstruction_dedicated} for dedicated latents. c, "
        "candidates that are left after every condition; the last bar of a model is its own latents."
    )


def figure_one(
    latents: Columns, models: list[str], colours: Colours, owner: OwnerConfig, nulls: Sequence[NullRange] = ()
) -> Figure:
    """The three panels side by side, over both columns of a page; random directions are drawn into (b)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
        panels = figure.subplots(1, 3, width_ratios=[1.15, 1.1, 1])
        for axes, letter, fill in zip(panels, "abc", PANELS.values(), strict=True):
            fill(axes, latents, models, colours, owner)
            axes.set_title(letter, fontweight="bold", fontsize=9, x=-0.1)
        _add_random_directions(panels[1], nulls, models)
        return figure


def single_panel(
    name: str,
    latents: Columns,
    models: list[str],
    colours: Colours,
    owner: OwnerConfig,
    nulls: Sequence[NullRange] = (),
) -> Figure:
    """One of PANELS in one column of a page."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 2.5), layout="constrained")
        axes = figure.subplots()
        PANELS[name](axes, latents, models, colours, owner)
        if name == "nu":
            _add_random_directions(axes, nulls, models)
        return figure


def _add_random_directions(axes: Axes, nulls: Sequence[NullRange], models: list[str]) -> None:
    """Where nu of random directions lies with the tuned model as focus, in the panel of the candidates."""
    _null_crosses(axes, [null for null in nulls if null.name == RANDOM], models[1], models[0])
    axes.legend(loc="upper left", handletextpad=0.2, borderaxespad=0.1)


def delta_norm_panel(axes: Axes, latents: Columns, models: list[str], colours: Colours, owner: OwnerConfig) -> None:
    """How many latents have which Delta-norm, on a log scale, by owner: outlines that all start at 0.

    Stacks have no meaning on a log scale, where all but the lowest part would shrink to a line.
    """
    parts = {
        "other": (latents["owner"] == "other", GREY),
        "shared": (latents["owner"] == "shared", SHARED),
        **{f"{brief(model)}-only": (latents["owner"] == model, colours[model]) for model in models},
    }
    edges, counts = np.linspace(0, 1, 51), {}
    for name, (mask, colour) in parts.items():
        counts[name], _ = np.histogram(latents["delta_norm"][mask], edges)
        is_own = name not in ("other", "shared")
        label = f"{name} ({mask.sum():,})"
        drawn = np.where(counts[name] > 0, counts[name], np.nan)  # no line along 0
        axes.stairs(drawn, edges, baseline=0, color=colour, linewidth=1.2 if is_own else 0.8, label=label)
        if is_own:
            axes.stairs(drawn, edges, baseline=0, color=colour, alpha=0.35, fill=True)
    axes.set_yscale("symlog", linthresh=1)
    first, second = map(brief, models)
    separator = "\n" if len(first + second) > 16 else " "
    axes.set(xlabel=f"Δ-norm (0: {first} only,{separator}1: {second} only)", ylabel="latents", xlim=(-0.01, 1.01))
    axes.set_ylim(0, 1.5 * max(1, *(int(count_b.max()) for count_b in counts.values())))
    for edge in (owner.delta_norm_low, owner.delta_norm_high):
        axes.axvline(edge, color=INK, linewidth=0.5, linestyle=(0, (3, 3)))
    top = axes.get_ylim()[1]
    axes.set_yticks([tick for tick in (0, 1, 10, 100, 1000, 10_000, 100_000) if tick <= top])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=1 if separator == "\n" else 2,
        columnspacing=0.8,
        handlelength=0.8,
        handletextpad=0.4,
        borderaxespad=0.1,
    )


def candidates_panel(axes: Axes, latents: Columns, models: list[str], colours: Colours, owner: OwnerConfig) -> None:
    """Both nu of the candidates, those by decoder norms of either model as focus, before shared latents."""
    outside = _dots(axes, latents, models[1], latents["owner"] == "shared", GREY, "shared")
    for model in models:
        candidate, own = candidates_of(latents, models, model, owner), latents["owner"] == model
        outside += _dots(axes, latents, model, candidate & ~own, colours[model], None)
        label = f"{brief(model)}: {own.sum():,} of {candidate.sum():,}"
        outside += _marks(axes, latents, model, own, "o", colours[model], label)
    _frame(axes, owner, f"{outside:,} latents beyond the axes" if outside else "")
    axes.set(ylabel="ν reconstruction (decoupling →)", xlabel="ν error (shrinkage →)")
    axes.set_ylim(top=NU_HIGH + 0.6)  # room for the legend, which comes last


def remaining_panel(axes: Axes, latents: Columns, models: list[str], colours: Colours, owner: OwnerConfig) -> None:
    """How many candidates of each model are left after every further condition; the last bars are its own latents."""
    steps = {model: remaining_of(latents, models, model, owner) for model in models}
    names, places = list(steps[models[0]]), list[float]()
    for model in models:
        start = len(places) + 1.3 * (1 + models.index(model))
        axes.annotate(brief(model, 24), (0, start - 1), (2, 0), textcoords="offset points", va="center", fontsize=7)
        for number, count in enumerate(steps[model].values()):
            place = start + number
            axes.barh(place, count, color=colours[model], alpha=1 - 0.25 * (len(names) - 1 - number), height=0.75)
            axes.annotate(f"{count:,}", (count, place), (2, 0), textcoords="offset points", va="center", fontsize=7)
            places.append(place)
    axes.set_yticks(places, names * len(models))
    axes.set_ylim(places[-1] + 0.6, -0.2)
    axes.margins(x=0.24)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set(xlabel="latents left")


Fill = Callable[[Axes, Columns, list[str], Colours, OwnerConfig], None]
PANELS: dict[str, Fill] = {"delta_norm": delta_norm_panel, "nu": candidates_panel, "remaining": remaining_panel}


def candidates_of(latents: Columns, models: list[str], focus: str, owner: OwnerConfig) -> np.ndarray:
    """Mask of the living latents whose decoder norms allow `focus` alone to own them, dedicated ones included."""
    delta = latents["delta_norm"]
    beyond = delta < owner.delta_norm_low if focus == models[0] else delta > owner.delta_norm_high
    return beyond & (latents["owner"] != "dead")


def remaining_of(latents: Columns, models: list[str], focus: str, owner: OwnerConfig) -> dict[str, int]:
    """Candidates of `focus` by decoder norms, those with a small nu error, and its own latents."""
    candidate = candidates_of(latents, models, focus, owner)
    small = np.abs(latents[f"nu_error_{focus}"]) < owner.max_nu_error
    counts = candidate.sum(), (candidate & small).sum(), (latents["owner"] == focus).sum()
    return dict(zip(("Δ-norm", "+ ν error", "+ ν reconstr."), map(int, counts), strict=True))


def nu_scatter(
    latents: Columns, models: list[str], colours: Colours, owner: OwnerConfig, nulls: Sequence[NullRange] = ()
) -> Figure:
    """nu_reconstruction against nu_error with each of two models as focus; the model's own latents in its colour, and
    where nu lies when there is nothing to find.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, model in zip(panels, models, strict=True):
            _focus_panel(axes, latents, model, colours[model], owner)
            _null_crosses(axes, nulls, model, models[0] if model == models[1] else models[1])
            if axes.get_legend_handles_labels()[1]:
                axes.legend(loc="upper left", handletextpad=0.2)
        panels[0].set_ylabel("ν reconstruction (latent decoupling →)")
        return figure


def _focus_panel(axes: Axes, latents: Columns, focus: str, colour: str, owner: OwnerConfig) -> None:
    own, dedicated = latents["owner"] == focus, latents["dedicated"].astype(bool)
    outside = _dots(axes, latents, focus, ~own, GREY, None)
    for marker, mask, name in (("o", ~dedicated, "free"), ("D", dedicated, "dedicated")):
        outside += _marks(
            axes,
            latents,
            focus,
            own & mask,
            marker,
            colour,
            f"{brief(focus, 30)}-only, {name} ({(own & mask).sum():,})",
        )
    _frame(axes, owner, f"focus {brief(focus, 30)}" + (f" ({outside:,} latents beyond the axes)" if outside else ""))
    axes.set_xlabel("ν error (complete shrinkage →)")


def _dots(axes: Axes, latents: Columns, focus: str, mask: np.ndarray, colour: str, label: str | None) -> int:
    """Small faint points of the latents in `mask`; how many lie outside."""
    points, outside = _points(latents, focus, mask)
    axes.scatter(*points, color=colour, alpha=0.35, label=label, **DOTS)
    return outside


def _marks(axes: Axes, latents: Columns, focus: str, mask: np.ndarray, marker: str, colour: str, label: str) -> int:
    """Large points of the latents in `mask`, of which there may be none; how many lie outside."""
    points, outside = _points(latents, focus, mask)
    if mask.any():
        many = int(mask.sum()) > MAX_VECTOR_MARKS
        axes.scatter(*points, marker=marker, color=colour, label=label, rasterized=many, **MARKS)
    return outside


def _null_crosses(axes: Axes, nulls: Sequence[NullRange], focus: str, other: str) -> None:
    """Medians of nulls with lines from their 5 to their 95 % quantiles."""
    for null in nulls:
        if (null.focus, null.other) == (focus, other):
            (low, x, high), (below, y, above) = null.error, null.reconstruction
            colour = NULL_COLOURS.get(null.name, INK)
            axes.errorbar(
                x,
                y,
                xerr=[[x - low], [high - x]],
                yerr=[[y - below], [above - y]],
                color=colour,
                elinewidth=0.9,
                marker=".",
                markersize=3,
                linestyle="none",
                label=f"{null.name.replace('_', ' ')}s, 5–95 %" if null.name == RANDOM else f"{null.name}, 5–95 %",
            )


def _points(latents: Columns, focus: str, mask: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """Both nu of the latents in `mask` that lie in the drawn part, and how many finite ones do not."""
    error, reconstruction = latents[f"nu_error_{focus}"], latents[f"nu_reconstruction_{focus}"]
    finite = mask & np.isfinite(error) & np.isfinite(reconstruction)
    inside = finite & (np.minimum(error, reconstruction) >= NU_LOW) & (np.maximum(error, reconstruction) <= NU_HIGH)
    return (error[inside], reconstruction[inside]), int(finite.sum() - inside.sum())


def _frame(axes: Axes, owner: OwnerConfig, title: str) -> None:
    """The thresholds (solid for free latents, dotted for dedicated ones) and the drawn part."""
    for height, style in ((owner.max_nu_reconstruction, "-"), (owner.max_nu_reconstruction_dedicated, ":")):
        box = (-owner.max_nu_error, -height), 2 * owner.max_nu_error, 2 * height
        axes.add_patch(Rectangle(*box, fill=False, edgecolor=INK, linewidth=0.6, linestyle=style))
    axes.set(
        xlim=(NU_LOW, NU_HIGH), ylim=(NU_LOW, NU_HIGH), xticks=[-0.5, 0, 0.5, 1, 1.5], yticks=[-0.5, 0, 0.5, 1, 1.5]
    )
    axes.set_title(title, loc="right" if title.endswith("axes") else "left", fontsize=7 if title else None)
