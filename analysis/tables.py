"""Tables for papers: raw numbers as CSV, printed numbers as LaTeX (booktabs), and how numbers are printed."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from analysis.csv_files import csv_bytes, not_a_formula
from extract.publish import publish

LATEX_SPECIALS = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\u2212": "$-$",
    "\u221e": r"$\infty$",
    "\u0394": r"$\Delta$",
    "\u03bd": r"$\nu$",
    "\u00b1": r"$\pm$",
    "\u00d7": r"$\times$",
    "\u201c": "``",
    "\u201d": "''",
    "\u2013": "--",
    "\u00a0": "~",
}

# Runs of blanks and control characters, but for the blank that does not break.
BLANKS = re.compile(r"(?:(?!\u00a0)[\s\x00-\x1f\x7f-\x9f])+")
# Rows of a table that fit on a page.
MAX_LATEX_ROWS = 40

# What a table is published as.
ENDINGS = ("csv", "tex")

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """One table, `name`, in two forms: `columns` and `raw` for machines, `heading` and `printed` for people."""

    name: str
    caption: str
    columns: list[str]
    raw: list[list[Value]]
    heading: list[str]
    printed: list[list[str]]


def write_table(table: Table, folder: Path) -> None:
    """Publish `<name>.csv` and `<name>.tex` in `folder`."""
    publish(folder / f"{table.name}.csv", csv_of(table).encode())
    publish(folder / f"{table.name}.tex", latex_of(table).encode("utf-8", errors="replace"))


def csv_of(table: Table) -> str:
    """Raw numbers to full precision, one line a row; text that spreadsheets would run stands behind an apostrophe."""
    return csv_bytes([table.columns, *(map(not_a_formula, row) for row in table.raw)]).decode()


def latex_of(table: Table) -> str:
    """A `table` environment for the package booktabs: first column left, the others right.

    A float does not break over pages, so of long tables it holds the first rows and says so; the CSV holds all.
    """
    shown = table.printed[:MAX_LATEX_ROWS]
    lines = [" & ".join(map(escape_latex, row)) + r" \\" for row in [table.heading, *shown]]
    caption = table.caption
    if len(shown) < len(table.printed):
        caption += f" The first {len(shown)} of {len(table.printed):,} rows; all are in {table.name}.csv."
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\small",
            rf"\caption{{{escape_latex(caption)}}}",
            rf"\label{{tab:{table.name}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.heading) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def text_of(table: Table) -> str:
    """The printed table in columns, for a terminal."""
    rows = [table.heading, *table.printed]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.heading))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is; line breaks, tabs and control characters become spaces."""
    return "".join(LATEX_SPECIALS.get(character, character) for character in BLANKS.sub(" ", text))


def percent(share: float, digits: int = 1) -> str:
    """0.0625 -> "6.3 %", infinite -> "∞", NaN -> "–"."""
    return (
        "–" if math.isnan(share) else "∞" if math.isinf(share) else f"{100 * share:.{digits}f}\u00a0%".replace("-", "−")
    )


def signed(value: float, digits: int = 1) -> str:
    """1.517 -> "+1.5"; a minus sign is a minus sign, not a hyphen."""
    return "–" if math.isnan(value) else "+∞" if math.isinf(value) else f"{value:+.{digits}f}".replace("-", "−")


def number(value: float, digits: int = 2) -> str:
    """0.1234 -> "0.12"; NaN -> "–"."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def bounded(value: float, digits: int = 2) -> str:
    """A measure that ends at 1, such as F1: 0.9993 -> ">0.99", since 1 is said of 1 alone."""
    text = number(value, digits)
    return f">0.{'9' * digits}" if value < 1 and float(text.replace("−", "-").replace("–", "nan")) >= 1 else text


def interval(low: float, high: float, digits: int = 1, scale: float = 1.0) -> str:
    """ "[low, high]" with signs, for differences and changes."""
    return f"[{signed(scale * low, digits)}, {signed(scale * high, digits)}]"


def probability(p: float) -> str:
    """A p or q of two decimals, three below 0.1; "<0.001" below that."""
    return "–" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def stated(name: str, p: float) -> str:
    """A p or q within a sentence: "p = 0.36", "q < 0.001"."""
    text = probability(p)
    return f"{name} < {text[1:]}" if text.startswith("<") else f"{name} = {text}"
