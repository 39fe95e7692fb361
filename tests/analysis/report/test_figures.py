"""Figures show the numbers they are given and come out as the files that they promise."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from analysis.compare.counts import Counts
from analysis.compare.step import compare_counts
from analysis.config import CompareConfig, OwnerConfig
from analysis.latents.columns import Columns, of_two_models, read_columns
from analysis.report import figure_selection, figures, training
from analysis.report.figure_comparison import MAX_RATIO, forest, forest_caption
from analysis.report.figure_selection import PANELS
from analysis.report.null_ranges import NullRange
from tests.analysis.made_study import write_latents

MODELS = ["base", "simpo"]
COLOURS = figures.model_colours([MODELS, ["base", "dpo"]])


@pytest.fixture
def latents(tmp_path: Path) -> Columns:
    write_latents(tmp_path / "latents.parquet", MODELS, {300, 301, 302})
    return of_two_models(read_columns(tmp_path), MODELS, *MODELS)


def test_a_model_has_one_colour_and_no_two_models_share_one() -> None:
    assert len(set(COLOURS.values())) == 3
    assert figures.model_colours([MODELS, ["simpo", "dpo"]])["simpo"] == figures.model_colours([MODELS])["simpo"]


def test_curves_leave_out_steps_without_a_value() -> None:
    metrics = [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": None}, {"step": 3, "val/l0": 1.0}]
    assert training.series(metrics, "train/loss") == ([1], [3.0])
    figure = training.training_curves(metrics, MODELS, COLOURS)
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1]


def test_the_histogram_counts_every_living_latent_once_and_every_outline_from_zero(latents: Columns) -> None:
    axes = figure_selection.single_panel("delta_norm", latents, MODELS, COLOURS, OwnerConfig()).axes[0]
    outlines = {patch.get_label(): patch for patch in axes.patches if "(" in patch.get_label()}
    counts = {name: np.nansum(patch.get_data().values) for name, patch in outlines.items()}
    assert sum(counts.values()) == (latents["owner"] != "dead").sum()
    # The three own latents at Delta-norm 1 are three of the axis' height, whatever else lies there.
    own = outlines["simpo-only (3)"]
    assert counts["simpo-only (3)"] == 3 and own.get_data().baseline == 0 and np.nanmax(own.get_data().values) == 3
    assert own.get_edgecolor() == matplotlib.colors.to_rgba(COLOURS["simpo"])
    assert own.get_zorder() >= max(patch.get_zorder() for patch in outlines.values())


def test_the_legend_of_the_histogram_lies_above_the_axes(latents: Columns) -> None:
    figure = figure_selection.figure_one(latents, MODELS, COLOURS, OwnerConfig())
    canvas, axes = FigureCanvasAgg(figure), figure.axes[0]
    canvas.draw()
    legend = axes.get_legend().get_window_extent()
    assert legend.y0 >= axes.get_window_extent().y1
    (letter,) = (text for text in axes.findobj(Text) if text.get_text() == "a")
    assert not legend.overlaps(letter.get_window_extent()) and axes.get_ylim()[1] < 10 * 400
    # The smallest axis value leaves room for the boxes of both thresholds.
    assert -OwnerConfig().max_nu_reconstruction_dedicated > figure_selection.NU_LOW


def test_the_scatter_marks_the_models_own_latents(latents: Columns) -> None:
    figure = figure_selection.nu_scatter(latents, MODELS, COLOURS, OwnerConfig())
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["simpo-only, dedicated (3)"]
    assert figure.axes[0].get_legend() is None
    own = figure.axes[1].collections[-1].get_offsets()
    assert sorted(own[:, 0].tolist()) == sorted(latents["nu_error_simpo"][300:303].tolist())


def test_the_forest_shows_shares_and_intervals_in_percent() -> None:
    counts = Counts("category", ["simpo", "dpo"], {"x": [2, 4], "y": [0, 0]}, [112, 89])
    (comparison,) = compare_counts(counts, CompareConfig(resamples=50))
    figure = forest(comparison, COLOURS)
    shares, differences, ratios = figure.axes
    assert [label.get_text() for label in shares.get_yticklabels()] == ["x  2 | 4"]  # y has no latent in either
    assert shares.get_xlim()[0] < 0, "points at 0 % lie off the names"
    points = sorted(line.get_xdata()[0] for line in shares.lines)
    assert points == pytest.approx([100 * 2 / 112, 100 * 4 / 89])
    low, high = differences.collections[0].get_segments()[0][:, 0]
    change = comparison.changes[0]
    assert (low, high) == pytest.approx((100 * change.difference_low, 100 * change.difference_high))


def test_files_are_what_their_names_say_and_the_same_every_time(tmp_path: Path, latents: Columns) -> None:
    def draw() -> dict[str, bytes]:
        figure = figure_selection.nu_scatter(latents, MODELS, COLOURS, OwnerConfig())
        figures.save(figure, tmp_path / "figures", "nu")
        kinds = {kind: (tmp_path / "figures" / f"nu.{kind}").read_bytes() for kind in ("pdf", "png")}
        return {**kinds, "svg": figures.svg(figure)}

    first, second = draw(), draw()
    assert first["pdf"].startswith(b"%PDF-") and first["png"].startswith(b"\x89PNG")
    assert ElementTree.fromstring(first["svg"]).tag.endswith("svg")
    assert first == second
    assert not list((tmp_path / "figures").glob("*.partial"))


# As long as names of members are.
LONG = ["base-model-8b@model.layers.13", "tuned-model-8b@model.layers.13"]


def test_figures_have_the_widths_of_a_journal_and_no_text_beyond_them(tmp_path: Path) -> None:
    write_latents(tmp_path / "latents.parquet", LONG, set(range(100, 390)))
    latents, colours = of_two_models(read_columns(tmp_path), LONG, *LONG), figures.model_colours([LONG])
    owner = OwnerConfig()
    nulls = [NullRange("random_direction", *focus, (-0.1, 0.0, 0.1), (-0.2, 0.0, 0.2)) for focus in (LONG, LONG[::-1])]
    by_name = {f"a category with a name of some length {number}": [number, 10 - number] for number in range(8)}
    (comparison,) = compare_counts(Counts("category", LONG, by_name, [112, 89]), CompareConfig(resamples=50))
    drawn = {
        "one": (figure_selection.figure_one(latents, LONG, colours, owner, nulls), 183),
        "scatter": (figure_selection.nu_scatter(latents, LONG, colours, owner, nulls), 183),
        "forest": (forest(comparison, colours), 183),
        **{kind: (figure_selection.single_panel(kind, latents, LONG, colours, owner, nulls), 89) for kind in PANELS},
    }
    for name, (figure, millimetres) in drawn.items():
        figures.save(figure, tmp_path, name)
        content = (tmp_path / f"{name}.pdf").read_bytes()
        box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+)", content)
        assert box and float(box[1]) == pytest.approx(millimetres / 25.4 * 72, abs=0.5), name
        assert b"/Subtype /Type3" not in content and b"/FontFile2" in content, name
        canvas, whole = FigureCanvasAgg(figure), figure.bbox_inches
        canvas.draw()
        drawn_box = figure.get_tightbbox(canvas.get_renderer())
        assert drawn_box.x0 >= -0.01 and drawn_box.x1 <= whole.width + 0.01, (name, drawn_box)
        assert drawn_box.y0 >= -0.01 and drawn_box.y1 <= whole.height + 0.01, (name, drawn_box)
        assert all(text.get_fontsize() >= 7 for text in figure.findobj(Text) if text.get_text()), name


def test_what_remains_is_counted_condition_by_condition(latents: Columns) -> None:
    axes = figure_selection.single_panel("remaining", latents, MODELS, COLOURS, OwnerConfig()).axes[0]
    # Latents 300 to 302 have Delta-norm 1, a small nu error, and are owned; no latent of the base has Delta-norm 0.
    assert [bar.get_width() for bar in axes.patches] == [0, 0, 0, 3, 3, 3]
    named = [text.get_text() for text in axes.texts]
    assert named == ["base", "0", "0", "0", "simpo", "3", "3", "3"]


def test_nulls_are_crosses_over_their_quantiles(latents: Columns) -> None:
    null = NullRange("random_direction", "simpo", "base", (-0.1, 0.0, 0.3), (-0.2, 0.1, 0.2))
    base, simpo = figure_selection.nu_scatter(latents, MODELS, COLOURS, OwnerConfig(), [null]).axes
    assert not base.containers
    (cross,) = simpo.containers
    assert (cross[0].get_xdata()[0], cross[0].get_ydata()[0]) == (0.0, 0.1)
    across, along = (collection.get_segments()[0].tolist() for collection in cross[2])
    assert across == [pytest.approx([-0.1, 0.1]), pytest.approx([0.3, 0.1])]
    assert along == [pytest.approx([0.0, -0.2]), pytest.approx([0.0, 0.2])]


def test_changes_without_a_bound_are_arrows() -> None:
    counts = Counts("category", ["simpo", "dpo"], {"x": [0, 9], "y": [8, 0], "z": [40, 40]}, [100, 100])
    (comparison,) = compare_counts(counts, CompareConfig(resamples=50))
    ratios = forest(comparison, COLOURS).axes[2]
    marks = [(line.get_marker(), line.get_ydata()[0]) for line in ratios.lines if line.get_marker() in "<>o"]
    # Rows from below: z, y, x. x rises from nothing, y falls to nothing, z stays.
    assert marks == [("o", 0), ("<", 1), (">", 2)]
    # Their ratios are 0 and infinite: hollow, at the ends.
    ends = [(line.get_xdata()[0], line.get_markerfacecolor()) for line in ratios.lines if line.get_marker() in "<>"]
    assert ends == [(1 / MAX_RATIO, "white"), (MAX_RATIO, "white")]
    assert [label.get_text() for label in ratios.get_xticklabels()] == ["1/8", "1", "8"]
    assert "ratio" in ratios.get_xlabel()


def test_an_arrow_of_an_interval_alone_is_filled() -> None:
    counts = Counts("category", ["simpo", "dpo"], {"x": [1, 9]}, [100, 100])
    (comparison,) = compare_counts(counts, CompareConfig(resamples=50))
    ratios = forest(comparison, COLOURS).axes[2]
    arrows = [line.get_markerfacecolor() for line in ratios.lines if line.get_marker() == ">"]
    assert arrows == [figures.INK]
    assert [line.get_xdata()[0] for line in ratios.lines if line.get_marker() == "o"] == [pytest.approx(9)]


def test_what_may_be_claimed_has_a_star_in_the_figure_and_the_caption_says_so() -> None:
    counts = Counts("category", ["simpo", "dpo"], {"x": [5, 60], "y": [40, 38]}, [100, 100])
    (comparison,) = compare_counts(counts, CompareConfig(resamples=200))
    names = [label.get_text() for label in forest(comparison, COLOURS).axes[0].get_yticklabels()]
    assert names == ["y  40 | 38", "x  5 | 60 *"]
    caption = forest_caption(comparison)
    assert "a star marks what may be claimed: 1 of 2" in caption and "95\u00a0% Wilson" in caption
