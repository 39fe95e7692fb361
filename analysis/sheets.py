"""Sheets that people fill in: CSV files whose rows are known by hashed ids, and reading them back.

A key beside the study, <sheet>.key.csv, says what each id stands for; those who fill in the sheet do not get it.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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


def write_sheet(
    sheet: Path, answer: str, header: list[str], rows: Mapping[str, list[str]], keys: Path, key: Mapping[str, Named]
) -> None:
    """A sheet with the columns id, `answer` (empty) and `header`, and its key in the folder `keys`.

    The sheet starts with the mark by which spreadsheets know UTF-8.
    """
    names = [f"part_{number}" for number in range(1, max(map(len, key.values()), default=0) + 1)]
    publish(keys / f"{sheet.stem}{KEY}", as_csv(["id", *names], [[i, *named] for i, named in key.items()]))
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
    if not sheet.is_file():
        raise BadInput(f"{sheet} is not a file. Give the CSV that was filled in: filled=FILE.")
    try:
        text = sheet.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{sheet} is not UTF-8. Save it as CSV (UTF-8).") from error
    first = text.partition("\n")[0]
    # Spreadsheets write semicolons where the comma is the decimal sign.
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=";" if first.count(";") > first.count(",") else ","
    )
    missing = [name for name in ("id", answer) if name not in (reader.fieldnames or [])]
    if missing:
        raise BadInput(f"{sheet} has no column {' and no column '.join(missing)}. Keep the header as exported.")
    return [((row["id"] or "").strip(), (row[answer] or "").strip()) for row in reader]


def _key_of(ids: list[str], sheet: Path, keys: Path) -> dict[str, Named]:
    """The export that the ids come from."""
    found = [read_key(path) for path in sorted(keys.glob(f"*{KEY}"))]
    best = max(found, key=lambda key: len(key.keys() & set(ids)), default={})
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
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {known[near[0]]!r}?" if near else f"Known: {', '.join(dict.fromkeys(known.values()))}."
        raise BadInput(f"{sheet}, id {identity}: {cell!r} is no answer that there is. {hint}")
    return known[name] if name else None


def as_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A CSV file in UTF-8; what UTF-8 cannot hold is escaped."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode("utf-8", errors="backslashreplace")
