"""The command `python -m analysis.compare`: the pairs of a study, or a file of counts, and what it prints of either.

What the counts allow to be said is decided in `analysis.compare.claims`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from itertools import compress
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from analysis.compare.changes import Comparison
from analysis.compare.comparison_tables import certain_table, table_of
from analysis.compare.config import check_compare
from analysis.compare.counts import folders_by_base, read_counts
from analysis.compare.flow import flow_table
from analysis.compare.pairwise import compare_counts
from analysis.compare.step import (
    TABLES,
    WRITTEN,
    check_reference,
    compare,
    flows_of,
    leaderboard_of,
    leaderboard_said,
    write_comparisons,
)
from analysis.config import AnalysisSettings, CompareConfig
from analysis.latents.columns import models_of
from analysis.spelling import did_you_mean
from analysis.study_folders import categorised_folders
from analysis.tables import Table, text_of
from analysis.taxonomy.categories import Category
from analysis.taxonomy.step import DEFAULT, load_taxonomy
from analysis.written_files import rewriting
from extract.command import EXIT_BAD_INPUT, run
from extract.errors import BadInput

# Above the table of those whose intervals of nu cross no threshold.
CERTAIN_ALONE = "The certain latents alone:"


@dataclass
class CountsSettings(CompareConfig):
    """The settings of `python -m analysis.compare counts=FILE`, which needs no experiment."""

    # CSV of counts: category,<model>,<model>... ; a row `unclassified` counts towards the totals alone.
    counts: str | None = None
    # YAML file of classes and categories that the rows are of; null is the taxonomy of arXiv 2509.18792.
    taxonomy: str | None = None
    # Folder for the tables; empty = outputs/compare/<path of the file without .csv>. Tables of an earlier run go.
    outputs: str = ""


def show(comparisons: list[Comparison], beside: list[tuple[Table, str]]) -> str:
    """All tables and claims for a terminal; names without a latent in either model are in the files alone."""
    parts = [_shown(comparison) for comparison in comparisons]
    parts += [f"{text_of(table)}\n\n{said}" for table, said in beside]
    caveats = list(dict.fromkeys(comparison.caveat for comparison in comparisons))
    return "\n\n".join([*parts, *caveats])


def _shown(comparison: Comparison) -> str:
    tables = [table_of(comparison), *([certain_table(comparison)] if comparison.certain else [])]
    seen = [change.count_a + change.count_b > 0 for change in comparison.changes]
    shown = [replace(table, printed=list(compress(table.printed, seen))) for table in tables]
    return "\n\n".join([text_of(shown[0]), comparison.claim, *(f"{CERTAIN_ALONE}\n{text_of(t)}" for t in shown[1:])])


def compare_study(settings: AnalysisSettings) -> None:
    """Compare the pairs of a study whose categories exist. The report and its tables stay as they are: they were made
    with settings of their own.
    """
    folders = categorised_folders(settings)
    if not folders_by_base(folders):
        analysed = "; ".join(f"{folder.name}: {' -> '.join(models_of(folder))}" for folder in folders)
        raise BadInput(
            f"There is one side alone: no two tuned models share a base ({analysed}). Analyse another pair with the "
            f"same base, experiment={settings.study} without /PAIR for all pairs, or give counts=FILE."
        )
    target = Path(settings.outputs) / "compare"
    comparisons = compare(settings, folders, target)
    beside = leaderboard_said(settings, comparisons)
    print(f"{show(comparisons, beside)}\n\n{text_of(flow_table(flows_of(settings, folders)))}")
    print(f"\nTables: {target / TABLES}")


def compare_file(arguments: list[str]) -> None:
    """Compare the counts of a file: `counts=FILE [confidence=0.95] [reference=MODEL] [outputs=FOLDER] ...`."""
    settings = counts_settings(arguments)
    path, categories = Path(settings.counts or ""), load_taxonomy(Path(settings.taxonomy or DEFAULT))
    board = leaderboard_of(settings, categories)
    counts = read_counts(path, categories)
    check_reference(counts[0].models, settings.reference, section="")
    comparisons = [comparison for table in counts for comparison in compare_counts(table, settings)]
    folder = Path(settings.outputs) if settings.outputs else default_folder(path)
    with rewriting(folder / WRITTEN, [folder]):
        beside = write_comparisons(comparisons, settings, board, folder)
    print(f"{show(comparisons, beside)}\n\n{_unknown(comparisons, categories)}Tables: {folder}")


def default_folder(counts: Path) -> Path:
    """`outputs/compare/` and the path of the file below the working directory, or from the root: one for each file."""
    whole = counts.resolve()
    below = whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole.relative_to(whole.anchor)
    return Path("outputs/compare") / below.parent / below.name.removesuffix(".csv")


def counts_settings(arguments: list[str]) -> CountsSettings:
    """The settings of a command line; BadInput for the first that cannot be used."""
    known = [field.name for field in fields(CountsSettings)]
    for argument in arguments:
        name, is_set, _ = argument.partition("=")
        if not is_set:
            raise BadInput(f"{argument} has no value. Settings are name=value.")
        if name.partition(".")[0] not in known:
            hint = did_you_mean(name, known)
            raise BadInput(f"{argument} is not a setting.{hint} Settings beside counts=FILE: {', '.join(known)}.")
    try:
        settings = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(CountsSettings), OmegaConf.from_dotlist(arguments))
        )
    except OmegaConfBaseException as error:
        raise BadInput(f"{error.full_key}: {str(error).splitlines()[0]}.") from error
    assert isinstance(settings, CountsSettings)
    if not settings.counts:
        raise BadInput("counts= names no file. Give a CSV: counts=FILE with the lines category,<model>,<model>...")
    if settings.taxonomy and not Path(settings.taxonomy).is_file():
        raise BadInput(f"taxonomy ({settings.taxonomy}) is not a file. Give a YAML file of classes and categories.")
    check_compare(settings, section="")
    if settings.human_labels:
        raise BadInput("human_labels=true needs the latents of a study. Counts of a file have none: leave it out.")
    return settings


def _unknown(comparisons: list[Comparison], categories: list[Category]) -> str:
    """Says where the names are of no known taxonomy, and why there is no table of classes where a file holds some
    categories alone.
    """
    first = comparisons[0]
    missing = first.num_names - len(first.changes)
    names = {category.name for category in categories} | {category.group for category in categories}
    if not names & {change.name for change in first.changes}:
        return (
            f"No row is in the taxonomy: the tests are corrected for the {len(first.changes)} names of the file alone. "
            "If more were looked at, write their rows too, with 0 where there are none.\n\n"
        )
    if first.level != "category" or not missing:
        return ""
    return (
        f"The file lacks {missing} of the taxonomy's {len(categories)} categories: they count as tests, and there is "
        "no table of classes. Write 0 where a category has no latents.\n\n"
    )


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
