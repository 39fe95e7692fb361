"""Tables for papers: raw numbers as CSV, printed numbers as LaTeX (booktabs), and how numbers are printed."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

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
    publish(folder / f"{table.name}.tex", latex_of(table).encode())


def csv_of(table: Table) -> str:
    """Raw numbers to full precision, one line a row."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.columns, *table.raw])
    return text.getvalue()


def latex_of(table: Table) -> str:
    """A `table` environment for the package booktabs: first column left, the others right."""
    lines = [" & ".join(map(escape_latex, row)) + r" \\" for row in [table.heading, *table.printed]]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape_latex(table.caption)}}}",
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
    """Text that LaTeX prints as it is; line breaks become spaces."""
    return "".join(
        LATEX_SPECIALS.get(character, character) for character in " ".join(text.split(" ")).replace("\n", " ")
    )


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
