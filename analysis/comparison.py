"""Two tuned models set against each other, category by category, with what the small counts allow to be said.

Frequency of a category is its share of one model's latents, those without a category included; change is the ratio of
two shares minus one (arXiv 2509.18792). Intervals: Wilson for shares, Newcombe for differences, Katz for ratios; tests:
Fisher's, corrected by Benjamini-Hochberg, and one over all categories at once.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from analysis import statistics
from analysis.config import AnalysisSettings, CompareConfig
from analysis.counts import LEVELS, Counts, columns_of_folders, counts_of_folders, folders_by_base
from analysis.tables import ENDINGS, Table, interval, percent, probability, signed, stated, write_table
from analysis.taxonomy import DEFAULT, load_taxonomy

TABLES = "tables"


@dataclass(frozen=True)
class Change:
    """One category (or class) in two models; shares, differences and changes are fractions, not percent."""

    name: str
    count_a: int
    total_a: int
    share_a: float
    share_a_low: float
    share_a_high: float
    count_b: int
    total_b: int
    share_b: float
    share_b_low: float
    share_b_high: float
    difference: float
    difference_low: float
    difference_high: float
    change: float
    change_low: float
    change_high: float
    p: float
    q: float


@dataclass(frozen=True)
class Comparison:
    """Model b against model a over all categories (or classes). `claim` says what the numbers allow."""

    level: str
    model_a: str
    model_b: str
    changes: list[Change]
    global_p: float
    claim: str
    confidence: float
    # Who described the latents and put them into categories; empty for counts of a file.
    annotator: str


def compare(settings: AnalysisSettings, folders: list[Path]) -> list[Comparison]:
    """Compare the tuned-only latents of analysis `folders` that share a base, and write the tables of the report."""
    comparisons = comparisons_of(settings, folders)
    write_comparisons(comparisons, Path(settings.outputs) / "report" / TABLES)
    return comparisons


def comparisons_of(settings: AnalysisSettings, folders: list[Path]) -> list[Comparison]:
    """The comparisons of `compare` without writing anything; empty if no two tuned models share a base."""
    path = settings.analysis.taxonomy.path
    categories = load_taxonomy(Path(path) if path else DEFAULT)
    return [
        comparison
        for sharing in folders_by_base(folders)
        for counts in counts_of_folders(sharing, categories)
        for comparison in compare_counts(counts, settings.analysis.compare)
    ]


def outputs_of(folders: list[Path]) -> tuple[str, ...]:
    """The files, in the folder of the report, that `compare` writes for analysis `folders`."""
    names = []
    for sharing in folders_by_base(folders):
        first, *others = columns_of_folders(sharing)
        names += [name_of(level, first, other) for level in LEVELS for other in others]
    return tuple(f"{TABLES}/{name}.{ending}" for name in names for ending in ENDINGS)


def write_comparisons(comparisons: list[Comparison], folder: Path) -> None:
    """Publish the tables of all comparisons; their captions hold the claims."""
    for comparison in comparisons:
        write_table(table_of(comparison), folder)


def compare_counts(counts: Counts, config: CompareConfig) -> list[Comparison]:
    """Every later model against the first."""
    return [_compare_two(counts, column, config) for column in range(1, len(counts.models))]


def _compare_two(counts: Counts, column: int, config: CompareConfig) -> Comparison:
    total_a, total_b = counts.totals[0], counts.totals[column]
    tables = {name: (row[0], total_a, row[column], total_b) for name, row in counts.by_name.items()}
    pvalues = [statistics.fisher(*table) if total_a and total_b else 1.0 for table in tables.values()]
    qvalues = statistics.benjamini_hochberg(pvalues)
    changes = [
        change_of(name, *tables[name], p, q, config.confidence)
        for name, p, q in zip(tables, pvalues, qvalues, strict=True)
    ]
    rest_a, rest_b = unclassified(changes)
    global_p = statistics.homogeneity(
        [change.count_a for change in changes] + [rest_a],
        [change.count_b for change in changes] + [rest_b],
        config.resamples,
        config.seed,
    )
    model_a, model_b = counts.models[0], counts.models[column]
    claim = claim_of(counts.level, model_a, model_b, changes, global_p, 1 - config.confidence)
    return Comparison(counts.level, model_a, model_b, changes, global_p, claim, config.confidence, counts.annotator)


def change_of(
    name: str, count_a: int, total_a: int, count_b: int, total_b: int, p: float, q: float, confidence: float
) -> Change:
    """Shares, difference and change of one category with their intervals."""
    table = (count_a, total_a, count_b, total_b)
    wilson_a, wilson_b = (
        statistics.wilson(count_a, total_a, confidence),
        statistics.wilson(count_b, total_b, confidence),
    )
    difference, ratio = statistics.newcombe(*table, confidence), statistics.katz(*table, confidence)
    share_a, share_b = (
        count / total if total else float("nan") for count, total in ((count_a, total_a), (count_b, total_b))
    )
    return Change(
        name,
        count_a,
        total_a,
        share_a,
        *wilson_a,
        count_b,
        total_b,
        share_b,
        *wilson_b,
        share_b - share_a,
        *difference,
        statistics.ratio(*table) - 1,
        ratio.low - 1,
        ratio.high - 1,
        p,
        q,
    )


def claim_of(level: str, model_a: str, model_b: str, changes: list[Change], global_p: float, alpha: float) -> str:
    """What may be claimed about the categories, and what not, in plain words."""
    plural = {"category": "categories", "class": "classes"}[level]
    total_a, total_b = (changes[0].total_a, changes[0].total_b) if changes else (0, 0)
    if not total_a or not total_b:
        return f"Nothing can be compared: {model_a} has {total_a} latents of its own and {model_b} has {total_b}."
    sizes = f"{total_a} latents of {model_a} and {total_b} of {model_b}"
    significant = [change for change in changes if change.q < alpha]
    corrected = f"Fisher exact tests corrected for {len(changes)} {plural}"
    rest_a, rest_b = unclassified(changes)
    overall = f"Over all {plural} at once, the {rest_a} and {rest_b} latents in none included: {stated('p', global_p)}."
    if not significant:
        smallest = min(change.q for change in changes)
        return (
            f"No {level} differs significantly between {sizes} (smallest {stated('q', smallest)}, {corrected}). "
            f"{overall} The counts may be reported; that {model_b} has more or less of any {level} may not be claimed. "
            f"{_power(changes)}"
        )
    named = "; ".join(
        f"{change.name} {'more' if change.difference > 0 else 'less'} frequent in {model_b} "
        f"({change.count_a} of {total_a} against {change.count_b} of {total_b}, {stated('q', change.q)})"
        for change in significant
    )
    return f"May be claimed ({corrected}): {named}. No other {level} differs significantly between {sizes}. {overall}"


def unclassified(changes: list[Change]) -> tuple[int, int]:
    """How many latents of either model are in no category: they count towards the totals alone."""
    total_a, total_b = (changes[0].total_a, changes[0].total_b) if changes else (0, 0)
    return total_a - sum(change.count_a for change in changes), total_b - sum(change.count_b for change in changes)


def _power(changes: list[Change]) -> str:
    """How large a change would have had to be to be found, for a category of average size."""
    total_a, total_b = changes[0].total_a, changes[0].total_b
    counts = [change.count_a for change in changes if change.count_a + change.count_b]
    typical = sum(counts) / len(counts) / total_a if counts else 0.0
    factor = statistics.detectable_ratio(typical, total_a, total_b)
    if factor == float("inf"):
        return "At these sizes no true change of a typical share would be found reliably."
    return (
        f"At these sizes a share of {percent(typical)} would have to grow by a factor of {factor:.1f} "
        "to be found with 80\u00a0% power in a single uncorrected test."
    )


def name_of(level: str, model_a: str, model_b: str) -> str:
    """What the files of a comparison are called, without their endings."""
    return re.sub(r"[^\w.-]+", "_", f"{level}_{model_a}_{model_b}")


def table_of(comparison: Comparison) -> Table:
    """The comparison as a table; rows in the order of the taxonomy."""
    a, b = comparison.model_a, comparison.model_b
    by = f"Annotator: {comparison.annotator}. " if comparison.annotator else ""
    return Table(
        name=name_of(comparison.level, a, b),
        caption=f"Latents of {a} and {b} by {comparison.level}: counts, shares, difference in points, change and "
        f"{comparison.confidence:.0%} intervals; p of Fisher's exact test, q after Benjamini-Hochberg. "
        f"{by}{comparison.claim}",
        columns=[*(field.name for field in fields(Change)), "annotator"],
        raw=[[*asdict(change).values(), comparison.annotator] for change in comparison.changes],
        heading=[
            comparison.level,
            a,
            "share",
            b,
            "share",
            "difference",
            "interval",
            "change (%)",
            "interval",
            "p",
            "q",
        ],
        printed=[_printed(change) for change in comparison.changes],
    )


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
