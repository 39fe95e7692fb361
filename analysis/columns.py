"""The columns of `latents.parquet` that belong to pairs of models: their names, and how they are read back.

A crosscoder of two models has `delta_norm` (0 = base only, 1 = tuned only) and `nu_error_<focus>`. With more models
every ordered pair has its own: `delta_norm_<a>_<b>`, a as focus, and `nu_error_<focus>_<other>`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

Columns = dict[str, np.ndarray]
NORM = "norm_"


def pair_column(name: str, models: Sequence[str], a: str, b: str) -> str:
    """The column of `delta_norm`, `delta_norm_tag` or `decoder_cosine` for the pair (a, b)."""
    return name if len(models) == 2 else f"{name}_{a}_{b}"


def nu_column(name: str, models: Sequence[str], focus: str, other: str) -> str:
    """The column of `nu_error` or `nu_reconstruction` with `focus` as focus model, towards `other`."""
    return f"{name}_{focus}" if len(models) == 2 else f"{name}_{focus}_{other}"


def models_of(folder: Path) -> list[str]:
    """The models of an analysis folder, base first."""
    names = pq.read_schema(folder / "latents.parquet").names
    return [name.removeprefix(NORM) for name in names if name.startswith(NORM)]


def read_columns(folder: Path) -> Columns:
    """`latents.parquet` as arrays (L,)."""
    table = pq.read_table(folder / "latents.parquet")
    return {name: np.array(column) for name, column in table.to_pydict().items()}


def of_two_models(columns: Columns, models: Sequence[str], base: str, tuned: str) -> Columns:
    """The columns of one pair of models under the names that a crosscoder of these two alone would give them.

    A latent that belongs to a third model is `other` here.
    """
    foreign = [model for model in models if model not in (base, tuned)]
    owner = np.where(np.isin(columns["owner"], foreign), "other", columns["owner"])
    found = {"owner": owner, "dedicated": columns["dedicated"]}
    found["delta_norm"] = columns[pair_column("delta_norm", models, base, tuned)].astype(float)
    for name in ("nu_error", "nu_reconstruction"):
        for focus, other in ((base, tuned), (tuned, base)):
            found[f"{name}_{focus}"] = columns[nu_column(name, models, focus, other)].astype(float)
    return found


def delta_norm_of(row: Mapping[str, Any], models: Sequence[str], focus: str) -> float:
    """Delta-norm of a latent with `focus` in mind: 0 where only the base, 1 where only the tuned model has it.

    With more than two models, towards the model that speaks most against its being `focus`'s own.
    """
    if len(models) == 2:
        return row["delta_norm"]
    others = [model for model in models if model != focus]
    if focus == models[0]:
        return max(row[f"delta_norm_{focus}_{other}"] for other in others)
    return min(row[f"delta_norm_{other}_{focus}"] for other in others)


def nu_of(row: Mapping[str, Any], models: Sequence[str], focus: str) -> tuple[float, float]:
    """nu_error and nu_reconstruction with `focus` as focus: towards the one other model, or the worst of several."""
    others = [model for model in models if model != focus]
    return (
        _worst([row[nu_column("nu_error", models, focus, other)] for other in others]),
        _worst([row[nu_column("nu_reconstruction", models, focus, other)] for other in others]),
    )


def _worst(values: list[float]) -> float:
    """The largest in size; NaN, which passes no threshold, is worse than any."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else abs(value))
