"""Whose a latent is by the intervals of nu: certain, across a threshold, within reach."""

from __future__ import annotations

from typing import Any

import pytest

from analysis.config import OwnerConfig
from analysis.latents.certainty import CERTAIN, CROSSES, UNKNOWN, Counted, certainty_of, counted, is_within_reach

MODELS = ["base", "simpo"]


def row_of(
    error: tuple[float | None, float | None],
    reconstruction: tuple[float | None, float | None],
    owner: str = "simpo",
    delta: float = 0.95,
    dedicated: bool = False,
) -> dict[str, Any]:
    """A latent with simpo as focus; with the base as focus both nu are 1."""
    row: dict[str, Any] = {"owner": owner, "delta_norm": delta, "dedicated": dedicated}
    for name, interval in (("nu_error", error), ("nu_reconstruction", reconstruction)):
        row |= {f"{name}_simpo_{end}": value for end, value in zip(("low", "high"), interval, strict=True)}
        row |= {f"{name}_base_{end}": 1.0 for end in ("low", "high")}
    return row


@pytest.mark.parametrize(
    ("error", "reconstruction", "dedicated", "said"),
    [
        ((-0.1, 0.19), (0.1, 0.49), False, CERTAIN),
        ((-0.1, 0.21), (0.1, 0.49), False, CROSSES),
        ((-0.21, 0.1), (0.1, 0.49), False, CROSSES),  # thresholds hold for the size
        ((-0.1, 0.19), (0.1, 0.6), False, CROSSES),
        ((-0.1, 0.19), (0.1, 0.6), True, CERTAIN),  # dedicated ones may reconstruct up to 0.75
        ((float("nan"), float("nan")), (0.1, 0.2), False, UNKNOWN),
        ((None, None), (0.1, 0.2), False, UNKNOWN),
    ],
)
def test_a_latent_is_certain_if_its_whole_intervals_are_inside(
    error: tuple[float, float], reconstruction: tuple[float, float], dedicated: bool, said: str
) -> None:
    assert certainty_of(row_of(error, reconstruction, dedicated=dedicated), MODELS, OwnerConfig()) == said


@pytest.mark.parametrize(
    ("error", "owner", "delta", "reaches"),
    [
        ((0.15, 0.4), "other", 0.95, True),
        ((0.21, 0.4), "other", 0.95, False),
        ((0.15, 0.4), "other", 0.8, False),  # its decoder norms are not those of one model's own
        ((0.15, 0.4), "simpo", 0.95, False),  # it is counted already
        ((float("nan"), float("nan")), "other", 0.95, False),
    ],
)
def test_a_candidate_is_within_reach_if_its_intervals_reach_inside(
    error: tuple[float, float], owner: str, delta: float, reaches: bool
) -> None:
    row = row_of(error, (0.1, 0.6), owner, delta)
    assert is_within_reach(row, MODELS, "simpo", OwnerConfig()) is reaches
    assert not is_within_reach(row, MODELS, "base", OwnerConfig())


def test_counts_by_owner() -> None:
    inside, nothing = (0.0, 0.1), (float("nan"), float("nan"))
    rows = [row_of(inside, inside)] * 3 + [row_of((0.1, 0.3), inside)] * 2 + [row_of(nothing, nothing)]
    rows += [row_of((0.15, 0.3), inside, "other")] * 4 + [row_of((0.9, 1.0), inside, "shared", 0.5)]
    found = counted(rows, MODELS, MODELS, OwnerConfig())
    assert found == {"base": Counted(0, 0, 0, 0), "simpo": Counted(3, 2, 1, 4)}
    assert counted([{"owner": "simpo"}], MODELS, MODELS, OwnerConfig()) == {}


def test_one_of_three_models_must_be_certain_towards_both_others() -> None:
    models = ["a", "b", "c"]
    row: dict[str, Any] = {"owner": "c", "dedicated": False}
    for other, high in (("a", 0.1), ("b", 0.3)):
        for name in ("nu_error", "nu_reconstruction"):
            row |= {f"{name}_c_{other}_low": 0.0, f"{name}_c_{other}_high": high}
    assert certainty_of(row, models, OwnerConfig()) == CROSSES
    assert certainty_of(row | {"nu_error_c_b_high": 0.1}, models, OwnerConfig()) == CERTAIN
