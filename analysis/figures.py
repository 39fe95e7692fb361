"""Figures for papers: journal width, colour-blind safe (Okabe & Ito), one colour per model throughout.

Every function returns a matplotlib Figure; `save` writes it as PDF and PNG, `svg` gives it to the report.
"""

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.columns import Columns
from analysis.comparison import Comparison
from analysis.config import OwnerConfig
from extract.publish import publishing

BASE_COLOUR = "#0072B2"
TUNED_COLOURS = ["#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
GREY, LIGHT, INK = "#8a8a8a", "#cfcfcf", "#222222"
WIDTH = 7.0  # inches: two columns of a journal page
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "crossdiff",
}
# The same figure twice gives the same bytes.
NO_DATE: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}

Metrics = list[dict[str, Any]]


def model_colours(pairs: list[list[str]]) -> dict[str, str]:
    """One colour per model: blue for models that are only ever a base, others in order of appearance."""
    tuned = list(dict.fromkeys(model for pair in pairs for model in pair[1:]))
    colours = {model: TUNED_COLOURS[index % len(TUNED_COLOURS)] for index, model in enumerate(tuned)}
    return {model: colours.get(model, BASE_COLOUR) for pair in pairs for model in pair}


def training_curves(metrics: Metrics, models: list[str], colours: dict[str, str]) -> Figure:
    """The whole loss of the training steps, and variance explained: training faint, held-out documents strong."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
        loss, explained = figure.subplots(1, 2)
        loss.plot(*series(metrics, "train/loss"), color=INK)
        loss.set(title="Training loss, all terms", xlabel="step")
        for model in models:
            name = f"variance_explained/{model}"
            explained.plot(*series(metrics, f"train/{name}"), color=colours[model], alpha=0.3, linewidth=0.8)
            held_out = series(metrics, f"val/{name}")
            last = f"  {held_out[1][-1]:.3f}" if len(held_out[1]) else ""
            explained.plot(*held_out, color=colours[model], marker="o", markersize=2.5, label=f"{model}{last}")
        explained.set(title="Variance explained (held-out strong, training faint)", xlabel="step")
        low = min(
            (value for model in models for value in series(metrics, f"val/variance_explained/{model}")[1]), default=0.0
        )
        explained.set_ylim(max(min(0.0, low), -0.2), 1)
        explained.legend(loc="lower right")
        for axes in (loss, explained):
            axes.set_xlim(left=0)
        return figure


def series(metrics: Metrics, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one logged number; steps without it, or where it was not finite, are left out."""
    points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def delta_norm_histogram(latents: Columns, models: list[str], colours: dict[str, str], owner: OwnerConfig) -> Figure:
    """How many latents have which Delta-norm, on a log scale, by owner; dead latents are left out.

    `latents` are the columns of the two `models`, base first, as `columns.of_two_models` gives them.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 2, 2.4), layout="constrained")
        axes = figure.subplots()
        parts = {
            "other": (latents["owner"] == "other", LIGHT),
            "shared": (latents["owner"] == "shared", GREY),
            **{f"{model}-only": (latents["owner"] == model, colours[model]) for model in models},
        }
        axes.hist(
            [latents["delta_norm"][mask] for mask, _ in parts.values()],
            bins=np.linspace(0, 1, 51).tolist(),
            stacked=True,
            color=[colour for _, colour in parts.values()],
            label=[f"{name} ({mask.sum():,})" for name, (mask, _) in parts.items()],
        )
        for edge in (owner.delta_norm_low, owner.delta_norm_high):
            axes.axvline(edge, color=INK, linewidth=0.5, linestyle=(0, (3, 3)))
        axes.set_yscale("symlog", linthresh=1)
        axes.set(xlabel=f"Δ-norm   (0 = {models[0]} only, 1 = {models[1]} only)", ylabel="latents", xlim=(0, 1))
        axes.set_ylim(0, 1.5 * axes.get_ylim()[1])
        axes.set_yticks([t for t in (0, 1, 10, 100, 1000, 10000, 100000) if t <= axes.get_ylim()[1]])
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.24), ncols=2)
        return figure


def nu_scatter(latents: Columns, models: list[str], colours: dict[str, str], owner: OwnerConfig) -> Figure:
    """nu_reconstruction against nu_error with each of two models as focus; the model's own latents in its colour.

    `latents` as for `delta_norm_histogram`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, model in zip(panels, models, strict=True):
            _nu_panel(axes, latents, model, colours[model], owner)
        panels[0].set_ylabel("ν reconstruction (latent decoupling →)")
        return figure


def _nu_panel(axes: Axes, latents: Columns, focus: str, colour: str, owner: OwnerConfig) -> None:
    error, reconstruction = latents[f"nu_error_{focus}"], latents[f"nu_reconstruction_{focus}"]
    own = latents["owner"] == focus
    dedicated = latents["dedicated"].astype(bool)
    shown = np.isfinite(error) & np.isfinite(reconstruction)
    inside = (error >= -0.5) & (error <= 1.5) & (reconstruction >= -0.5) & (reconstruction <= 1.5)
    rest = shown & inside & ~own
    axes.scatter(error[rest], reconstruction[rest], s=3, color=GREY, alpha=0.35, linewidths=0, rasterized=True)
    for marker, mask, name in (("o", ~dedicated, "free"), ("D", dedicated, "dedicated")):
        chosen = own & mask & shown
        if chosen.any():
            label = f"{focus}-only, {name} ({chosen.sum()})"
            axes.scatter(
                error[chosen],
                reconstruction[chosen],
                s=13,
                marker=marker,
                color=colour,
                linewidths=0.3,
                edgecolors="white",
                label=label,
            )
    for height, style in ((owner.max_nu_reconstruction, "-"), (owner.max_nu_reconstruction_dedicated, ":")):
        box = (-owner.max_nu_error, -height), 2 * owner.max_nu_error, 2 * height
        axes.add_patch(Rectangle(*box, fill=False, edgecolor=INK, linewidth=0.6, linestyle=style))
    hidden = int((shown & ~inside).sum())
    title = f"focus {focus}" + (f" ({hidden} latents outside)" if hidden else "")
    axes.set(title=title, xlabel="ν error (complete shrinkage →)", xlim=(-0.5, 1.5), ylim=(-0.5, 1.5))
    if own.any():
        axes.legend(loc="upper left")


def forest(comparison: Comparison, colours: dict[str, str]) -> Figure:
    """Shares of both models with Wilson intervals and their differences with Newcombe intervals, by category."""
    changes = [change for change in comparison.changes if change.count_a + change.count_b][::-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.0 + 0.22 * max(len(changes), 2)), layout="constrained")
        shares, differences = figure.subplots(1, 2, sharey=True, width_ratios=[1.2, 1])
        rows = np.arange(len(changes))
        for side, model, shift in (("a", comparison.model_a, 0.16), ("b", comparison.model_b, -0.16)):
            centre, low, high = (
                np.array([getattr(c, f"share_{side}{end}") for c in changes]) for end in ("", "_low", "_high")
            )
            _intervals(shares, centre, low, high, rows + shift, colours.get(model, INK), model)
        centre, low, high = (
            np.array([getattr(c, f"difference{end}") for c in changes]) for end in ("", "_low", "_high")
        )
        _intervals(differences, centre, low, high, rows, INK, None)
        differences.axvline(0, color=GREY, linewidth=0.6)
        shares.set_yticks(rows, [f"{c.name}  {c.count_a} | {c.count_b}" for c in changes])
        shares.set(xlabel="share of the model's own latents (%)")
        shares.set_xlim(left=0)
        differences.set(xlabel=f"{comparison.model_b} − {comparison.model_a} (points)")
        shares.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handletextpad=0.1)
        if comparison.annotator:
            figure.supxlabel(f"annotator: {comparison.annotator}", fontsize=6, color=GREY)
        for axes in (shares, differences):
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        return figure


def _intervals(
    axes: Axes, centre: np.ndarray, low: np.ndarray, high: np.ndarray, rows: np.ndarray, colour: str, label: str | None
) -> None:
    """Points with horizontal intervals, in percent."""
    axes.hlines(rows, 100 * low, 100 * high, color=colour, linewidth=1)
    axes.plot(100 * centre, rows, "o", color=colour, markersize=3.2, label=label)


def save(figure: Figure, folder: Path, name: str) -> None:
    """Publish `<name>.pdf` and `<name>.png` (300 dpi) in `folder`."""
    for kind in ("pdf", "png"):
        with matplotlib.rc_context(STYLE), publishing(folder / f"{name}.{kind}") as file:
            figure.savefig(file, format=kind, dpi=300, metadata=NO_DATE[kind])


def svg(figure: Figure) -> bytes:
    """The figure as SVG with text as outlines; dense points are an embedded image."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", dpi=200, metadata=NO_DATE["svg"])
    return buffer.getvalue()
