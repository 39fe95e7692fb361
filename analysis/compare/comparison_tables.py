"""The tables of a comparison: everything in the order of the taxonomy, and the changes as arXiv 2509.18792 prints them.

That paper's tables 2 and 5 are the changes of classes, largest rise first; its table 4 the top changes of categories
both ways, by the difference of shares. Here counts, intervals and tests stand beside them.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, fields
from zlib import crc32

from analysis.compare.changes import Change, Comparison
from analysis.compare.claims import holds_of_certain
from analysis.compare.counts import CLASS
from analysis.tables import Table, interval, number, percent, probability, signed

# What the names of tables in the published form, and of those of certain latents, begin with.
CHANGES, CERTAIN = "changes_", "certain_"
# Names of models that stand in names of files as they are.
PLAIN = re.compile(r"\w+(?:[.-]\w+)*")


def name_of(level: str, model_a: str, model_b: str) -> str:
    """What the files of a comparison are called, without their endings; no two comparisons have one name.

    class_it_dpo; class_gemma_it--gemma_dpo where "_" could also be within a name; with a checksum where a name has
    characters that stand as "_".
    """
    models = (model_a, model_b)
    shown = [re.sub(r"[^\w.-]+", "_", model) for model in models]
    name = f"{level}_{('--' if any('_' in model for model in shown) else '_').join(shown)}"
    if all(PLAIN.fullmatch(model) for model in models):
        return name
    return f"{name}_{crc32(json.dumps(models).encode()):08x}"


def table_of(comparison: Comparison) -> Table:
    """The comparison as a table; rows in the order of the taxonomy."""
    a, b = comparison.model_a, comparison.model_b
    shown = ["share", b, "share", "difference", "interval", "change (%)", "interval", "p", "q"]
    return Table(
        name=name_of(comparison.level, a, b),
        caption=f"Latents of {a} and {b} by {comparison.level}: counts, shares, difference in points, change and "
        f"{comparison.config.confidence:.0%} intervals; p of Fisher's exact test, q after Benjamini-Hochberg.",
        columns=[*(field.name for field in fields(Change)), "annotator"],
        raw=[[*asdict(change).values(), comparison.annotator] for change in comparison.changes],
        heading=[comparison.level, a, *shown],
        printed=[_printed(change) for change in comparison.changes],
        note=_said(comparison),
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
        f"{comparison.config.confidence:.0%} interval, latents, p of Fisher's exact test, q after Benjamini-Hochberg, "
        f"and the probability that some {level} changes as much by chance alone, where both models have it.",
        columns=_RAW,
        raw=[[getattr(change, column) for column in _RAW] for change in changes],
        heading=[level, f"{a} (%)", f"{b} (%)", "difference", "change (%)", "interval", "latents", "p", "q", "chance"],
        printed=[_printed_change(change) for change in changes],
        note=_said(comparison),
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


def certain_table(comparison: Comparison) -> Table:
    """The certain latents alone, in the order of the taxonomy: does what may be claimed of all hold for them?"""
    a, b = comparison.model_a, comparison.model_b
    rows = [
        (one, change.may_be_claimed, holds_of_certain(change, comparison))
        for change in comparison.changes
        if (one := comparison.among_certain(change))
    ]
    return Table(
        name=name_of(f"{CERTAIN}{comparison.level}", a, b),
        caption=f"The latents of {a} and {b} alone whose whole intervals of ν lie within the thresholds, by "
        f"{comparison.level}: counts, difference of shares in points with its {comparison.config.confidence:.0%} "
        "interval, p of Fisher's exact test, q after Benjamini-Hochberg, and whether what may be claimed of all "
        "selected latents may be claimed of these alone. Nothing else is claimed of them.",
        columns=[*_RAW_CERTAIN, "claimed_of_all", "holds_of_certain"],
        raw=[[*(getattr(one, column) for column in _RAW_CERTAIN), *said] for one, *said in rows],
        heading=[comparison.level, a, b, "difference", "interval", "p", "q", "claim holds"],
        printed=[_printed_certain(*row) for row in rows],
        note=comparison.caveat,
    )


_RAW_CERTAIN = ["name", "count_a", "total_a", "count_b", "total_b", "difference", "difference_low", "difference_high"]
_RAW_CERTAIN += ["p", "q", "p_clusters", "q_clusters"]


def _printed_certain(change: Change, is_claimed: bool, holds: bool) -> list[str]:
    return [
        change.name,
        f"{change.count_a}/{change.total_a}",
        f"{change.count_b}/{change.total_b}",
        signed(100 * change.difference, 2),
        interval(change.difference_low, change.difference_high, 1, 100),
        probability(change.p),
        probability(change.q),
        ("yes" if holds else "no") if is_claimed else "–",
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
