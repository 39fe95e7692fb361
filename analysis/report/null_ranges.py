"""`nulls.csv` as figures show it: where both nu lie when there is nothing to find."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from analysis.report.optional_files import read_optional

NULLS = "nulls.csv"
# 5 %, 50 % and 95 % quantiles.
Quantiles = tuple[float, float, float]


@dataclass(frozen=True)
class NullRange:
    """Where nu of one null lies with one model as focus towards another."""

    name: str
    focus: str
    other: str
    error: Quantiles
    reconstruction: Quantiles


def read_nulls(folder: Path) -> list[NullRange]:
    """The nulls of an analysis folder; none of an analysis without them, and none that holds no latents."""
    if not (folder / NULLS).is_file():
        return []
    rows = [row for row in read_optional(folder / NULLS)[1] if row["q05"] and row["q50"] and row["q95"]]
    found = {(row["null"], row["focus"], row["other"], row["measure"]): _quantiles(row) for row in rows}
    return [
        NullRange(name, focus, other, error, found[name, focus, other, "nu_reconstruction"])
        for (name, focus, other, measure), error in found.items()
        if measure == "nu_error" and (name, focus, other, "nu_reconstruction") in found
    ]


def _quantiles(row: dict[str, str]) -> Quantiles:
    return float(row["q05"]), float(row["q50"]), float(row["q95"])
