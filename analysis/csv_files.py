"""CSV files: written so that they are read back, read in bounds, with one sentence for whatever cannot be read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from extract.errors import BadInput

# More than any file of counts, ratings or answers has; a mistaken path is often larger.
MAX_BYTES = 64 * 2**20
BLANK = " \t\r\n\ufeff"
FORMULA = ("=", "+", "-", "@")


class Line(NamedTuple):
    """One row: the number of the line of the file that it begins on, and its cells without outer blanks."""

    number: int
    cells: list[str]


def read_csv(path: Path, name: str, expected: str) -> list[Line]:
    """The rows of a CSV file that are not empty, the header first; `name` it in errors, `expected` is the remedy.

    UTF-8 with or without a byte order mark; semicolons where the first line has more of them than commas, as
    spreadsheets write where the comma is the decimal sign. BadInput for what is no such text, or larger than 64 MiB.
    """
    text = _text(path, f"{name} ({path})", expected)
    first = text.lstrip(BLANK).partition("\n")[0]
    delimiter = ";" if first.count(";") > first.count(",") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines, number = [], 1
    try:
        for row in reader:
            if any(cells := [cell.strip() for cell in row]):
                lines.append(Line(number, cells))
            number = reader.line_num + 1
    except csv.Error as error:
        raise BadInput(f"{name} ({path}), line {number}, is no CSV: {error}. {expected}") from error
    return lines


def csv_bytes(rows: Iterable[Iterable[object]]) -> bytes:
    """Rows as CSV in UTF-8: what UTF-8 cannot hold is escaped; carriage returns within a cell, which the module csv
    writes without quotes and reads as ends of rows, become line feeds.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_without_returns(cell) for cell in row] for row in rows)
    return text.getvalue().encode("utf-8", errors="backslashreplace")


def _without_returns(cell: object) -> object:
    return cell.replace("\r\n", "\n").replace("\r", "\n") if isinstance(cell, str) else cell


def not_a_formula(cell: object) -> object:
    """Text that a spreadsheet would run as a formula, behind an apostrophe, which makes it text; numbers stay."""
    if not isinstance(cell, str) or not cell.lstrip(BLANK).startswith(FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return "'" + cell
    return cell


def _text(path: Path, named: str, expected: str) -> str:
    if not path.is_file():
        raise BadInput(f"{named} is not a file. {expected}")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise BadInput(f"{named} is larger than {MAX_BYTES // 2**20} MiB. {expected}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{named} is not UTF-8 (byte {error.start}). Save it as CSV (UTF-8).") from error
