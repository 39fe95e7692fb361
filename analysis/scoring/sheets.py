"""Sheets that people fill in: CSV files whose rows are known by hashed ids, and reading them back.

A key beside the study, <sheet>.<hash of its ids>.key.csv, says what each id stands for; those who fill in the sheet do
not get it.
"""

from __future__ import annotations

import csv
import hashlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.csv_files import csv_bytes, read_csv
from analysis.spelling import did_you_mean
from extract.errors import BadInput
from extract.publish import publish

ID_LENGTH = 12
KEY = ".key.csv"

# What an id stands for: the cells of its row in the key, as text.
Named = tuple[str, ...]


@dataclass(frozen=True)
class Filled:
    """One row of a filled sheet; `answer` is None where the cell is empty."""

    named: Named
    answer: str | None


def sample(units: Sequence[Named], size: int, seed: int) -> dict[str, Named]:
    """At most `size` of the units at random by their ids, in the order of the ids, which says nothing about them."""
    rng = np.random.default_rng(seed)
    chosen = [units[i] for i in rng.choice(len(units), size=min(size, len(units)), replace=False)]
    return dict(sorted((id_of(named, seed), named) for named in chosen))


def id_of(named: Named, seed: int) -> str:
    """What stands for a unit on a sheet."""
    return hashlib.sha256(f"{seed} {'/'.join(named)}".encode()).hexdigest()[:ID_LENGTH]


def check_new(sheet: Path) -> None:
    """BadInput for a sheet that is there: somebody may have filled it in."""
    if sheet.exists():
        raise BadInput(f"{sheet} exists, and may hold answers. Give another name (export=FILE), or remove it.")


def write_sheet(
    sheet: Path, answer: str, header: list[str], rows: Mapping[str, list[str]], keys: Path, key: Mapping[str, Named]
) -> None:
    """A sheet with the columns id, `answer` (empty) and `header`, and its key in the folder `keys`.

    The sheet starts with the mark by which spreadsheets know UTF-8. The key is named by its ids too: sheets of one name
    may be filled in for years, each with its own.
    """
    check_new(sheet)
    names = [f"part_{number}" for number in range(1, max(map(len, key.values()), default=0) + 1)]
    ids = hashlib.sha256(" ".join(key).encode()).hexdigest()[:ID_LENGTH]
    publish(keys / f"{sheet.stem}.{ids}{KEY}", as_csv(["id", *names], [[i, *named] for i, named in key.items()]))
    publish(sheet, BOM_UTF8 + as_csv(["id", answer, *header], [[i, "", *cells] for i, cells in rows.items()]))


def read_sheet(sheet: Path, answer: str, known: Mapping[str, str], keys: Path) -> list[Filled]:
    """The rows of a filled sheet; `known` are the answers that there are by their casefolded spellings.

    BadInput for ids that were changed, rows that are missing or doubled, and answers that there are not.
    """
    rows = _rows(sheet, answer)
    ids = [identity for identity, _ in rows]
    key = _key_of(ids, sheet, keys)
    _check_ids(ids, key, sheet)
    filled = [Filled(key[identity], _choice(cell, known, sheet, identity)) for identity, cell in rows]
    if all(row.answer is None for row in filled):
        raise BadInput(f"{sheet}: no row has a {answer}. Fill in the column `{answer}`.")
    return filled


def _rows(sheet: Path, answer: str) -> list[tuple[str, str]]:
    lines = read_csv(sheet, "filled", "Give the CSV that was filled in: filled=FILE.")
    header = lines[0].cells if lines else []
    missing = [name for name in ("id", answer) if name not in header]
    if missing:
        raise BadInput(f"{sheet} has no column {' and no column '.join(missing)}. Keep the header as exported.")
    places = [header.index(name) for name in ("id", answer)]
    # Spreadsheets may leave out cells that are empty to the end of the row.
    padded = ([*line.cells, *[""] * len(header)] for line in lines[1:])
    return [(cells[places[0]], cells[places[1]]) for cells in padded]


def _key_of(ids: list[str], sheet: Path, keys: Path) -> dict[str, Named]:
    """The export that the ids come from: of those that know equally many of them, the smallest."""
    found = [read_key(path) for path in sorted(keys.glob(f"*{KEY}"))]
    best = max(found, key=lambda key: (len(key.keys() & set(ids)), -len(key)), default={})
    if not best.keys() & set(ids):
        raise BadInput(f"{sheet}: no id is known to an export in {keys}. Export a sheet, and keep its ids.")
    return best


def read_key(path: Path) -> dict[str, Named]:
    """What the ids of one export stand for."""
    with path.open(encoding="utf-8", newline="") as file:
        return {identity: tuple(named) for identity, *named in list(csv.reader(file))[1:]}


def _check_ids(ids: list[str], key: Mapping[str, Named], sheet: Path) -> None:
    changed = [identity for identity in ids if identity not in key]
    doubled = [identity for identity, count in Counter(ids).items() if count > 1]
    missing = [identity for identity in key if identity not in set(ids)]
    for what, found in {"that were not exported": changed, "twice": doubled, "no longer": missing}.items():
        if found:
            raise BadInput(
                f"{sheet} has {len(found)} ids {what}, such as {found[0]!r}. Restore the column as exported."
            )


def _choice(cell: str, known: Mapping[str, str], sheet: Path, identity: str) -> str | None:
    name = cell.casefold()
    if name and name not in known:
        names = list(dict.fromkeys(known.values()))
        hint = did_you_mean(cell, names, f" Known: {', '.join(names)}.")
        raise BadInput(f"{sheet}, id {identity}: {cell!r} is no answer that there is.{hint}")
    return known[name] if name else None


def as_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A CSV file in UTF-8; what UTF-8 cannot hold is escaped."""
    return csv_bytes([header, *rows])
