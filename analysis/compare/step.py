"""The comparison of the tuned models of a study: which are compared, and the tables that are written.

    tables/class_<a>_<b>, category_<a>_<b>              every name, in the order of the taxonomy
    tables/changes_class_<a>_<b>, changes_category_...  largest changes first, as arXiv 2509.18792 prints them
    tables/certain_class_<a>_<b>, certain_category_...  the certain latents alone: do the claims hold for them?
    tables/leaderboard_<a>_<b>                          beside an external leaderboard, where one is given
    tables/comparisons                                  a row for each comparison: the numbers of its claim and caveat
    tables/flow                                         from selection to category, with what was lost and why

each as .csv and .tex: in outputs/STUDY/report by `python -m analysis`, in outputs/STUDY/compare by the command
`python -m analysis.compare`. What is computed of two models is in `analysis.compare.pairwise`.
"""

from __future__ import annotations

from pathlib import Path

from analysis.compare.beside import beside
from analysis.compare.changes import Comparison
from analysis.compare.comparison_tables import CERTAIN, CHANGES, certain_table, changes_table, name_of, table_of
from analysis.compare.counts import LEVELS, columns_of_folders, counts_of_folders, folders_by_base
from analysis.compare.flow import FlowRow, flow_of, flow_table
from analysis.compare.leaderboard import Leaderboard, read_leaderboard
from analysis.compare.pairwise import compare_counts, pairs_of_models
from analysis.compare.summary import COMPARISONS, comparisons_table
from analysis.config import AnalysisSettings, CompareConfig
from analysis.human import HUMAN
from analysis.tables import ENDINGS, Table, write_table
from analysis.taxonomy.categories import Category
from analysis.taxonomy.step import DEFAULT, load_taxonomy
from analysis.written_files import rewriting
from extract.errors import BadInput

# The folder of the tables, and what names those that a comparison wrote, so that the next one removes what it does not.
TABLES, WRITTEN = "tables", "compare_files.json"
# What the names of the tables of two models of a study begin with.
KINDS = ("", CHANGES, CERTAIN)


def compare(settings: AnalysisSettings, folders: list[Path], target: Path) -> list[Comparison]:
    """Compare the tuned-only latents of analysis `folders` that share a base; the tables are written below `target`."""
    config, tables = settings.analysis.compare, target / TABLES
    board = leaderboard_of(config, taxonomy_of(settings))
    comparisons = comparisons_of(settings, folders)
    with rewriting(target / WRITTEN, [tables]):
        write_comparisons(comparisons, config, board, tables)
        write_table(flow_table(flows_of(settings, folders)), tables)
    return comparisons


def comparisons_of(settings: AnalysisSettings, folders: list[Path]) -> list[Comparison]:
    """The comparisons of `compare` without writing anything; empty if no two tuned models share a base."""
    config, categories = settings.analysis.compare, taxonomy_of(settings)
    sharing = folders_by_base(folders)
    check_reference([model for group in sharing for model in columns_of_folders(group)], config.reference)
    return [
        comparison
        for group in sharing
        for counts in counts_of_folders(group, categories, config.human_labels)
        for comparison in compare_counts(counts, config)
    ]


def flows_of(settings: AnalysisSettings, folders: list[Path]) -> list[FlowRow]:
    """The flow of the latents of all `folders`."""
    categories, human_labels = taxonomy_of(settings), settings.analysis.compare.human_labels
    return [row for folder in folders for row in flow_of(folder, categories, human_labels)]


def taxonomy_of(settings: AnalysisSettings) -> list[Category]:
    """The categories of a study."""
    path = settings.analysis.taxonomy.path
    return load_taxonomy(Path(path) if path else DEFAULT)


def leaderboard_of(config: CompareConfig, categories: list[Category]) -> Leaderboard | None:
    """The leaderboard of the settings, if there is one."""
    if not config.leaderboard:
        return None
    names = [*(category.name for category in categories), *(category.group for category in categories)]
    return read_leaderboard(Path(config.leaderboard), dict(config.leaderboard_map), list(dict.fromkeys(names)))


def leaderboard_said(settings: AnalysisSettings, comparisons: list[Comparison]) -> list[tuple[Table, str]]:
    """The tables beside the leaderboard and what they show; none without a leaderboard."""
    board = leaderboard_of(settings.analysis.compare, taxonomy_of(settings))
    return beside(board, comparisons) if board else []


def check_reference(models: list[str], reference: str | None, section: str = "analysis.compare.") -> None:
    """BadInput if `reference` is none of the models that are compared."""
    if reference is not None and models and reference not in models:
        raise BadInput(f"{section}reference ({reference}) is none of the compared models: {', '.join(models)}.")


def write_comparisons(
    comparisons: list[Comparison], config: CompareConfig, board: Leaderboard | None, folder: Path
) -> list[tuple[Table, str]]:
    """Publish the tables of all comparisons; their notes hold the claims. Returns those beside the leaderboard."""
    tables = beside(board, comparisons) if board else []
    for comparison in comparisons:
        write_table(table_of(comparison), folder)
        write_table(changes_table(comparison, config.top_changes), folder)
        if comparison.certain:
            write_table(certain_table(comparison), folder)
    for table in (*([comparisons_table(comparisons)] if comparisons else []), *(table for table, _ in tables)):
        write_table(table, folder)
    return tables


def names_of(config: CompareConfig, folders: list[Path]) -> list[str]:
    """What the tables of a comparison of analysis `folders` are called, those beside a leaderboard apart."""
    groups = folders_by_base(folders)
    names = ["flow", *([COMPARISONS] if groups else [])]
    for sharing in groups:
        pairs = pairs_of_models(list(columns_of_folders(sharing)), config)
        names += [name_of(f"{kind}{level}", *pair) for kind in KINDS for level in LEVELS for pair in pairs]
    return names


def outputs_of(config: CompareConfig, folders: list[Path]) -> tuple[str, ...]:
    """The files, in the folder of the report, that `compare` writes for analysis `folders`, leaderboards apart."""
    return tuple(f"{TABLES}/{name}.{ending}" for name in names_of(config, folders) for ending in ENDINGS)


def inputs_of_comparison(config: CompareConfig, folders: list[Path]) -> dict[str, Path]:
    """The files that a comparison reads where they exist or are asked for: what people said, a leaderboard."""
    people = {f"{folder.name}/{HUMAN}": folder / HUMAN for folder in folders} if config.human_labels else {}
    found = {name: path for name, path in people.items() if path.exists()}
    return found | ({"leaderboard": Path(config.leaderboard)} if config.leaderboard else {})
