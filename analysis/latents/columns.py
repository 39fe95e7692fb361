"""The columns of `latents.parquet` that belong to pairs of models: their names, and how they are read back.

A crosscoder of two models has `delta_norm` (0 = base only, 1 = tuned only) and `nu_error_<focus>`. With more models
every ordered pair has its own: `delta_norm_<a>_<b>`, a as focus, and `nu_error_<focus>_<other>`.

`owner` is the set of models that a latent belongs to: a model's name, several joined in their order (`it+simpo`),
`shared` for all of them, `other` for none, `dead` for a latent that never fired.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from analysis.config import NOT_MODELS
from analysis.damage import readable

Columns = dict[str, np.ndarray]
NORM = "norm_"
# Between the models of an owner; no name of a model or hookpoint contains it.
AND = "+"


def pair_column(name: str, models: Sequence[str], a: str, b: str) -> str:
    """The column of `delta_norm`, `delta_norm_tag` or `decoder_cosine` for the pair (a, b)."""
    return name if len(models) == 2 else f"{name}_{a}_{b}"


def nu_column(name: str, models: Sequence[str], focus: str, other: str) -> str:
    """The column of `nu_error` or `nu_reconstruction` with `focus` as focus model, towards `other`."""
    return f"{name}_{focus}" if len(models) == 2 else f"{name}_{focus}_{other}"


def models_of(folder: Path) -> list[str]:
    """The models of an analysis folder, base first."""
    with readable(folder / "latents.parquet"):
        names = pq.read_schema(folder / "latents.parquet").names
    return [name.removeprefix(NORM) for name in names if name.startswith(NORM)]


def read_columns(folder: Path) -> Columns:
    """`latents.parquet` as arrays (L,)."""
    with readable(folder / "latents.parquet"):
        table = pq.read_table(folder / "latents.parquet")
    return {name: np.array(column) for name, column in table.to_pydict().items()}


def owner_name(members: Sequence[str], models: Sequence[str]) -> str:
    """The owner that is the set `members` of `models`, both in the models' order."""
    return "shared" if len(members) == len(models) else AND.join(members) or "other"


def members_of(owner: str, models: Sequence[str]) -> list[str]:
    """The models that a latent belongs to; none if it is `other` or `dead`."""
    if owner in NOT_MODELS:
        return list(models) if owner == "shared" else []
    return owner.split(AND)


def owners_in_order(owners: Iterable[str], models: Sequence[str]) -> list[str]:
    """Those of `owners` that are some models but not all: smaller sets first, then in the models' order."""
    sets = {tuple(models.index(member) for member in members_of(o, models)): o for o in owners if o not in NOT_MODELS}
    return [sets[members] for members in sorted(sets, key=lambda members: (len(members), members))]


def of_two_models(columns: Columns, models: Sequence[str], base: str, tuned: str) -> Columns:
    """The columns of one pair of models under the names that a crosscoder of these two alone would give them.

    A latent's owner is what the two are of it: a latent of a third model is `other` here, one of `tuned` and a third
    model is `tuned`'s, one of `base`, `tuned` and a third model is `shared`.
    """
    seen = {"dead": "dead"}
    for owner in set(columns["owner"].tolist()) - {"dead"}:
        members = [member for member in members_of(owner, models) if member in (base, tuned)]
        seen[owner] = owner_name(members, (base, tuned))
    found = {"owner": np.array([seen[owner] for owner in columns["owner"].tolist()])}
    found["dedicated"] = columns["dedicated"]
    found["delta_norm"] = columns[pair_column("delta_norm", models, base, tuned)].astype(float)
    for name in ("nu_error", "nu_reconstruction"):
        for focus, other in ((base, tuned), (tuned, base)):
            found[f"{name}_{focus}"] = columns[nu_column(name, models, focus, other)].astype(float)
    return found


def delta_norm_of(row: Mapping[str, Any], models: Sequence[str], focus: str) -> float:
    """Delta-norm of a latent with `focus` in mind: 0 where only the base, 1 where only the tuned model has it.

    With more than two models `focus` may be several. What counts is the pair of one of them and another model that
    speaks most against the latent's being their own.
    """
    if len(models) == 2:
        return row["delta_norm"]
    pairs = _pairs_across(focus, models)
    if models[0] in members_of(focus, models):
        return max(row[f"delta_norm_{member}_{other}"] for member, other in pairs)
    return min(row[f"delta_norm_{other}_{member}"] for member, other in pairs)


def nu_of(row: Mapping[str, Any], models: Sequence[str], focus: str) -> tuple[float, float]:
    """nu_error and nu_reconstruction with `focus`, one model or several, as focus: the worst towards other models."""
    pairs = _pairs_across(focus, models)
    return (
        _worst([row[nu_column("nu_error", models, *pair)] for pair in pairs]),
        _worst([row[nu_column("nu_reconstruction", models, *pair)] for pair in pairs]),
    )


def _pairs_across(owner: str, models: Sequence[str]) -> list[tuple[str, str]]:
    """(a model of `owner`, a model outside) for all of them."""
    members = members_of(owner, models)
    return [(member, other) for member in members for other in models if other not in members]


def _worst(values: list[float]) -> float:
    """The largest in size; NaN, which passes no threshold, is worse than any."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else abs(value))
