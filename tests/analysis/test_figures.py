"""Figures show the numbers they are given and come out as the files that they promise."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import matplotlib.colors
import pytest

from analysis import figures
from analysis.columns import Columns, of_two_models, read_columns
from analysis.comparison import compare_counts
from analysis.config import CompareConfig, OwnerConfig
from analysis.counts import Counts
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
    assert figures.series(metrics, "train/loss") == ([1], [3.0])
    figure = figures.training_curves(metrics, MODELS, COLOURS)
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1]


def test_the_histogram_counts_every_living_latent_once(latents: Columns) -> None:
    figure = figures.delta_norm_histogram(latents, MODELS, COLOURS, OwnerConfig())
    bars = [patch for patch in figure.axes[0].patches if patch.get_width() > 0]
    assert sum(patch.get_height() for patch in bars) == (latents["owner"] != "dead").sum()
    last = matplotlib.colors.to_rgba(COLOURS["simpo"])
    assert sum(patch.get_height() for patch in bars if patch.get_facecolor() == last) == 3


def test_the_scatter_marks_the_models_own_latents(latents: Columns) -> None:
    figure = figures.nu_scatter(latents, MODELS, COLOURS, OwnerConfig())
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["simpo-only, dedicated (3)"]
    assert figure.axes[0].get_legend() is None
    own = figure.axes[1].collections[-1].get_offsets()
    assert sorted(own[:, 0].tolist()) == sorted(latents["nu_error_simpo"][300:303].tolist())


def test_the_forest_shows_shares_and_intervals_in_percent() -> None:
    counts = Counts("category", ["simpo", "dpo"], {"x": [2, 4], "y": [0, 0]}, [112, 89])
    (comparison,) = compare_counts(counts, CompareConfig(resamples=50))
    figure = figures.forest(comparison, COLOURS)
    shares, differences = figure.axes
    assert [label.get_text() for label in shares.get_yticklabels()] == ["x  2 | 4"]  # y has no latent in either
    points = sorted(line.get_xdata()[0] for line in shares.lines)
    assert points == pytest.approx([100 * 2 / 112, 100 * 4 / 89])
    low, high = differences.collections[0].get_segments()[0][:, 0]
    change = comparison.changes[0]
    assert (low, high) == pytest.approx((100 * change.difference_low, 100 * change.difference_high))


def test_files_are_what_their_names_say_and_the_same_every_time(tmp_path: Path, latents: Columns) -> None:
    def draw() -> dict[str, bytes]:
        figure = figures.nu_scatter(latents, MODELS, COLOURS, OwnerConfig())
        figures.save(figure, tmp_path / "figures", "nu")
        kinds = {kind: (tmp_path / "figures" / f"nu.{kind}").read_bytes() for kind in ("pdf", "png")}
        return {**kinds, "svg": figures.svg(figure)}

    first, second = draw(), draw()
    assert first["pdf"].startswith(b"%PDF-") and first["png"].startswith(b"\x89PNG")
    assert ElementTree.fromstring(first["svg"]).tag.endswith("svg")
    assert first == second
    assert not list((tmp_path / "figures").glob("*.partial"))
