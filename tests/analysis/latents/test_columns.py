"""Columns of pairs of models: what was written for three is read back for any two; the worst of several counts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from analysis.config import OwnerConfig
from analysis.latents.columns import (
    delta_norm_of,
    members_of,
    models_of,
    nu_of,
    of_two_models,
    owner_name,
    owners_in_order,
    read_columns,
)
from analysis.report import figures
from analysis.report.cards import read_rows
from analysis.report.figure_selection import nu_scatter, single_panel
from analysis.report.nearest import nearest_to
from tests.analysis.made_study import NUM_LATENTS, write_latents, write_latents_of_many

MODELS = ["base", "simpo", "dpo"]
OWN = {"base": {9}, "simpo": {300, 301}, "dpo": {350}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_latents_of_many(tmp_path / "latents.parquet", MODELS, OWN)
    return tmp_path


def test_models_come_in_their_order(folder: Path) -> None:
    assert models_of(folder) == MODELS


@pytest.mark.parametrize("tuned", ["simpo", "dpo"])
def test_two_of_three_models_look_like_a_crosscoder_of_these_two(folder: Path, tuned: str) -> None:
    columns = read_columns(folder)
    seen = of_two_models(columns, MODELS, "base", tuned)
    assert {"owner", "dedicated", "delta_norm", "nu_error_base", f"nu_error_{tuned}"} <= seen.keys()
    owners = {name: set(np.flatnonzero(seen["owner"] == name)) for name in MODELS}
    assert owners == {name: OWN[name] if name in ("base", tuned) else set() for name in MODELS}
    assert seen["delta_norm"][9] == 0 and set(seen["delta_norm"][sorted(OWN[tuned])]) == {1}
    np.testing.assert_array_equal(seen[f"nu_error_{tuned}"], columns[f"nu_error_{tuned}_base"])
    np.testing.assert_array_equal(seen["nu_reconstruction_base"], columns[f"nu_reconstruction_base_{tuned}"])


@pytest.mark.parametrize(
    ("owner", "members"), [("base", [0]), ("simpo+dpo", [1, 2]), ("shared", [0, 1, 2]), ("other", []), ("dead", [])]
)
def test_an_owner_is_a_set_of_models(owner: str, members: list[int]) -> None:
    names = [MODELS[member] for member in members]
    assert members_of(owner, MODELS) == names
    assert owner_name(names, MODELS) == (owner if owner != "dead" else "other")


def test_owners_are_ordered_by_size_and_then_as_the_models_are() -> None:
    found = ["dead", "simpo+dpo", "shared", "dpo", "base+dpo", "other", "base", "base+simpo"]
    assert owners_in_order(found, MODELS) == ["base", "dpo", "base+simpo", "base+dpo", "simpo+dpo"]


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (("base", "simpo"), ["shared", "simpo", "base", "dead"]),
        (("base", "dpo"), ["base", "dpo", "shared", "dead"]),
        (("simpo", "dpo"), ["simpo", "shared", "dpo", "dead"]),
    ],
)
def test_two_of_three_models_see_their_part_of_an_owner(
    folder: Path, pair: tuple[str, str], expected: list[str]
) -> None:
    columns = read_columns(folder)
    columns["owner"] = np.resize(np.array(["base+simpo", "simpo+dpo", "base+dpo", "dead"]), NUM_LATENTS)
    assert of_two_models(columns, MODELS, *pair)["owner"].tolist() == expected * (NUM_LATENTS // 4)


def test_two_models_are_themselves(tmp_path: Path) -> None:
    write_latents(tmp_path / "latents.parquet", MODELS[:2], {300})
    columns = read_columns(tmp_path)
    for name, column in of_two_models(columns, MODELS[:2], *MODELS[:2]).items():
        np.testing.assert_array_equal(column, columns[name])


@pytest.mark.parametrize("tuned", ["simpo", "dpo"])
def test_figures_show_each_tuned_model_beside_the_base(folder: Path, tuned: str) -> None:
    pair, colours = ["base", tuned], figures.model_colours([MODELS])
    seen = of_two_models(read_columns(folder), MODELS, *pair)
    histogram = single_panel("delta_norm", seen, pair, colours, OwnerConfig())
    labels = [text.get_text() for text in histogram.axes[0].get_legend().get_texts()]
    assert {"base-only (1)", f"{tuned}-only ({len(OWN[tuned])})"} <= set(labels)
    scatter = nu_scatter(seen, pair, colours, OwnerConfig())
    own = scatter.axes[1].collections[-1].get_offsets()
    assert sorted(own[:, 0].tolist()) == sorted(seen[f"nu_error_{tuned}"][sorted(OWN[tuned])].tolist())


ROW = {
    "delta_norm_b_s": 0.9, "delta_norm_s_b": 0.1, "delta_norm_b_d": 0.3, "delta_norm_d_b": 0.7,
    "delta_norm_s_d": 0.2, "delta_norm_d_s": 0.8,
    "nu_error_s_b": 0.1, "nu_error_s_d": -0.4, "nu_reconstruction_s_b": 0.3, "nu_reconstruction_s_d": 0.2,
    "nu_error_b_s": math.nan, "nu_error_b_d": 0.5, "nu_reconstruction_b_s": 0.5, "nu_reconstruction_b_d": math.nan,
}  # fmt: skip


def test_the_worst_of_several_models_counts() -> None:
    models = ["b", "s", "d"]
    assert delta_norm_of(ROW, models, "b") == 0.9  # s has the latent most, which speaks against b
    assert delta_norm_of(ROW, models, "s") == 0.8  # 0.9 towards b, 0.8 towards d
    assert nu_of(ROW, models, "s") == (-0.4, 0.3)
    assert all(math.isnan(value) for value in nu_of(ROW, models, "b"))  # first or last, NaN passes no threshold
    # b and s against d: 0.3 and 0.2, of which 0.3 speaks more against them. s and d against b: 0.9 and 0.3, so 0.3.
    assert (delta_norm_of(ROW, models, "b+s"), delta_norm_of(ROW, models, "s+d")) == (0.3, 0.3)
    assert nu_of({**ROW, "nu_error_d_b": 0.2, "nu_reconstruction_d_b": -0.9}, models, "s+d") == (0.2, -0.9)
    assert delta_norm_of({"delta_norm": 0.2}, models[:2], "s") == 0.2
    assert nu_of({"nu_error_s": 0.1, "nu_reconstruction_s": 0.2}, models[:2], "s") == (0.1, 0.2)


def test_the_nearest_latents_of_a_third_model_are_measured_against_all_others(tmp_path: Path) -> None:
    write_latents_of_many(tmp_path / "latents.parquet", MODELS, {})
    rows = read_rows(tmp_path)
    leaning = {row["latent"]: min(row["delta_norm_base_dpo"], row["delta_norm_simpo_dpo"]) for row in rows}
    found = [near.latent for near in nearest_to("dpo", rows, MODELS, OwnerConfig())]
    assert found == sorted(range(NUM_LATENTS), key=lambda latent: -leaning[latent])[:5]
