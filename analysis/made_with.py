"""What an analysis folder was made with, as the records of its steps say, whatever the settings of a later command."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.config import OwnerConfig
from analysis.damage import readable
from analysis.firings.config import IntervalsConfig, NullsConfig
from analysis.human import RECORD
from extract.config import KeptConfig
from extract.errors import BadInput

# The records of the steps that select latents, describe them and put them into categories.
RECORDS = (RECORD, "annotate.json", "categorise.json")
# Inputs that the same settings may be used with, and settings that only tables of their own depend on.
INPUTS, APART = ("tokens", "taxonomy"), "nulls"


@dataclass(frozen=True)
class Selection:
    """How the latents of an analysis folder were selected, and their intervals and nulls made."""

    owner: OwnerConfig
    kept: KeptConfig
    intervals: IntervalsConfig
    nulls: NullsConfig


def selection_of(folder: Path) -> Selection:
    """The selection of an analysis folder; BadInput if its record is missing or of another version."""
    path = folder / RECORD
    try:
        said = json.loads(path.read_bytes())["settings"]
        kinds = {"owner": OwnerConfig, "kept": KeptConfig, "intervals": IntervalsConfig, "nulls": NullsConfig}
        return Selection(**{name: kind(**said[name]) for name, kind in kinds.items()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path} does not say how latents were selected: it is missing, damaged or of another version. Run "
            "`python -m analysis` for this pair again."
        ) from error


def settings_of(folder: Path, step: str) -> dict[str, Any]:
    """The settings that a step of an analysis folder was done with; empty for a step without a record."""
    path = folder / f"{step}.json"
    if not path.exists():
        return {}
    with readable(path):
        return dict(json.loads(path.read_bytes()).get("settings", {}))


def recorded(folders: Sequence[Path], step: str, *names: str) -> list[tuple[dict[str, Any], str]]:
    """Settings of a step by their `names`, each combination once, and the folders that have it: "base_a, base_b", or
    nothing if all have the same. Of a folder without a record nothing is said.
    """
    found: dict[str, list[str]] = {}
    for folder in folders:
        if settings := settings_of(folder, step):
            said = json.dumps({name: settings.get(name) for name in names})
            found.setdefault(said, []).append(folder.name)
    return [
        (json.loads(said), "" if len(having) == len(folders) else ", ".join(having)) for said, having in found.items()
    ]


def made_with(folder: Path) -> dict[str, str]:
    """What decides which latents of a folder are counted and what they are called, by its name: `latents: owner.
    max_nu_error`, say. A step without a record adds nothing.
    """
    found: dict[str, str] = {}
    for path in (folder / name for name in RECORDS):
        if path.exists():
            with readable(path):
                record = json.loads(path.read_bytes())
                inputs = {name: record["inputs"][name] for name in INPUTS if name in record["inputs"]}
            settings = {name: value for name, value in record.get("settings", {}).items() if name != APART}
            found |= {f"{path.stem}: {name}": value for name, value in _flat({**settings, **inputs})}
    return found


def differing(a: dict[str, str], b: dict[str, str]) -> tuple[str, ...]:
    """What two folders were made with unlike each other, by name, with both values where they are short."""
    return tuple(
        name + (f" ({first}, {second})" if len(first + second) < 60 else "")
        for name in {**a, **b}
        for first, second in [(a.get(name, "none"), b.get(name, "none"))]
        if first != second
    )


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings by names with dots."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", json.dumps(value, ensure_ascii=False)
