"""The tables of a comparison: everything in the order of the taxonomy, and the changes as arXiv 2509.18792 prints them.

That paper's tables 2 and 5 are the changes of classes, largest rise first; its table 4 the top changes of categories
both ways, by the difference of shares. Here counts, intervals and tests stand beside them.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, fields

from analysis.compare.changes import Change, Comparison
from analysis.compare.counts import CLASS
from analysis.tables import Table, interval, number, percent, probability, signed

# What the names of tables in the published form begin with.
CHANGES = "changes_"


def name_of(level: str, model_a: str, model_b: str) -> str:
    """What the files of a comparison are called, without their endings."""
    return re.sub(r"[^\w.-]+", "_", f"{level}_{model_a}_{model_b}")


def table_of(comparison: Comparison) -> Table:
    """The comparison as a table; rows in the order of the taxonomy."""
    a, b = comparison.model_a, comparison.model_b
    shown = ["share", b, "share", "difference", "interval", "change (%)", "interval", "p", "q"]
    return Table(
        name=name_of(comparison.level, a, b),
        caption=f"Latents of {a} and {b} by {comparison.level}: counts, shares, difference in points, change and "
        f"{comparison.confidence:.0%} intervals; p of Fisher's exact test, q after Benjamini-Hochberg. "
        f"{_said(comparison)}",
        columns=[*(field.name for field in fields(Change)), "annotator"],
        raw=[[*asdict(change).values(), comparison.annotator] for change in comparison.changes],
        heading=[comparison.level, a, *shown],
        printed=[_printed(change) for change in comparison.changes],
    )


def _said(comparison: Comparison) -> str:
    by = f"Annotator: {comparison.annotator}. " if comparison.annotator else ""
    return f"{by}{comparison.claim} {comparison.caveat}"


def _printed(change: Change) -> list[str]:
    return [
        change.name,
        f"{change.count_a}/{change.total_a}",
        percent(change.share_a, 2),
        f"{change.count_b}/{change.total_b}",
        percent(change.share_b, 2),
        signed(100 * change.difference, 2),
        interval(change.difference_low, change.difference_high, 1, 100),
        signed(100 * change.change, 1),
        interval(change.change_low, change.change_high, 0, 100),
        probability(change.p),
        probability(change.q),
    ]


def changes_table(comparison: Comparison, num_top: int) -> Table:
    """The changes in the published form: all classes by their change, or the top categories both ways."""
    a, b, level = comparison.model_a, comparison.model_b, comparison.level
    changes = classes_by_change(comparison.changes) if level == CLASS else top_changes(comparison.changes, num_top)
    which = "Classes, largest rise first" if level == CLASS else f"The {num_top} largest rises and falls of categories"
    return Table(
        name=name_of(f"{CHANGES}{level}", a, b),
        caption=f"{which}: shares of the latents of {a} and {b} in percent, difference in points, change with its "
        f"{comparison.confidence:.0%} interval, latents, p of Fisher's exact test, q after Benjamini-Hochberg, and the "
        f"probability that some {level} changes as much by chance alone. {_said(comparison)}",
        columns=_RAW,
        raw=[[getattr(change, column) for column in _RAW] for change in changes],
        heading=[level, f"{a} (%)", f"{b} (%)", "difference", "change (%)", "interval", "latents", "p", "q", "chance"],
        printed=[_printed_change(change) for change in changes],
    )


_RAW = ["name", "share_a", "share_b", "difference", "change", "change_low", "change_high", "count_a", "total_a"]
_RAW += ["count_b", "total_b", "p", "q", "chance", "claim"]


def _printed_change(change: Change) -> list[str]:
    return [
        change.name,
        number(100 * change.share_a),
        number(100 * change.share_b),
        signed(100 * change.difference, 2),
        signed(100 * change.change, 1),
        interval(change.change_low, change.change_high, 0, 100),
        f"{change.count_a} : {change.count_b}",
        probability(change.p),
        probability(change.q),
        probability(change.chance),
    ]


def classes_by_change(changes: list[Change]) -> list[Change]:
    """Largest rise first; those without latents, of which no change is known, last."""
    return sorted(changes, key=lambda change: math.inf if math.isnan(change.change) else -change.change)


def top_changes(changes: list[Change], num_top: int) -> list[Change]:
    """The `num_top` largest rises of the share, then as many falls, each largest first; equal ones by their change."""
    known = [change for change in changes if change.difference and not math.isnan(change.difference)]
    ordered = sorted(known, key=lambda change: (-abs(change.difference), -abs(change.change)))
    rises = [change for change in ordered if change.difference > 0][:num_top]
    return rises + [change for change in ordered if change.difference < 0][:num_top]
