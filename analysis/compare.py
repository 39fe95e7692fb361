"""Which kinds of latents one tuned model has more of than another, with what the small counts allow to be said.

    python -m analysis.compare experiment=STUDY       categories of the tuned-only latents of pairs that share a base
    python -m analysis.compare counts=FILE            counts from anywhere: a CSV `category,<model>,<model>...`

Frequency of a category is its share of one model's latents, those without a category included; change is the ratio of
two shares minus one (arXiv 2509.18792).
"""

import csv
import io
import re
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow.parquet as pq
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from analysis import statistics
from analysis.config import AnalysisSettings, CompareConfig
from analysis.tables import Table, interval, percent, probability, signed, text_of, write_table
from analysis.taxonomy import DEFAULT, Category, load_taxonomy, read_categories
from extract.command import EXIT_BAD_INPUT, experiment_of, pairs_of, run
from extract.errors import BadInput
from train.runs import run_folder

UNCLASSIFIED = "unclassified"


@dataclass(frozen=True)
class Counts:
    """Latents by category (or class) and model. `totals` count the unclassified ones too."""

    level: str
    models: list[str]
    by_name: dict[str, list[int]]
    totals: list[int]


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


@dataclass
class CountsSettings(CompareConfig):
    """The settings of `python -m analysis.compare counts=FILE`, which needs no experiment."""

    # CSV of counts: category,<model>,<model>... ; a row `unclassified` counts towards the totals alone.
    counts: str = ""
    # Folder for the tables; empty = outputs/compare/<name of the file>.
    outputs: str = ""


def compare(settings: AnalysisSettings, folders: list[Path]) -> list[Comparison]:
    """Compare the tuned-only latents of analysis `folders` that share a base, and write the tables of the report."""
    comparisons = comparisons_of(settings, folders)
    write_comparisons(comparisons, Path(settings.outputs) / "report" / "tables")
    return comparisons


def comparisons_of(settings: AnalysisSettings, folders: list[Path]) -> list[Comparison]:
    """The comparisons of `compare` without writing anything; empty if no two folders share a base."""
    path = settings.analysis.taxonomy.path
    categories = load_taxonomy(Path(path) if path else DEFAULT)
    by_base: dict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        by_base[models_of(folder)[0]].append(folder)
    return [
        comparison
        for sharing in by_base.values()
        if len(sharing) > 1
        for counts in counts_of_folders(sharing, categories)
        for comparison in compare_counts(counts, settings.analysis.compare)
    ]


def models_of(folder: Path) -> list[str]:
    """The models of an analysis folder, base first."""
    prefix = "norm_"
    names = pq.read_schema(folder / "latents.parquet").names
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def counts_of_folders(folders: list[Path], categories: list[Category]) -> list[Counts]:
    """Categories and classes of the tuned-only latents, one column a folder, named after its tuned model."""
    tuned = [models_of(folder)[1] for folder in folders]
    columns = tuned if len(set(tuned)) == len(tuned) else [folder.name for folder in folders]
    found = [
        Counter(row.category for row in read_categories(folder) if row.owner == model)
        for folder, model in zip(folders, tuned, strict=True)
    ]
    by_name = {category.name: [counter[category.name] for counter in found] for category in categories}
    counts = Counts("category", columns, by_name, [counter.total() for counter in found])
    return [classes_of(counts, categories), counts]


def classes_of(counts: Counts, categories: list[Category]) -> Counts:
    """Counts of categories summed to their classes."""
    by_class = {category.group: [0] * len(counts.models) for category in categories}
    for category in categories:
        if category.name in counts.by_name:
            by_class[category.group] = [
                a + b for a, b in zip(by_class[category.group], counts.by_name[category.name], strict=True)
            ]
    return Counts("class", counts.models, by_class, counts.totals)


def read_counts(path: Path, categories: list[Category]) -> list[Counts]:
    """Counts of a CSV file; where its rows are categories of the taxonomy, their classes come first."""
    if not path.is_file():
        raise BadInput(f"counts ({path}) is not a file. Give a CSV: category,<model>,<model>...")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"counts ({path}) is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if any(row)]
    if not rows or len(rows[0]) < 3 or len(set(rows[0])) < len(rows[0]):
        raise BadInput(
            f"counts ({path}): the first line must be category,<model>,<model>... with at least two different models."
        )
    models, by_name = rows[0][1:], {}
    for row in rows[1:]:
        if row[0] in by_name:
            raise BadInput(f"counts ({path}): {row[0]!r} occurs twice. Add up its rows.")
        by_name[row[0]] = [_count(cell, path, row[0]) for cell in row[1:]]
        if len(row) != len(rows[0]):
            raise BadInput(f"counts ({path}): row {row[0]!r} has {len(row) - 1} counts for {len(models)} models.")
    totals = [sum(column) for column in zip(*by_name.values(), strict=True)] or [0] * len(models)
    for model, total in zip(models, totals, strict=True):
        if total == 0:
            raise BadInput(f"counts ({path}): {model} has no latents. A share needs at least one: remove the column.")
    by_name.pop(UNCLASSIFIED, None)
    level = "class" if set(by_name) <= {category.group for category in categories} else "category"
    counts = Counts(level, models, by_name, totals)
    known = set(by_name) <= {category.name for category in categories}
    return [classes_of(counts, categories), counts] if known else [counts]


def _count(cell: str, path: Path, name: str) -> int:
    if not cell.isdecimal():
        raise BadInput(
            f"counts ({path}): {cell!r} in row {name!r} is not a count. Write whole numbers of latents, not shares."
        )
    return int(cell)


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
    rest_a, rest_b = (total - sum(table[i] for table in tables.values()) for i, total in ((0, total_a), (2, total_b)))
    global_p = statistics.homogeneity(
        [change.count_a for change in changes] + [rest_a],
        [change.count_b for change in changes] + [rest_b],
        config.resamples,
        config.seed,
    )
    model_a, model_b = counts.models[0], counts.models[column]
    claim = claim_of(counts.level, model_a, model_b, changes, global_p, 1 - config.confidence)
    return Comparison(counts.level, model_a, model_b, changes, global_p, claim, config.confidence)


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
    overall = f"Over all {plural} at once: p = {probability(global_p)}."
    if not significant:
        smallest = min(change.q for change in changes)
        return (
            f"No {level} differs significantly between {sizes} (smallest q = {probability(smallest)}, {corrected}). "
            f"{overall} The counts may be reported; that {model_b} has more or less of any {level} may not be claimed. "
            f"{_power(changes)}"
        )
    named = "; ".join(
        f"{change.name} {'more' if change.difference > 0 else 'less'} frequent in {model_b} "
        f"({change.count_a} of {total_a} against {change.count_b} of {total_b}, q = {probability(change.q)})"
        for change in significant
    )
    return f"May be claimed ({corrected}): {named}. No other {level} differs significantly between {sizes}. {overall}"


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


def table_of(comparison: Comparison) -> Table:
    """The comparison as a table; rows in the order of the taxonomy."""
    a, b = comparison.model_a, comparison.model_b
    return Table(
        name=re.sub(r"[^\w.-]+", "_", f"{comparison.level}_{a}_{b}"),
        caption=f"Latents of {a} and {b} by {comparison.level}: counts, shares, difference in points, change and "
        f"{comparison.confidence:.0%} intervals; p of Fisher's exact test, q after Benjamini-Hochberg. "
        f"{comparison.claim}",
        columns=[field.name for field in fields(Change)],
        raw=[list(asdict(change).values()) for change in comparison.changes],
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


def write_comparisons(comparisons: list[Comparison], folder: Path) -> None:
    """Publish the tables of all comparisons; their captions hold the claims."""
    for comparison in comparisons:
        write_table(table_of(comparison), folder)


def show(comparisons: list[Comparison]) -> str:
    """All tables and claims for a terminal."""
    parts = [f"{text_of(table_of(comparison))}\n\n{comparison.claim}" for comparison in comparisons]
    return "\n\n".join(parts) or "Nothing to compare: no two pairs share a base."


def compare_study(settings: AnalysisSettings) -> None:
    """Compare the pairs of a study whose categories exist."""
    pairs = [(pair, run_folder(pair, experiment_of(pair)).name) for pair in pairs_of(settings)]
    folders = [Path(pair.outputs) / "analysis" / name for pair, name in pairs]
    folders = [folder for folder in folders if (folder / "categories.csv").exists()]
    if not folders:
        raise BadInput(
            f"{settings.study} has no categories. Run `python -m analysis experiment={settings.study}` first."
        )
    print(show(compare(settings, folders)))


def compare_file(arguments: list[str]) -> None:
    """Compare the counts of a file: `counts=FILE [confidence=0.95] [resamples=10000] [seed=0] [outputs=FOLDER]`."""
    try:
        settings = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(CountsSettings), OmegaConf.from_dotlist(arguments))
        )
    except OmegaConfBaseException as error:
        valid = ", ".join(field.name for field in fields(CountsSettings))
        raise BadInput(f"{str(error).splitlines()[0]}. Settings beside counts=FILE: {valid}.") from error
    assert isinstance(settings, CountsSettings)
    if not 0 < settings.confidence < 1 or settings.resamples < 1:
        raise BadInput(
            f"confidence ({settings.confidence}) must lie between 0 and 1, resamples ({settings.resamples}) above 0."
        )
    path = Path(settings.counts)
    counts = read_counts(path, load_taxonomy())
    comparisons = [comparison for table in counts for comparison in compare_counts(table, settings)]
    folder = Path(settings.outputs or f"outputs/compare/{path.stem}")
    write_comparisons(comparisons, folder)
    print(f"{show(comparisons)}\n\nTables: {folder}")


def main() -> None:
    """Entry of `python -m analysis.compare`."""
    if not any(argument.startswith("counts=") for argument in sys.argv[1:]):
        run(AnalysisSettings, compare_study)
        return
    try:
        compare_file(sys.argv[1:])
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
