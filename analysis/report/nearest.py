"""For a crosscoder without latents of one model alone: the latents that come closest, and what keeps them from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from analysis.config import OwnerConfig
from analysis.latents.certainty import delta_distance, is_candidate, max_reconstruction
from analysis.latents.columns import delta_norm_of, nu_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Near:
    """A latent that is nobody's own but comes closest to `focus`, and what keeps it from being that."""

    latent: int
    focus: str
    delta_norm: float
    nu_error: float
    nu_reconstruction: float
    obstacle: str


def nearest_to(focus: str, rows: list[Row], models: list[str], owner: OwnerConfig, count: int = 5) -> list[Near]:
    """The latents that come closest to being `focus`'s own, for a crosscoder that has none."""
    alive = [
        row
        for row in rows
        if row["owner"] not in (*models, "dead")
        and all(abs(value) < float("inf") for value in nu_of(row, models, focus))
    ]
    near = sorted(alive, key=lambda row: _distance(row, models, focus, owner))
    return [
        Near(
            row["latent"],
            focus,
            delta_norm_of(row, models, focus),
            *nu_of(row, models, focus),
            _obstacle(row, models, focus, owner),
        )
        for row in near[:count]
    ]


def _distance(row: Row, models: list[str], focus: str, owner: OwnerConfig) -> tuple[bool, float]:
    """Latents whose Delta-norm would do come first, by how far nu misses; then the others by Delta-norm."""
    if not is_candidate(row, models, focus, owner):
        return True, delta_distance(row, models, focus)
    error, reconstruction = nu_of(row, models, focus)
    return False, max(abs(error) / owner.max_nu_error, abs(reconstruction) / max_reconstruction(row, owner))


def _obstacle(row: Row, models: list[str], focus: str, owner: OwnerConfig) -> str:
    error, reconstruction = nu_of(row, models, focus)
    reasons = [] if is_candidate(row, models, focus, owner) else ["Δ-norm within the thresholds"]
    reasons += [f"|ν error| ≥ {owner.max_nu_error}"] if abs(error) >= owner.max_nu_error else []
    limit = max_reconstruction(row, owner)
    reasons += [f"|ν reconstruction| ≥ {limit}"] if abs(reconstruction) >= limit else []
    return ", ".join(reasons)
