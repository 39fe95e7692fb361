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
from analysis.scoring.votes import AND_PEOPLE
from analysis.tables import Table, write_table

# Draws a table in the colours of the models.
Draw = Callable[[Table, Mapping[str, str]], Figure]
# What stands in `agreement.csv` before the name of one of several people.
PERSON = f"{AND_PEOPLE}: "


@dataclass(frozen=True)
class Part:
    """One part of the section: its table, the file it is, and a figure of it where a figure says more."""

    heading: str
    source: str
    table: Table
    figure: figures.Drawn | None


@dataclass(frozen=True)
class Kind:
    """A file that becomes a part, with the caption of its table, and how it is drawn, where it is."""

    file: str
    heading: str
    caption: str
    draw: Draw | None = None
    drawn_caption: str = ""


FLOW = "From selected latents to categories"
AGREEMENT = Kind(
    "agreement.csv",
    "Do annotators agree?",
    "Agreement on categories and classes beyond chance: 1 is complete, 0 what chance gives; "
    "latents: those that both judged, or their documents.",
    lambda table, _: figure_quality.agreement(table),
    figure_quality.AGREEMENT_CAPTION,
)
OF_PAIR = (
    Kind(
        "score_summary.csv",
        "Are the descriptions right?",
        "Balanced accuracy of telling documents in which a latent fires from others by its description alone, on "
        "documents that the annotator did not see; 0.5 is chance. The control shuffles descriptions between latents.",
        figure_quality.scores,
        figure_quality.SCORES_CAPTION,
    ),
    AGREEMENT,
)
COSTS = Kind(
    "costs.csv",
    "What the annotation cost",
    "Requests by kind and model with their outcomes, tokens and US dollars.",
)


def parts_of(
    outputs: Path, folders: list[Path], flow: Table, colours: Mapping[str, str], names_people: bool = True
) -> list[Part]:
    """The flow, and the parts whose files exist, with their figures and tables written into the report."""
    target = outputs / "report"
    source = f"tables/{flow.name}.csv"
    drawn = figures.draw(figure_quality.flow(flow, colours), target, flow.name, [source], figure_quality.FLOW_CAPTION)
    found = [Part(FLOW, source, flow, drawn)]
    files = [(kind, f"../analysis/{folder.name}/", folder.name) for folder in folders for kind in OF_PAIR]
    pooled, costs = ((kind, "../analysis/", "") for kind in (AGREEMENT, COSTS))
    for kind, beside, pair in [pooled, *files, costs]:
        if (target / beside / kind.file).is_file():
            table = read_table(target / beside / kind.file, kind.caption)
            table = replace(table, name=f"{table.name}_{pair}" if pair else table.name)
            if table.raw:
                heading = f"{kind.heading} ({pair})" if pair else kind.heading
                shown = table if names_people else without_names(table)
                found.append(_part(kind, heading, beside + kind.file, shown, colours, target))
    return found


def _part(kind: Kind, heading: str, source: str, table: Table, colours: Mapping[str, str], target: Path) -> Part:
    write_table(table, target / "tables")
    drawn = None
    if kind.draw:
        drawn = figures.draw(kind.draw(table, colours), target, table.name, [source], kind.drawn_caption)
    return Part(heading, source, table, drawn)


def without_names(table: Table) -> Table:
    """The table with numbers in place of the names of people."""
    named = [cell for row in table.raw for cell in row if PERSON in str(cell)]
    people = dict.fromkeys(str(cell).partition(PERSON)[2] for cell in named)
    numbers = {who: number for number, who in enumerate(people, 1)}
    called: dict[object, str] = {
        cell: f"{rater}{PERSON}person {numbers[who]}"
        for cell in named
        for rater, _, who in [str(cell).partition(PERSON)]
    }
    return replace(
        table,
        raw=[[called.get(cell, cell) for cell in row] for row in table.raw],
        printed=[[called.get(cell, cell) for cell in row] for row in table.printed],
    )
