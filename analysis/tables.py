"""Tables for papers: raw numbers as CSV, printed numbers as LaTeX (booktabs, graphicx), and how numbers are printed.

LaTeX tables are never wider than the text and compile with every engine, pdfLaTeX included.
"""

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
    "|": r"\textbar{}",
    "\u2212": "$-$",
    "\u221e": r"$\infty$",
    "\u2264": r"$\leq$",
    "\u2265": r"$\geq$",
    "\u0394": r"$\Delta$",
    "\u03b1": r"$\alpha$",
    "\u03ba": r"$\kappa$",
    "\u03bd": r"$\nu$",
    "\u201c": "``",
    "\u201d": "''",
    "\u2013": "--",
    "\u00ab": r"$\ll$",
    "\u00bb": r"$\gg$",
    "\u00a0": "~",
}

# Runs of blanks and control characters, but for the blank that does not break.
BLANKS = re.compile(r"(?:(?!\u00a0)[\s\x00-\x1f\x7f-\x9f])+")
# Runs of what pdfLaTeX does not print with the fonts it begins with: all but ASCII, Latin-1, dashes, quotes and
# the specials above.
PRINTABLE = rf" -~\u00a1-\u00ff\u2010-\u2015\u2018\u2019\u2026{''.join(map(re.escape, LATEX_SPECIALS))}"
UNKNOWN = re.compile(f"[^{PRINTABLE}]+|[\u00d0\u00de\u00f0\u00fe]+")
UNKNOWN_SHOWN = "[?]"
# What a label may not hold: commas part the labels that are referred to at once, and others are commands.
LABEL = re.compile(r"[^\w-]+", re.ASCII)
# Rows of a table that fit on a page.
MAX_LATEX_ROWS = 40

# What a table is published as.
ENDINGS = ("csv", "tex")

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """One table, `name`, in two forms: `columns` and `raw` for machines, `heading` and `printed` for people.

    `caption` says what the columns are, `note`, which is printed below the table, what they allow to be said.
    """

    name: str
    caption: str
    columns: list[str]
    raw: list[list[Value]]
    heading: list[str]
    printed: list[list[str]]
    note: str = ""


def write_table(table: Table, folder: Path) -> None:
    """Publish `<name>.csv` and `<name>.tex` in `folder`, and the note, where there is one, as `<name>.txt`."""
    publish(folder / f"{table.name}.csv", csv_of(table).encode())
    publish(folder / f"{table.name}.tex", latex_of(table).encode())
    if table.note:
        publish(folder / f"{table.name}.txt", f"{table.note}\n".encode("utf-8", errors="backslashreplace"))


def csv_of(table: Table) -> str:
    """Raw numbers to full precision, one line a row; text that spreadsheets would run stands behind an apostrophe."""
    return csv_bytes([table.columns, *(map(not_a_formula, row) for row in table.raw)]).decode()


def latex_of(table: Table) -> str:
    """A `table` environment for the packages booktabs and graphicx: first column left, the others right; scaled where
    it would be wider than the text, and the note below it.

    A float does not break over pages, so of long tables it holds the first rows and says so; the CSV holds all.
    """
    shown = table.printed[:MAX_LATEX_ROWS]
    heading, *rows = map(_latex_row, [table.heading, *shown])
    caption = table.caption
    if len(shown) < len(table.printed):
        caption += f" The first {len(shown)} of {len(table.printed):,} rows; all are in {table.name}.csv."
    lines = [
        r"\begin{table}",
        r"\centering",
        r"\footnotesize",
        r"\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{escape_latex(caption)}}}",
        rf"\label{{tab:{LABEL.sub('-', table.name)}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(table.heading) - 1)}}}",
        *(r"\toprule", heading, r"\midrule", *rows, r"\bottomrule"),
        r"\end{tabular}}",
        *([rf"\par\smallskip\parbox{{\linewidth}}{{{escape_latex(table.note)}}}"] if table.note else []),
        r"\end{table}",
    ]
    if any(UNKNOWN_SHOWN in line for line in lines):
        lines.insert(0, f"% {UNKNOWN_SHOWN}: characters that pdfLaTeX cannot print. {table.name}.csv holds them.")
    return "\n".join([*lines, ""])


def _latex_row(cells: list[str]) -> str:
    """One row; a bracket or star at its start would be an option of the end of the row before."""
    row = " & ".join(map(escape_latex, cells)) + r" \\"
    return "{}" + row if row.startswith(("[", "*")) else row


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
    """Text that LaTeX prints as it is; line breaks, tabs and control characters become spaces, and what pdfLaTeX does
    not know, such as emoji and Chinese, UNKNOWN_SHOWN.
    """
    known = UNKNOWN.sub(UNKNOWN_SHOWN, BLANKS.sub(" ", text))
    return "".join(LATEX_SPECIALS.get(character, character) for character in known)


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
