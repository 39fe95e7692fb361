"""How certain it is whose a latent is: the intervals of nu against the thresholds of `analysis.owner`.

A latent is its owner's by nu as it was measured. With other documents nu would be another number; where its interval
crosses a threshold, the latent might have been counted otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from analysis.config import NOT_MODELS, OwnerConfig
from analysis.damage import readable
from analysis.latents.columns import delta_norm_of, members_of, models_of, nu_column

Row = Mapping[str, Any]
CERTAIN, CROSSES, UNKNOWN = "certain", "threshold within the interval", "no interval"


@dataclass(frozen=True)
class Counted:
    """Of the latents of one owner: how many are CERTAIN, how many cross a threshold, how many have no interval.

    `within_reach` counts candidates of the owner by decoder norms that are not its own, but whose intervals reach
    within the thresholds; of an owner that is several models it is 0.
    """

    certain: int
    crosses: int
    unknown: int
    within_reach: int


def certainty_of(row: Row, models: Sequence[str], config: OwnerConfig) -> str:
    """CERTAIN if both nu's whole intervals towards every other model are within the thresholds of an owned latent."""
    found = _intervals(row, models, row["owner"], config)
    if any(low is None or high is None or low != low or high != high for low, high, _ in found):
        return UNKNOWN
    return CERTAIN if all(-limit < low and high < limit for low, high, limit in found) else CROSSES


def certainty_in(folder: Path, owner: str, config: OwnerConfig) -> dict[int, str]:
    """`certainty_of` every latent of an analysis folder with that owner, by its number."""
    path, models = folder / "latents.parquet", models_of(folder)
    with readable(path):
        names = pq.read_schema(path).names
        columns = ["latent", "owner", "dedicated", *(name for name in names if name.endswith(("_low", "_high")))]
        rows = pq.read_table(path, columns=columns, filters=[("owner", "=", owner)]).to_pylist()
    return {row["latent"]: certainty_of(row, models, config) for row in rows}


def is_within_reach(row: Row, models: list[str], focus: str, config: OwnerConfig) -> bool:
    """Whether a candidate of `focus` is not its own, but both intervals towards every other model reach inside."""
    if row["owner"] in (focus, "dead") or not is_candidate(row, models, focus, config):
        return False
    found = _intervals(row, models, focus, config)
    return all(low is not None and high is not None and low < limit and high > -limit for low, high, limit in found)


def counted(rows: Sequence[Row], models: list[str], owners: Sequence[str], config: OwnerConfig) -> dict[str, Counted]:
    """The counts of each of `owners`; none for an analysis without intervals."""
    if not rows or f"{nu_column('nu_error', models, models[0], models[1])}_low" not in rows[0]:
        return {}
    found: dict[str, list[str]] = {owner: [] for owner in owners}
    for row in rows:
        if row["owner"] not in NOT_MODELS:
            found[row["owner"]].append(certainty_of(row, models, config))
    reach = {model: sum(is_within_reach(row, models, model, config) for row in rows) for model in models}
    return {
        owner: Counted(said.count(CERTAIN), said.count(CROSSES), said.count(UNKNOWN), reach.get(owner, 0))
        for owner, said in found.items()
    }


def is_candidate(row: Row, models: Sequence[str], focus: str, owner: OwnerConfig) -> bool:
    """Whether the decoder norms allow `focus` to own the latent."""
    limit = owner.delta_norm_low if focus == models[0] else 1 - owner.delta_norm_high
    return delta_distance(row, models, focus) < limit


def delta_distance(row: Row, models: Sequence[str], focus: str) -> float:
    """0 for a latent that only `focus` has a decoder row of, 1 for one that it has none of."""
    delta = delta_norm_of(row, models, focus)
    return delta if focus == models[0] else 1 - delta


def max_reconstruction(row: Row, owner: OwnerConfig) -> float:
    """The threshold of |nu_reconstruction| that holds for the latent."""
    return owner.max_nu_reconstruction_dedicated if row["dedicated"] else owner.max_nu_reconstruction


def _intervals(row: Row, models: Sequence[str], owner: str, config: OwnerConfig) -> list[tuple[Any, Any, float]]:
    """(low, high, threshold) of both nu of every model of `owner` towards every other."""
    members = members_of(owner, models)
    columns = {
        nu_column(name, models, member, other): limit
        for name, limit in (("nu_error", config.max_nu_error), ("nu_reconstruction", max_reconstruction(row, config)))
        for member in members
        for other in models
        if other not in members
    }
    return [(row.get(f"{name}_low"), row.get(f"{name}_high"), limit) for name, limit in columns.items()]
