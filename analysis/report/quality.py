"""How far the descriptions can be trusted, and what they cost: the parts of the page on the latents' way through the
annotation, on scores, on agreement and on costs, each where its file exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from analysis.report import figure_quality, figures
from analysis.report.side_tables import read_table
from analysis.tables import Table, write_table

Draw = Callable[[Table], Figure]


@dataclass(frozen=True)
class Part:
    """One part of the section: its table, the file it is, and a figure of it where a figure says more."""

    heading: str
    source: str
    table: Table
    figure: figures.Drawn | None


FLOW = "From selected latents to categories"
SCORES = (
    "Are the descriptions right?",
    "Balanced accuracy of telling documents in which a latent fires from others by its description alone, on documents "
    "that the annotator did not see; 0.5 is chance. The control shuffles descriptions between latents.",
)
AGREEMENT = (
    "Do annotators agree?",
    "Agreement on categories and classes beyond chance: 1 is complete, 0 what chance gives.",
)
COSTS = ("What the annotation cost", "Requests by kind and model with their outcomes, tokens and US dollars.")


def parts_of(outputs: Path, folders: list[Path], flow: Table, colours: Mapping[str, str]) -> list[Part]:
    """The flow, and the parts whose files exist, with their figures and tables written into the report."""
    target = outputs / "report"
    source = f"tables/{flow.name}.csv"
    drawn = figures.draw(figure_quality.flow(flow, colours), target, flow.name, [source], figure_quality.FLOW_CAPTION)
    found: list[Part | None] = [Part(FLOW, source, flow, drawn)]

    def scores(table: Table) -> Figure:
        return figure_quality.scores(table, colours)

    for folder in folders:
        beside = f"../analysis/{folder.name}/"
        place = f" ({folder.name})"
        found += [
            _part(target, beside + "score_summary.csv", *SCORES, (scores, figure_quality.SCORES_CAPTION), place),
            _part(
                target,
                beside + "agreement.csv",
                *AGREEMENT,
                (figure_quality.agreement, figure_quality.AGREEMENT_CAPTION),
                place,
            ),
        ]
    found.append(_part(target, "../analysis/costs.csv", *COSTS, None))
    return [part for part in found if part]


def _part(
    target: Path, source: str, heading: str, caption: str, drawing: tuple[Draw, str] | None, place: str = ""
) -> Part | None:
    """The part of the file at `source`, relative to the page; None without the file or without rows in it."""
    path = target / source
    if not path.is_file():
        return None
    name = f"{path.stem}_{path.parent.name}" if place else path.stem
    table = replace(read_table(path, caption), name=name)
    if not table.raw:
        return None
    write_table(table, target / "tables")
    drawn = figures.draw(drawing[0](table), target, name, [source], drawing[1]) if drawing else None
    return Part(heading + place, source, table, drawn)
