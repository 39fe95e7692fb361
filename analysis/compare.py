"""Which kinds of latents one tuned model has more of than another, with what the small counts allow to be said.

    python -m analysis.compare experiment=STUDY       categories of the tuned-only latents of models that share a base
    python -m analysis.compare counts=FILE            counts from anywhere: a CSV `category,<model>,<model>...`

What the counts allow to be said is decided in `analysis.comparison`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from analysis.comparison import Comparison, compare, compare_counts, table_of, write_comparisons
    from analysis.config import AnalysisSettings, CompareConfig
    from analysis.counts import read_counts
    from analysis.tables import text_of
    from analysis.taxonomy import load_taxonomy
    from extract.command import EXIT_BAD_INPUT, experiment_of, pairs_of, run
    from extract.errors import BadInput
    from train.runs import run_folder


@dataclass
class CountsSettings(CompareConfig):
    """The settings of `python -m analysis.compare counts=FILE`, which needs no experiment."""

    # CSV of counts: category,<model>,<model>... ; a row `unclassified` counts towards the totals alone.
    counts: str = ""
    # Folder for the tables; empty = outputs/compare/<name of the file>.
    outputs: str = ""


def show(comparisons: list[Comparison]) -> str:
    """All tables and claims for a terminal."""
    parts = [f"{text_of(table_of(comparison))}\n\n{comparison.claim}" for comparison in comparisons]
    return "\n\n".join(parts) or "Nothing to compare: no two tuned models share a base."


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
    with one_line_interrupts():
        main()
